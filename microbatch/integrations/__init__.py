"""What batchers do, in the tools that people watch: one file for each outside library, imported only when asked for."""
