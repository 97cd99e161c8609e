"""`TqdmListener`: a progress bar over jobs."""

import io
import threading
from typing import Any

import pytest

from microbatch import Batcher, Interval, Size
from microbatch.integrations.tqdm import Bar, TqdmListener
from microbatch.testing import ManualClock, RecordingProcessor
from tests.test_listeners import failing


def test_a_bar_advances_by_the_jobs_of_each_batch_including_failed_ones() -> None:
    with Bar(total=10, file=io.StringIO()) as bar:
        with Batcher[str, Any](failing, Size(2), listeners=[TqdmListener(bar)]) as batcher:
            for job in ("good", "bad", "good"):
                batcher.submit(job)
        assert (3, 10) == (bar.n, bar.total)


def test_the_default_total_of_a_bar_is_the_number_of_submitted_jobs(processor: RecordingProcessor[str]) -> None:
    with Bar(file=io.StringIO()) as bar, Batcher(processor, Size(2), listeners=[TqdmListener(bar)]) as batcher:
        for job in "abcde":
            batcher.submit(job)
        assert (0, 5) == (bar.n, bar.total)
        processor.release()
        batcher.shutdown()
        assert (5, 5) == (bar.n, bar.total)


def test_at_the_shutdown_a_bar_advances_by_the_jobs_that_were_in_no_batch(clock: ManualClock) -> None:
    with Bar(file=io.StringIO()) as bar:
        with Batcher[str, str](list, Interval(60), listeners=[TqdmListener(bar)], clock=clock) as batcher:
            batcher.submit("cancelled").cancel()
            expired = batcher.submit("expired", expires_in=1.0)
            clock.advance(1.0)
            expired.exception(timeout=10)
            batcher.submit("done")
        assert (3, 3) == (bar.n, bar.total)


def test_by_default_the_listener_draws_a_bar_on_standard_error_and_closes_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Batcher[str, str](list, listeners=[TqdmListener()]) as batcher:
        list(batcher.map("abc"))
    assert "3/3 [" in capsys.readouterr().err.rpartition("\r")[2]


def test_one_bar_counts_the_jobs_of_many_threads() -> None:
    with Bar(file=io.StringIO(), mininterval=0, miniters=1) as bar:
        with Batcher[int, int](list, Size(3), max_workers=4, listeners=[TqdmListener(bar)]) as batcher:
            threads = [threading.Thread(target=lambda: list(map(batcher.submit, range(100)))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert (400, 400) == (bar.n, bar.total)


def test_a_bar_is_redrawn_at_every_update_unless_miniters_says_otherwise() -> None:
    with Bar(file=io.StringIO()) as bar:
        assert (1, False) == (bar.miniters, bar.dynamic_miniters)
    with Bar(file=io.StringIO(), miniters=5) as bar:
        assert 5 == bar.miniters
