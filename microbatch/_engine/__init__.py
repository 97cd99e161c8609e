"""Moving jobs from the callers to the processor and back: the threads and the locks."""
