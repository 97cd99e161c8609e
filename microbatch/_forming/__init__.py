"""Forming batches: jobs and moments in, batches out. Pure: no lock, no clock, no thread."""
