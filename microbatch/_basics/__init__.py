"""Helpers that all other modules may use: the clock, argument checks, logging, and waiting for another thread."""
