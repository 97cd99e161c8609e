"""Measures what a job costs in microbatch, and compares it with other ways to process the same jobs: see README.rst."""
