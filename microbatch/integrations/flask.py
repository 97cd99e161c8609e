"""A Flask extension that gives each application its own batcher. Needs the extra ``flask``.

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
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flask import Flask, current_app

from microbatch import DEFAULT_POLICY, Batcher, BatchingPolicy, JobFuture
from microbatch.batcher import BatcherOptions
from microbatch.processors import within

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FlaskBatcher"]

Job = TypeVar("Job")
Value = TypeVar("Value")


class _AppOptions(BatcherOptions, total=False):
    """The options of `FlaskBatcher.init_app`."""

    policy: BatchingPolicy[Any]


class FlaskBatcher(Generic[Job, Value]):
    """A Flask extension with one `Batcher` for each application. The processor runs in the context of the application.

    After each batch, Flask calls the functions that are registered with ``teardown_appcontext``, which usually return
    database sessions to their pool.

    Once a batcher has started its threads, these keep the application alive. So a test that creates an application
    should shut down its batcher.

    Args:
        processor: As for `Batcher`.
        policy: As for `Batcher`.
        app: An application to initialize. None to call `init_app` later.
        options: The other arguments of `Batcher`.
    """

    def __init__(
        self,
        processor: Callable[[list[Job]], Any],
        policy: BatchingPolicy[Any] = DEFAULT_POLICY,
        *,
        app: Flask | None = None,
        **options: "Unpack[BatcherOptions]",
    ) -> None:
        Batcher(processor, policy, **options)  # checks the arguments here, not only when an application is initialized
        self._processor = processor
        self._options: dict[str, Any] = {**options, "policy": policy}
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, **options: "Unpack[_AppOptions]") -> None:
        """Create a batcher for *app*. The *options* override earlier ones, for example ``policy=Size(1)`` in a test."""
        processor = within(self._processor, app.app_context)
        app.extensions.setdefault("microbatch", {})[self] = Batcher(processor, **{**self._options, **options})

    @property
    def batcher(self) -> "Batcher[Job, Value]":
        """The batcher of the current application.

        Raises:
            RuntimeError: There is no current application, or `init_app` was not called for it.
        """
        try:
            batcher: Batcher[Job, Value] = current_app.extensions["microbatch"][self]
        except KeyError:
            raise RuntimeError(
                f"init_app() was not called for {current_app.name!r}: call it when the application is created"
            ) from None
        return batcher

    def submit(self, job: Job, *, timeout: float | None = None, expires_in: float | None = None) -> "JobFuture[Value]":
        """Submit a job to the batcher of the current application: see `Batcher.submit`."""
        return self.batcher.submit(job, timeout=timeout, expires_in=expires_in)
