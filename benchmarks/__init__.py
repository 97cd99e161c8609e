"""Measures what microbatch costs, beside its peers and beside the least that the promise could cost: see README.rst."""
