"""Packages that only some of the tests need. The extra ``test-all`` installs them."""

import importlib.util
import os

import pytest


def is_missing(module: str) -> bool:
    """Return whether *module* is not installed, and tests that need it are to be skipped.

    Nothing is to be skipped if the environment variable ``TEST_ALL`` is set, as in ``.ci/run``. The import fails then.
    """
    return "TEST_ALL" not in os.environ and importlib.util.find_spec(module) is None


def needs(*modules: str) -> None:
    """Skip the test, or the file that calls this, if one of *modules* is not installed."""
    __tracebackhide__ = True  # so that pytest names the place of the call
    for module in filter(is_missing, modules):
        pytest.skip(f"{module} is not installed: use the extra `test-all`", allow_module_level=True)
