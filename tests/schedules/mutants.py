"""Plausible faults, each a change of one place in the package. The model or the seeds named with it should find it.

``python -m tests.schedules --mutants ''`` makes each change in a copy of the package. It prints after how many schedules
the model failed, or which seed failed.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        name: What is wrong.
        model: The model that finds it. ``seeds`` if that is ``test_seeds.py``.
        file: The file of the package.
        old: The text that is replaced, which is in the file once.
        new: The text that replaces it.
    """

    name: str
    model: str
    file: str
    old: str
    new: str


QUEUE, ENGINE, LEDGER, BOUNDS = "_engine/queue.py", "_engine/engine.py", "_engine/ledger.py", "_engine/bounds.py"
DISPATCHER, FUTURE, WAITING = "_engine/dispatcher.py", "futures/job_future.py", "_basics/waiting.py"
COLLECTOR, BATCH, RUNNER = "_forming/collector.py", "_engine/batch_run.py", "_engine/runner.py"
COALESCED = "futures/coalesced.py"

MUTANTS = [
    Mutant(
        "a job is accepted without a check for a shutdown",
        "close_and_submit",
        QUEUE,
        "            if self.closed:  # by another thread, in the meantime\n",
        "            if False:\n",
    ),
    Mutant(
        "a job is refused although the leader has taken it",
        "close_and_submit",
        QUEUE,
        "                    del waiting[item]\n",
        "                    waiting.pop(item, None)\n",
    ),
    Mutant(
        "a refused job is still counted",
        "close_and_submit",
        QUEUE,
        "                    self.withdrawn.append(item)  # L3\n",
        "",
    ),
    Mutant(
        "a job does not wake the batcher thread",
        "result_and_settle",
        QUEUE,
        "            elif len(self._items) > self._wanted:\n                self.not_empty.wake()\n",
        "",
    ),
    Mutant(
        "the leader clears the flag for news after it has taken the news",
        "wait_for_room_of_a_cancelled_job",
        QUEUE,
        "        return Drained(accepted, cancelled, dropped, calls, epoch - 1, closed, callers)",
        "        self.has_news = False\n"
        "        return Drained(accepted, cancelled, dropped, calls, epoch - 1, closed, callers)",
    ),
    Mutant(
        "a thread resigns without a check for new jobs",
        "resign_and_submit",
        QUEUE,
        "        if self.has_news or len(self._items) > wanted or moment < self._alarm:\n",
        "        if moment < self._alarm:\n",
    ),
    Mutant(
        "a thread checks for new jobs before it resigns, not after",
        "resign_and_submit",
        QUEUE,
        "        self._moment, self._wanted = moment, wanted\n        self._is_led = False\n        self._lead.release()\n"
        "        # After the release, because whatever came in before was left to this thread.\n"
        "        if self.has_news or len(self._items) > wanted or moment < self._alarm:\n",
        "        wake = self.has_news or len(self._items) > wanted or moment < self._alarm\n"
        "        self._moment, self._wanted = moment, wanted\n        self._is_led = False\n        self._lead.release()\n"
        "        if wake:\n",
    ),
    Mutant(
        "a thread that resigns lets the batcher thread sleep for too long",
        "resign_until_later",
        QUEUE,
        "        if self.has_news or len(self._items) > wanted or moment < self._alarm:\n",
        "        if self.has_news or len(self._items) > wanted:\n",
    ),
    Mutant(
        "the batcher thread drops a wake-up that comes after its check",
        "resign_and_submit",
        QUEUE,
        "            self._alarm = moment = NEVER if due else self._moment  # if it is due, the leader will wake this thread\n",
        "            self._alarm = moment = NEVER if due else self._moment\n            self.not_empty.reset()\n",
    ),
    Mutant(
        "the batcher thread spins while the leader is about to resign",
        "wait_for_room",
        QUEUE,
        "            self._alarm = moment = NEVER if due else self._moment  # if",
        "            self._alarm = moment = self._moment  # if",
    ),
    Mutant(
        "two threads lead",
        "two_workers",
        QUEUE,
        "        taken: bool = not self.is_leader() and self._lead.acquire(False)\n",
        "        taken = not self.is_leader()\n        self._lead.acquire(False)\n",
    ),
    Mutant(
        "the queue takes more jobs than max_pending",
        "room_for_one",
        BOUNDS,
        "        if len(jobs) <= self.limit or job in list(jobs)[: int(self.limit)]:\n",
        "        if len(jobs) <= self.limit + 1:\n",
    ),
    Mutant(
        "a queue with space for one job refuses both of two jobs",
        "room_for_one",
        BOUNDS,
        "        if len(jobs) <= self.limit or job in list(jobs)[: int(self.limit)]:\n",
        "        if len(jobs) <= self.limit:\n",
    ),
    Mutant(
        "a job that is dispatched does not free its space for its key",
        "wait_for_room_of_a_key",
        LEDGER,
        "        self.queue.leave_bounds(group)\n",
        "",
    ),
    Mutant(
        "two threads change the weight of the waiting jobs at the same time",
        "room_of_a_weight",
        BOUNDS,
        "        try:\n            del self._free\n        except AttributeError:\n            return None\n",
        "",
    ),
    Mutant(
        "a job that leaves the queue does not wake the caller that waits for space",
        "wait_for_room_of_a_key",
        BOUNDS,
        "        self.jobs.pop(job, None)\n        if self.line:\n            self.line.notify()\n",
        "        self.jobs.pop(job, None)\n",
    ),
    Mutant(
        "a job that expires soon does not wake the batcher thread",
        "in_time",
        QUEUE,
        "            elif expires_in is not None:\n                self.note_news()\n",
        "",
    ),
    Mutant(
        "a batch is filled up to the old size after a report has lowered the size",
        "size_falls",
        COLLECTOR,
        "        self._most = NEVER if self._unlimited else None  # the policy may have learned\n",
        "        self._most = NEVER if self._unlimited else self._most\n",
    ),
    Mutant(
        "a worker records the end of its batch before it leads",
        "limit_rises_and_falls",
        RUNNER,
        "        self._dispatcher.lead(self.run, call)\n",
        "        call()\n        self._dispatcher.lead(self.run, int)\n",
    ),
    Mutant(
        "a new policy forgets the jobs in open batches",
        "change_policy",
        DISPATCHER,
        "            self._replace_collector(policy, self._collector.entries(), runs)\n",
        "            self._replace_collector(policy, [], runs)\n",
    ),
    Mutant(
        "two threads each drop a job where one would be enough",
        "drop_oldest",
        QUEUE,
        " is not None and bound.is_exceeded():\n",
        " is not None:\n",
    ),
    Mutant(
        "a job that was dropped is dispatched",
        "drop_and_dispatch",
        FUTURE,
        "            del owner.waiting[self]\n        except KeyError:",
        "            owner.waiting[self]\n        except KeyError:",
    ),
    Mutant(
        "a caller that gets space keeps a wake-up that was meant for another caller",
        "enter_and_pass_room_on",
        QUEUE,
        "            self.pass_on(bound)\n",
        "",
    ),
    Mutant(
        "a caller checks for space before it registers as a waiter",
        "wait_for_room",
        QUEUE,
        "            self.stand_in_line(bound, waiter)\n",
        "            if bound.enter(item):\n                return True\n            self.stand_in_line(bound, waiter)\n"
        "            self.clock.wait_until(waiter, deadline)\n",
    ),
    Mutant(
        "a shutdown does not wake the callers that wait for space",
        "wait_for_room_and_close",
        QUEUE,
        "        finally:\n            self._wake_lines()\n            self.note_news()\n",
        "        finally:\n            self.note_news()\n",
    ),
    Mutant(
        "a cancelled job does not free its space in the queue",
        "wait_for_room_of_a_cancelled_job",
        DISPATCHER,
        "        self.queue.not_full.notify(len(cancelled))\n",
        "",
    ),
    Mutant(
        "a job is cancelled although the leader has taken it",
        "cancel_and_dispatch",
        FUTURE,
        "                del owner.waiting[self]\n            except KeyError:",
        "                if self not in owner.waiting:\n                    raise KeyError\n"
        "                owner.waiting.pop(self, None)\n            except KeyError:",
    ),
    Mutant(
        "a batch takes jobs that were cancelled",
        "cancel_and_take",
        LEDGER,
        "        if lost.count(None) < len(group):\n            group[:] = [future for future, was in zip(group, lost) if was is None]\n",
        "",
    ),
    Mutant(
        "a job is in neither the queue nor the ledger for a moment",
        "flush_and_dispatch",
        LEDGER,
        "            self._books.append(group)  # before the next step, so that each job is always in one of the two places\n"
        "            lost = list(map(self.queue.waiting.pop, group, repeat(self)))\n",
        "            lost = list(map(self.queue.waiting.pop, group, repeat(self)))\n            self._books.append(group)\n",
    ),
    Mutant(
        "a settled job is in two counts for a moment",
        "stats_and_dispatch",
        LEDGER,
        "        self._books[: place + 1] = [totals, *books[1:place]]\n",
        "        self._books[0] = totals\n        self._books[: place + 1] = [totals, *books[1:place]]\n",
    ),
    Mutant(
        "stats() takes the counts at different moments",
        "stats_at_one_moment",
        LEDGER,
        " and list(map(id, books)) == list(map(id, self._books)):\n",
        ":\n",
    ),
    Mutant(
        "the state is written before the outcome",
        "result_and_settle",
        FUTURE,
        "            future._value = outcome\n            future._service = service\n            future._stage = _SUCCEEDED\n",
        "            future._stage = _SUCCEEDED\n            future._value = outcome\n            future._service = service\n",
    ),
    Mutant(
        "two threads settle a future",
        "abandon_and_settle",
        FUTURE,
        "        try:\n            del future._unsettled\n        except AttributeError:  # another thread has settled it\n",
        "        if future._stage is not None:\n",
    ),
    Mutant(
        "a caller checks for the outcome before it registers as a waiter",
        "result_and_settle",
        FUTURE,
        "            attachments[waiter] = None\n            if self._stage is None and not waiter.wait(timeout) and self._stage is None:\n",
        "            if self._stage is not None:\n                return\n            attachments[waiter] = None\n"
        "            if not waiter.wait(timeout) and self._stage is None:\n",
    ),
    Mutant(
        "a settled future wakes only one of several waiters",
        "result_and_settle",
        LEDGER,
        "        for waiter in waiters:\n            waiter.wake()\n",
        "        for waiter in waiters[:1]:\n            waiter.wake()\n",
    ),
    Mutant(
        "a callback is added without a second check for the outcome",
        "done_callback",
        FUTURE,
        "            if self.done():  # F2\n                self._run_each(callbacks)\n",
        "",
    ),
    Mutant(
        "two threads run the same callback",
        "done_callback",
        FUTURE,
        "            self._run_callback(partial(callbacks.pop, 0))\n",
        "            self._run_callback(partial(callbacks.__getitem__, 0))\n            del callbacks[:1]\n",
    ),
    Mutant(
        "the release of a future's condition does not notify its watchers",
        "watch_and_settle",
        FUTURE,
        "                future._try_to_notify_watchers(self)\n\n    # In one step",
        "                pass\n\n    # In one step",
    ),
    Mutant(
        "watchers are notified without the lock of the future's condition",
        "watch_and_settle",
        FUTURE,
        "                if lock.acquire(False):\n                    self._notify_each(condition.waiters)\n",
        "                self._notify_each(condition.waiters)\n",
    ),
    Mutant(
        "each caller gets a result object of its own",
        "result_and_settle",
        FUTURE,
        '                result = vars(self).setdefault("_cached_result", made)\n',
        "                self._cached_result = result = made\n",
    ),
    Mutant(
        "the threads are started twice",
        "two_starts",
        ENGINE,
        "        try:\n            del self._unclaimed\n        except AttributeError:  # another thread starts them\n            return\n"
        "        try:\n            started",
        "        vars(self).pop('_unclaimed', None)\n        try:\n            started",
    ),
    Mutant(
        "two threads shut down a batcher without threads",
        "two_shutdowns_before_the_start",
        ENGINE,
        "        try:\n            del self._unclaimed\n        except AttributeError:  # another thread ends it, or starts the threads, which then end it\n"
        "            return\n",
        "        vars(self).pop('_unclaimed', None)\n",
    ),
    Mutant(
        "a shutdown callback is added without a second check for the end",
        "shutdown_callback",
        ENGINE,
        "        if self.stage is _ENDED and call in self._callbacks:\n            self._run_callbacks()\n",
        "",
    ),
    Mutant(
        "the end of the batcher wakes only one of several callers of shutdown()",
        "two_shutdowns",
        ENGINE,
        "                call()\n        self.queue.ended.notify_all()\n",
        "                call()\n        self.queue.ended.notify()\n",
    ),
    Mutant(
        "a worker that leads at the shutdown does not wake the batcher thread",
        "listener_and_shutdown",
        DISPATCHER,
        "            queue.resign(NOW, 1)\n        else:\n            self._resign()\n",
        "            queue.resign(float('inf'), float('inf'))\n        else:\n            self._resign()\n",
    ),
    Mutant(
        "a worker posts its finished batch without a notification",
        "two_workers",
        QUEUE,
        "            self._calls.append(call)\n        finally:\n            self.note_news()\n",
        "            self._calls.append(call)\n        finally:\n            self.has_news = self.has_news\n",
    ),
    Mutant(
        "jobs that arrive while the leader takes out earlier ones are lost",
        "resign_and_submit",
        WAITING,
        "        self.items[: count + 1] = [self.items[0] + count]\n",
        "        self.items[:] = [self.items[0] + count]\n",
    ),
    Mutant(
        "a wake-up before the sleep is lost",
        "result_and_settle",
        WAITING,
        "        return self._signal.acquire(True, -1 if timeout is None else timeout if timeout > 0 else 0)\n",
        "        self.reset()\n        return self._signal.acquire(True, -1 if timeout is None else timeout if timeout > 0 else 0)\n",
    ),
    Mutant(
        "a caller that has joined a job is not told why it is refused",
        "share_and_close",
        QUEUE,
        "                    item._caller_error, item._stage = (error, None), _FAILED  # for callers that have joined it\n",
        "",
    ),
    Mutant(
        "a caller joins a job that its last caller is about to cancel",
        "share_and_cancel",
        COALESCED,
        "                is_last = self.is_closing = not self.callers\n",
        "                is_last = not self.callers\n",
    ),
    Mutant(
        "a caller joins a job that is about to expire",
        "share_and_expire",
        COALESCED,
        "            self.is_closing |= expires  # so that no caller joins a job that is about to expire\n",
        "",
    ),
    Mutant(
        "a caller that waits for a job that it shares is not woken",
        "share_and_settle",
        COALESCED,
        "        self._all[waiter] = value\n",
        "",
    ),
    Mutant(
        "two equal jobs are submitted at the same time",
        "share_a_job",
        "coalescer.py",
        "            found = self._in_flight.setdefault(shared.place, shared)\n",
        "            found = self._in_flight[shared.place] = shared\n",
    ),
    Mutant(
        "a batch is larger than its limit",
        "seeds",
        COLLECTOR,
        "        entries = backlog if room >= len(backlog) else list(islice(backlog, int(max(room, 1))))\n",
        "        entries = backlog\n",
    ),
    Mutant(
        "two keys share a batch",
        "seeds",
        COLLECTOR,
        "            if lane is None or entry.key is not lane.key:\n",
        "            if lane is None:\n",
    ),
    Mutant(
        "the jobs of a policy that raises are lost",
        "seeds",
        COLLECTOR,
        '        self._broken.append(Batch(lane.key, "", self._empty(lane), error=error))\n',
        "        self._empty(lane)\n",
    ),
    Mutant(
        "a finished batch does not free its worker",
        "seeds",
        DISPATCHER,
        "        self._collector.finished(time, batch_run.runs)\n",
        "",
    ),
    Mutant(
        "a missing result is not noticed",
        "seeds",
        BATCH,
        "                if len(results) != len(self.futures):\n",
        "                if len(results) > len(self.futures):\n",
    ),
    Mutant(
        "the missing results of a generator are not noticed",
        "seeds",
        BATCH,
        "        if number < len(self.futures):\n",
        "        if number < 0:\n",
    ),
    Mutant(
        "a batch that the executor refused keeps its worker",
        "seeds",
        RUNNER,
        "            batch_run.fail(self._named(error, batch_run))\n            self._report(batch_run)\n\n",
        "            batch_run.fail(self._named(error, batch_run))\n\n",
    ),
    Mutant(
        "a listener that raises SystemExit ends the thread that calls it",
        "seeds",
        "listeners.py",
        "            method(event)\n        except BaseException:\n",
        "            method(event)\n        except Exception:\n",
    ),
    Mutant(
        "a callback that raises prevents the next one",
        "seeds",
        FUTURE,
        "        except BaseException as error:\n            if callback is not None or not isinstance(error, IndexError):",
        "        except IndexError as error:\n            if callback is not None or not isinstance(error, IndexError):",
    ),
]
