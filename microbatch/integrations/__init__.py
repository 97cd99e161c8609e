"""Integrations with other libraries, in one module for each. ``import microbatch`` imports none of them."""
