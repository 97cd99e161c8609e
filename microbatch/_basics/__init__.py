"""What every other room may use: time, checks of arguments, the log, and waiting for another thread. Knows no job."""
