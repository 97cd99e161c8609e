"""Moving jobs from the callers to the processor and back, without a lock that a thread could wait for.

User code can interrupt any thread between almost any two statements. A *signal handler* runs in the main thread, and
may raise an exception, as it does for Ctrl-C. A *finalizer* (``__del__``, or a callback of a weak reference) runs in
any thread that collects garbage. Both may use the batcher, and both may wait for a lock of the user's. Also, a library
that limits the time of a call may raise an *exception from outside* in a thread of the batcher, and may do so too late,
when the call is over.

So a thread that waits for a lock may wait for user code, and that may wait for a lock that the thread itself holds. The
rules below prevent this. They hold in this package, in ``futures`` and in `Callers`. Comments refer to them by number.

L1. No thread waits for a lock that another thread may hold while user code runs. The only exception is
    `check_for_fork`, in a forked child. Threads share data only through steps that are atomic: one call of a method of
    a built-in list or dict (such as `append`, `pop`, `setdefault`), one assignment to an item, an attribute or a slice,
    or the deletion of one. Each is a single call in C that runs no user code, because the keys and values are compared
    by identity. The GIL makes it atomic. Without the GIL, each object has a lock of its own that does (PEP 703). Each
    use of that lock is a memory barrier, which L8 needs. But then `len` and reading one item of a list take no lock,
    and may see the middle of an assignment to a slice. Reading a slice takes the lock.
L2. Only one thread wins a race: the one that removes something. It removes a job from `JobQueue.waiting` to cancel it,
    to let it expire or to dispatch it, `JobFuture._unsettled` to settle it, and `Engine._unclaimed` to start or end the
    threads. The *lead* is a lock that threads try to acquire and never wait for. Its holder owns the collector, takes
    items out of each `Inbox`, and closes groups in the ledger.
L3. Python checks for signals, and runs finalizers, only when a call ends, when a function begins and at a jump back.
    (Up to Python 3.11, finalizers also run where a container is created. Python 3.10 also checks for signals where a
    condition makes it jump.) So a thread can't be interrupted between the removal that wins a race and the statements
    after it, up to the end of the next call. Code that catches the error of a built-in function checks its text,
    because a signal handler may raise an error of the same type when the call ends.
L4. The same is true from the point where an exception is raised to the end of the first call in its handler. (Not on
    Python 3.10, which also checks for signals when it enters the handler. There, an exception from a signal handler at
    just that moment can keep a thread from cleaning up.)
L5. To find out whether it holds the lead or the lock of a condition, a thread asks the lock and does not rely on a
    variable, because an exception may come just when the lock is acquired or released.
L6. A container that other threads may change is copied before it is iterated over.
L7. A thread that settles or cancels never blocks on the ``_condition`` of a future. The thread that holds it may have
    been interrupted, and may never release it.
L8. A thread that may have to wait says so first, and then checks whether it has to. A thread that changes something
    changes it first, and then looks for waiters. So at least one of them sees the other. The same order decides between
    a job that is added and a queue that is closed, between news and a leader that resigns, and between an outcome and a
    callback that is added. A waiter is removed in a ``finally``.
L9. A ``while`` loop with a condition has a function of its own, without ``with`` or ``try``. The same holds for a
    comprehension with an ``if``, which is a loop too since Python 3.12. On CPython 3.12 and 3.13, an exception that
    comes just when such a loop repeats bypasses the ``with`` and ``try`` of the same function
    (https://github.com/python/cpython/issues/130279).
L10. An event loop may be blocked, stopped or closed at any time, without notice. So neither a thread nor another loop may
    depend on a coroutine to go on. A coroutine that waits for one bound holds no space in another, and a thread that
    wakes a coroutine also wakes the next waiter. In a line that has an order, a coroutine may be first. If there is space
    for its job and it does not enter within a second, its loop leaves the line, and joins it again when it runs.
"""
