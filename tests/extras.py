"""Packages that only some of the tests need. The extra ``test-all`` installs them."""

import importlib.util
import os

import pytest


def is_missing(module: str) -> bool:
    """Return whether *module* is not installed and the tests that need it are to be skipped.

    If the environment variable ``TEST_ALL`` is set, as in ``.ci/run``, no test is skipped: the import fails instead.
    """
    return "TEST_ALL" not in os.environ and importlib.util.find_spec(module) is None


def needs(*modules: str) -> None:
    """Skip the calling test or file if one of *modules* is not installed."""
    __tracebackhide__ = True  # makes pytest report the line of the call
    for module in filter(is_missing, modules):
        pytest.skip(f"{module} is not installed: use the extra `test-all`", allow_module_level=True)
