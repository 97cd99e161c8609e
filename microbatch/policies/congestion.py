"""A policy that learns how many batches may run at once, by additive increase and multiplicative decrease (AIMD)."""

import math
from collections.abc import Callable
from contextlib import suppress
from copy import copy, deepcopy
from typing import Any, NamedTuple

from microbatch._basics.arguments import check_callable, check_count, check_number
from microbatch._basics.clock import NEVER, NOW
from microbatch.policies.base import BatchReport, BuiltInPolicy, Window

__all__ = ["Congestion"]

_SHORTEST_ROUND = 4
"""A round has as many batches as may run at once, but at least this many."""

_PATIENCE, _MOST_PATIENCE = 8, 64
"""How many rounds pass until a limit that was too high is tried again: the first value, doubled up to the second."""

_SLOW, _HARDLY_FASTER = 1 / 2, 1 / 4
"""If the limit changes by a factor, by which power of it the service time changes. See rules C6 and C7."""

_CERTAIN, _DOUBT = 2.5, 1.0
"""By how many standard errors batches are slow, certainly or maybe."""

_COMPARED = 16
"""How many batches have to end before rule C6 decides."""

_MEMORY = 64
"""Of the batches with one limit, about this many count. Older ones count less and less."""

_RELATED = 4
"""A limit is compared with limits down to a quarter of it."""

_NO_SPREAD = 1e-9
"""If the sizes vary less than that, nothing is known of how the time depends on the size."""

_OUTDATED = 0.1
"""If batches take at least this share less time than with a lower limit, the times with the lower one are outdated."""

_SHORTEST = 1e-6
"""A batch that takes less time counts as if it took this many seconds."""


class Congestion(BuiltInPolicy):
    """Lets only as many batches run at once as the downstream can handle, a number that the policy learns.

    Some APIs refuse calls when too many run at once, or process all of them more slowly. This policy finds out how many
    are too many, by additive increase and multiplicative decrease, as TCP does. The batcher needs as many workers as
    batches may run at once: pass ``max_workers=most``. Combine the policy with ``&``. With ``|``, the limit would still
    hold, but the wait of *retry_after* seconds would not.

    >>> from microbatch import Natural, Size
    >>> (Size(100) | Natural()) & Congestion(most=16)
    (Size(100) | Natural()) & Congestion(16)

    The limit is 1 at first. Each time that a batch ends, the first of these rules that matches is applied.
    `Batcher.explain` shows the limit, the rule that changed it, and the rule that was applied last.

    ====  ==============================================================  ==============================================
    rule  if                                                              then
    ====  ==============================================================  ==============================================
    C1    the downstream refused the batch, and the limit was not         the limit is three quarters of the number of
          lowered after the batch had started                             batches that ran; nothing is dispatched for
                                                                          *retry_after* seconds
    C2    the downstream refused the batch, but the limit was lowered     nothing is dispatched for *retry_after* seconds
          after the batch had started
    C3    all jobs of the batch failed                                    nothing: it may have ended early
    C4    the limit was lowered after the batch had started, or fewer     nothing: it does not show what the limit does
          batches ran than the limit allows
    C5    the round is not over: since the last one, fewer batches have   nothing
          ended than the limit (but at least 4, and 16 after rule C7)
    C6    the limit was lowered by rule C7, and batches hardly became     the limit is what it was before: the downstream
          faster                                                          has become slower for another reason
    C7    batches are certainly slower than with a lower limit            the limit is that lower one, or three quarters
                                                                          of what it was if that is less
    C8    batches may be slower than with a lower limit                   the limit is that lower one, or three quarters
                                                                          of what it was if no known limit is as low,
                                                                          to measure again
    C9    the limit is *most*; or one more was too many (C1, C7), and     nothing
          fewer than 8 rounds have passed since; the 8 doubles, up to
          64, each time that one more is too many again
    C10   otherwise                                                       the limit rises by 1; it doubles if no batch was
                                                                          refused or slow before
    ====  ==============================================================  ==============================================

    Batches are slower in the sense of C7 and C8 if they take more than √2 times as long with twice the limit. From that
    point on, the service time rises faster than the throughput (their ratio is what Kleinrock calls the power of a
    queue). "Certainly" means by 2.5 standard errors, and "may be" by one. Batches became "hardly faster" if they would
    take less than the fourth root of 2 times as long with twice the limit. The times are compared for batches of equal
    size, by linear regression of their logarithms. What is known about a lower limit is forgotten if batches certainly
    take less time now than they did with it: then the downstream has become faster.

    This API answers with the status 429 if more than 8 calls run at once. With 16 workers and batches of 10, it would
    refuse half of the jobs. The policy soon lets 8 batches run, and tries 9 again, less and less often:

    >>> from microbatch.simulation import SimulatedFailure, callers, simulate
    >>> class TooManyRequests(Exception):
    ...     status_code = 429
    >>> def api(batch):
    ...     return 0.1 if batch.in_flight <= 8 else SimulatedFailure(0.1, TooManyRequests())
    >>> def failed(policy):
    ...     report = simulate(policy, callers(500, jobs=10_000), cost=api, max_workers=16)
    ...     return report.failed
    >>> failed(Size(10)), failed(Size(10) & Congestion(16))
    (4960, 110)

    `Batcher.flush` and `Batcher.shutdown` respect the limit. `Batcher.flush` respects *retry_after* too, but
    `Batcher.shutdown` does not.

    Args:
        most: The highest value that the limit may have.
        push_back: A function that takes the exception of a batch (`BatchReport.error`), and returns whether the
            downstream refused it because of too many calls. By default, it did if the exception or its ``response`` has
            an attribute ``status_code``, ``status`` or ``code`` with the HTTP status 429 or 503. The exceptions of most
            HTTP clients have one.
        retry_after: A function that takes the exception of a refused batch, and returns for how many seconds nothing
            should be dispatched, or None. By default, the header ``Retry-After`` says so, in ``headers`` of the
            exception or of its ``response``.
    """

    _gates = 0

    def __init__(
        self,
        most: int,
        *,
        push_back: Callable[[BaseException], bool] | None = None,
        retry_after: Callable[[BaseException], float | None] | None = None,
    ) -> None:
        self.most: int = check_count("most", most)
        for name, function in (("push_back", push_back), ("retry_after", retry_after)):
            if function is not None:
                check_callable(name, function)
        self.push_back = push_back
        self.retry_after = retry_after
        self._resume = NOW  # nothing is dispatched before this moment
        self._doubles = True  # no batch was refused or slow so far
        self._ceiling = NEVER  # the limit that was too high the last time
        self._patience = _PATIENCE
        self._before: tuple[_Times, float, int] | None = None  # what rule C6 compares and restores
        self._times: dict[int, _Times] = {1: _Times(1)}  # by limit
        self._since = NOW  # when the limit was last lowered
        self._limit = self._shown_by = 1  # see `_set`
        self._round = _SHORTEST_ROUND
        self._ended = 0  # batches since the limit changed, of those that show what it does
        self._shown_until = NOW  # batches that start up to this moment show what the limit does
        self._cause = "the start"  # of the limit
        self._last = "no batch has ended"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Congestion":
        """Copy what was learned, but not the functions, because they may have a state that belongs to the user."""
        twin = copy(self)
        vars(twin).update(deepcopy({name: value for name, value in vars(self).items() if not callable(value)}, memo))
        twin._times.setdefault(twin._limit, _Times(twin._limit))  # the limit may have changed during the copy
        # The copy may be for another clock.
        twin._resume = twin._since = twin._shown_until = NOW
        return twin

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return self._resume

    def _earliest(self, window: Window[object]) -> float:
        """See `BatchingPolicy._earliest`."""
        return self._resume

    def _most_running(self) -> float:
        """See `BatchingPolicy._most_running`."""
        return self._limit

    def _note(self) -> str:
        """See `BatchingPolicy._note`."""
        number = "1 batch runs" if self._limit == 1 else f"{self._limit:,} batches run"
        return f"at most {number} at once by Congestion, since {self._cause}; last rule: {self._last}"

    def observe(self, report: BatchReport) -> None:
        """Learn from how a batch ended: apply the first rule that matches."""
        limit, error = self._limit, report.error
        if error is not None and (self.push_back or _is_refusal)(error):
            self._last = self._apply_rule_of_refusal(report)
            self._pause(report, error)
        else:
            self._last = self._apply_rule_of_batch(report)
        if self._limit != limit:
            self._cause = self._last

    # The following methods return the name of the rule that they apply, and its figures.

    def _apply_rule_of_refusal(self, report: BatchReport) -> str:
        if report.started < self._since:
            return f"C2: a batch was refused that started while {report.in_flight} ran, before the limit was lowered"
        self._decrease(min(self._limit, report.in_flight), report)
        return f"C1: a batch was refused while {report.in_flight} ran"

    def _apply_rule_of_batch(self, report: BatchReport) -> str:
        if report.failed >= report.batch.size or not 0 <= report.service_time < NEVER:
            return "C3: a batch failed"
        if report.started < self._since or not self._shows_limit(report):
            return f"C4: only {report.in_flight} ran, or the limit was lowered later"
        self._times[self._limit].add(report, max(report.in_flight, self._shown_by))
        return self._apply_rule_of_round(report)

    def _apply_rule_of_round(self, report: BatchReport) -> str:
        self._ended += 1
        rounds, rest = divmod(self._ended, self._round)
        if rest:
            return f"C5: {rest} of {self._round} batches of a round have ended"
        if self._before is not None and (last := self._judge_decrease(*self._before)):
            return last
        limit, now = self._limit, self._times[self._limit]
        self._drop_outdated(now)
        lower = self._lower()
        excess, error, best = _compare(now, lower, _SLOW)
        figures = f"{excess:+.2f} ± {error:.2f}"
        if excess > _CERTAIN * error:
            before = now, self._ceiling, self._patience
            self._decrease(limit, report, best)
            self._before, self._round = before, max(self._limit, _COMPARED)
            return f"C7: batches were slow while {limit} ran ({figures})"
        if excess > _DOUBT * error:
            self._since = _end(report)
            if all(4 * times.limit > 3 * limit for times in lower):
                best = limit * 3 // 4  # otherwise, nothing would lead to much lower limits
            self._set(best, best, self._times)
            return f"C8: batches may be slow while {limit} run ({figures})"
        if limit >= self.most:
            return f"C9: {self.most} is the most"
        if limit + 1 == self._ceiling and rounds < self._patience:
            return f"C9: {self._ceiling} were too many; {rounds} of {self._patience} rounds are over"
        self._increase()
        return f"C10: a round in which up to {limit} ran is over"

    def _shows_limit(self, report: BatchReport) -> bool:
        """Return whether as many batches ran at once as the limit allows, so that the batch shows what the limit does.

        The last of several batches that start at the same moment has the highest `BatchReport.in_flight`, but the
        others ran beside it too. So batches that start before such a batch has ended count as well.
        """
        if report.in_flight > self._limit:
            return False  # it started before the batcher got this policy
        if report.in_flight >= self._shown_by:
            self._shown_until = max(self._shown_until, _end(report))
        return report.started <= self._shown_until

    def _drop_outdated(self, now: "_Times") -> None:
        """Forget lower limits with which batches took longer: the downstream must have become faster since then."""
        for times in self._lower():
            longer, error, _ = _compare(now, [times], 0)
            if longer < -max(_OUTDATED, _CERTAIN * error):
                self._times = {limit: each for limit, each in self._times.items() if each is not times}

    def _lower(self) -> "list[_Times]":
        """Return what is known of lower limits that are not much lower."""
        limit = self._limit
        return [
            times for times in self._times.values() if times.weight and times.limit < limit <= _RELATED * times.limit
        ]

    def _judge_decrease(self, before: "_Times", ceiling: float, patience: int) -> str:
        """Restore the limit, by rule C6, if that rule matches. Return an empty string if it certainly does not."""
        now = self._times[self._limit]
        excess, error, _ = _compare(before, [now], _HARDLY_FASTER)
        if abs(excess) < _DOUBT * error and self._ended < 4 * self._round:
            return f"C5: it is not clear yet whether batches are faster now ({excess:+.2f} ± {error:.2f})"
        self._before = None
        if excess >= 0:
            return ""
        self._ceiling, self._patience = ceiling, patience
        # All other times are from before the downstream became slower.
        self._set(before.limit, before.limit, {now.limit: now})
        return f"C6: batches were hardly slower while {before.limit} ran ({excess:+.2f} ± {error:.2f})"

    # -- changes of the limit --

    def _increase(self) -> None:
        limit = self._limit
        if limit >= self._ceiling:  # it was too high once, but is not any more
            self._ceiling, self._patience = NEVER, _PATIENCE
        higher = min(2 * limit if self._doubles else limit + 1, self.most)
        self._set(higher, limit + 1, self._times)

    def _decrease(self, running: int, report: BatchReport, good: float = NEVER) -> None:
        """Lower the limit because *running* batches were too many, to at most *good*."""
        self._patience = min(2 * self._patience, _MOST_PATIENCE) if running == self._ceiling else _PATIENCE
        self._ceiling = running
        self._doubles = False
        self._before = None
        self._since = _end(report)
        limit = int(max(1, min(good, running * 3 // 4)))
        times = {number: times for number, times in self._times.items() if number < running and number != limit}
        self._set(limit, limit, times)

    def _set(self, limit: int, shown_by: int, times: "dict[int, _Times]") -> None:
        """Change the limit and what is known. Batches show what the limit does if *shown_by* or more ran at once."""
        # A new dict, because another thread may be copying the old one.
        times = {**times, limit: times.get(limit) or _Times(limit)}
        self._times, self._limit = times, limit
        self._round = max(limit, _SHORTEST_ROUND)
        self._ended = 0
        self._shown_by, self._shown_until = shown_by, NOW

    def _pause(self, report: BatchReport, error: BaseException) -> None:
        seconds = (self.retry_after or _retry_after)(error)
        if seconds is not None:
            resume = _end(report) + check_number("the result of retry_after", seconds, below=NEVER)
            if resume > self._resume:
                self._resume = resume
                self._learned += 1


def _end(report: BatchReport) -> float:
    return report.started + report.service_time


class _Times:
    """The service times of the batches with one limit, and their sizes, as logarithms. Older ones count less and less.

    Attributes:
        limit: The limit.
        running: The mean of the logarithms of the number of batches that ran.
        weight: The number of batches, of which older ones count less and less.
        size: The mean of the logarithms of the sizes.
        time: The mean of the logarithms of the service times.
        sizes: The sum of the squared deviations from `size`.
        products: The sum of the products of the deviations from `size` and `time`.
        times: The sum of the squared deviations from `time`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = self.weight = self.size = self.time = self.sizes = self.products = self.times = 0.0

    def add(self, report: BatchReport, running: int) -> None:
        """Record a batch, while *running* batches ran."""
        size, time = math.log(report.batch.size), math.log(max(report.service_time, _SHORTEST))
        kept = 1 - 1 / _MEMORY
        self.weight = self.weight * kept + 1
        size_before, time_before = size - self.size, time - self.time
        self.running += (math.log(running) - self.running) / self.weight
        self.size += size_before / self.weight
        self.time += time_before / self.weight
        self.sizes = self.sizes * kept + size_before * (size - self.size)
        self.products = self.products * kept + size_before * (time - self.time)
        self.times = self.times * kept + time_before * (time - self.time)


class _Comparison(NamedTuple):
    excess: float = -NEVER
    error: float = 0.0
    limit: int = 1


def _compare(now: _Times, others: list[_Times], power: float) -> _Comparison:
    """Return by how much batches take longer now than with other limits, at most: the worst of these comparisons.

    The excess is the logarithm of the ratio of the service times, minus what it may be: *power* times the logarithm of
    the ratio of the numbers of batches that ran. The result also has the standard error of the excess, and the other
    limit. The service times are corrected to the same size. How they depend on the size is estimated from the batches
    of the same limit only, because with a lower limit, batches are not only faster but also larger.
    """
    groups = [now, *others]
    sizes = sum(times.sizes for times in groups)
    products = sum(times.products for times in groups)
    slope = max(0.0, products / sizes) if sizes > _NO_SPREAD else 0.0
    unexplained = sum(times.times for times in groups) - 2 * slope * products + slope * slope * sizes
    freedom = sum(times.weight for times in groups) - len(groups) - 1
    variance = max(0.0, unexplained) / max(1.0, freedom)
    worst = _Comparison()
    for other in others:
        larger = now.size - other.size
        excess = now.time - other.time - slope * larger - power * (now.running - other.running)
        correction = larger * larger / sizes if sizes > _NO_SPREAD else 0.0
        error = math.sqrt(variance * (1 / now.weight + 1 / other.weight + correction))
        if excess - _CERTAIN * error >= worst.excess - _CERTAIN * worst.error:
            worst = _Comparison(excess, error, other.limit)
    return worst


def _is_refusal(error: BaseException) -> bool:
    """Return whether an HTTP client raised *error* because of the status 429 or 503."""
    for source in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            if getattr(source, name, None) in (429, 503):
                return True
    return False


def _retry_after(error: BaseException) -> float | None:
    """Return the seconds in the header ``Retry-After`` of the exception of an HTTP client."""
    for source in (error, getattr(error, "response", None)):
        headers = getattr(source, "headers", None)
        if headers is not None:
            return _seconds(headers.get("Retry-After"), headers.get("Date"))
    return None


def _seconds(value: Any, sent: Any) -> float | None:
    """Return the seconds that a ``Retry-After`` stands for: a number, or a date, if the response was *sent* at a date."""
    from email.utils import parsedate_to_datetime  # here, because few programs need it

    with suppress(TypeError, ValueError):
        return max(0.0, float(value))
    with suppress(TypeError, ValueError):  # there is no such header, or it is not valid
        return max(0.0, (parsedate_to_datetime(value) - parsedate_to_datetime(sent)).total_seconds())
    return None
