"""The plugin for pytest, in a folder of its own that can be on the path of imports: see ``pytest_microbatch``."""
