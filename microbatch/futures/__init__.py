"""What a caller holds until its job is done."""

from microbatch.futures.job_future import JobFuture

__all__ = ["JobFuture"]
