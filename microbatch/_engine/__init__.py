"""Moving jobs from the callers to the processor and back: the threads and the locks.

The rules below hold in this package and in ``futures``. Comments refer to them by number.

Two things can interrupt a thread between any two statements. A *signal handler* runs in the main thread, and may raise
(it does for Ctrl-C). A *finalizer* (``__del__``, or a callback of a weak reference) runs in any thread. Both may use the
batcher: they may submit, cancel, flush, shut down, and wait. Besides, a library that limits the time of a call may raise
an exception in a thread of the batcher from outside, too late, when the call is over.

R1. One lock per batcher, `JobQueue.mutex`, guards all attributes of its queue, its ledger and its `Callers`, the stage of
    its threads, and the stage, the outcome and the attachments of its futures. The one thread that leads owns the
    collector. The lead is taken and left with the mutex held.
R2. The mutex is re-entrant, because a handler or finalizer may interrupt the thread that holds it.
R3. No user code runs with the mutex held, except for the clock. (What interrupts a thread does not count: R2, R5.)
R4. Whatever a caller's thread writes takes effect in one step: one store, `append`, or the like. An exception can come
    before or after it, but can't leave half of it. The leader finishes the rest.
R5. There is no call between a look and the write that depends on it. If what interrupts a thread waits, it releases the
    mutex for that time, however often the thread has acquired it, and other threads change what it guards. Nothing
    interrupts a thread between two statements without a call or a jump.
R6. A waiter is woken before the step that it waits for and again after it. Before, because a handler may raise after the
    step. After, because a handler that comes in before the step may wait, and then the woken thread looks too early.
R7. A thread registers its waiter before it looks whether it has to wait, and removes it in a ``finally``.
R8. To find out whether it holds a lock, a thread asks the lock, not a variable: an exception may come in just when the
    lock is acquired or released.
R9. A ``while`` loop with a condition stands in a function of its own, without ``with`` or ``try``. So does a
    comprehension with an ``if``, which is a loop too since Python 3.12. On CPython 3.12 and 3.13, an exception that comes
    in where such a loop repeats passes by the ``with`` and ``try`` of the same function
    (https://github.com/python/cpython/issues/130279).
R10. A container that other threads may change is copied before it is iterated over.
R11. A thread that settles or cancels never waits for the ``_condition`` of a future, since its holder may have been
    interrupted, for ever.
"""
