"""Moving jobs from the callers to the processor and back: the threads and the locks.

The rules below hold in this package and in ``futures``. Comments refer to them by number.

Two things can interrupt a thread between any two statements. A *signal handler* runs in the main thread, and may raise
an exception, as it does for Ctrl-C. A *finalizer* (``__del__``, or a callback of a weak reference) runs in any thread.
Both may use the batcher: they may submit, cancel, flush, shut down, and wait. Also, a library that limits the time of a
call may raise an *exception from outside* in a thread of the batcher, and may do so too late, when the call is over.

R1. One lock per batcher, `JobQueue.mutex`, guards all attributes of its queue, its ledger and its `Callers`, the stage of
    its threads, and the stage, the outcome and the attachments of its futures. The one thread that leads owns the
    collector. A thread takes and leaves the lead with the mutex held.
R2. The mutex is re-entrant, because a handler or finalizer may interrupt the thread that holds it.
R3. No user code runs with the mutex held, except for the clock. (Handlers and finalizers don't count: see R2 and R5.)
R4. A caller's thread changes shared data in one step, such as one assignment or one `append`. An exception can come
    before or after that step, but can't leave half of it. The leader does the rest.
R5. There is no call between a check and the write that depends on it. A handler or finalizer that runs in between may
    wait. It then releases the mutex, however often its thread has acquired it, and other threads change the data that
    the mutex guards. Nothing interrupts a thread between two statements without a call or a jump.
    (Up to Python 3.11, a finalizer may also run where a container is created.)
R6. A waiter is woken before the step that it waits for, and again after it. Before, because a handler may raise after
    the step. After, because a handler may come before the step and wait, and then the woken thread checks too early.
R7. A thread registers its waiter before it checks whether it has to wait, and removes it in a ``finally``.
R8. To find out whether it holds a lock, a thread asks the lock and does not rely on a variable, because an exception
    may come just when the lock is acquired or released.
R9. A ``while`` loop with a condition has a function of its own, without ``with`` or ``try``. So has a comprehension
    with an ``if``, which is a loop too since Python 3.12. On CPython 3.12 and 3.13, an exception that comes just when
    such a loop repeats bypasses the ``with`` and ``try`` of the same function
    (https://github.com/python/cpython/issues/130279).
R10. A container that other threads may change is copied before it is iterated over.
R11. A thread that settles or cancels never blocks on the ``_condition`` of a future. The thread that holds it may have
    been interrupted, and may never release it.
"""
