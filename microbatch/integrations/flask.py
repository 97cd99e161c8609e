"""A batcher for each Flask application that wants one: the extra ``flask``.

>>> from flask import Flask, current_app, request
>>> from microbatch import Natural, Size
>>> def insert_many(names):
...     current_app.logger.info("inserting %d", len(names))     # in the context of the application
...     return [f"id of {name}" for name in names]
>>> inserts = FlaskBatcher(insert_many, Size(100) | Natural(), name="inserts")

>>> app = Flask("shop")
>>> inserts.init_app(app)
>>> @app.post("/people")
... def add():
...     return inserts.submit(request.form["name"], timeout=1).result(timeout=5).value

>>> app.test_client().post("/people", data={"name": "Ada"}).text
'id of Ada'
>>> with app.app_context():
...     inserts.batcher.shutdown()
True
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from flask import Flask, current_app

from microbatch import DEFAULT_POLICY, Batcher, BatchingPolicy, JobFuture
from microbatch.processors import within

__all__ = ["FlaskBatcher"]

Job = TypeVar("Job")
Value = TypeVar("Value")


class FlaskBatcher(Generic[Job, Value]):
    """A `Batcher` in each application that it is initialised for. Its processor runs in that application's context.

    So functions registered by ``teardown_appcontext``, which give database sessions back, are called after each batch. The
    threads of a batcher, once started, keep its application alive: a test that makes one shuts its batcher down.

    Args:
        processor: as for `Batcher`.
        policy: as for `Batcher`.
        app: to be initialised at once.
        options: the other arguments of `Batcher`.
    """

    def __init__(
        self,
        processor: Callable[[list[Job]], Any],
        policy: BatchingPolicy[Any] = DEFAULT_POLICY,
        *,
        app: Flask | None = None,
        **options: Any,
    ) -> None:
        self._processor: Callable[[Any], Any] = processor
        self._options: dict[str, Any] = {**options, "policy": policy}
        # Which complains where it is written, and not when an application is made.
        Batcher(self._processor, **self._options)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, **options: Any) -> None:
        """Make a batcher for *app*, with *options* instead of those given before: ``policy=Size(1)`` in tests, say."""
        processor = within(self._processor, app.app_context)
        app.extensions.setdefault("microbatch", {})[self] = Batcher(processor, **{**self._options, **options})

    @property
    def batcher(self) -> "Batcher[Job, Value]":
        """The batcher of the current application.

        Raises:
            RuntimeError: there is no current application, or it was not initialised.
        """
        try:
            batcher: Batcher[Job, Value] = current_app.extensions["microbatch"][self]
        except KeyError:
            raise RuntimeError(f"init_app() was not called for {current_app.name!r}") from None
        return batcher

    def submit(self, job: Job, **options: Any) -> "JobFuture[Value]":
        """See `Batcher.submit`, of the batcher of the current application."""
        return self.batcher.submit(job, **options)
