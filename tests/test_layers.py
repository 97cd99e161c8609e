"""The layers of the package: each imports only from those below it. ``docs/map.rst`` explains what each is for."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import microbatch

PACKAGE = Path(microbatch.__file__).parent

INTEGRATIONS = {
    "integrations.dask": {"distributed"},
    "integrations.django": {"django"},
    "integrations.flask": {"flask"},
    "integrations.logging": set[str](),
    "integrations.opentelemetry": {"opentelemetry"},
    "integrations.prometheus": {"prometheus_client"},
    "integrations.pytest.pytest_microbatch": {"pytest"},
    "integrations.tqdm": {"tqdm"},
}
"""The integrations, and the packages that each needs."""

LAYERS = [
    {"_basics", "errors"},
    {"results", "processors", "testing"},
    {"futures", "policies"},
    {"_forming", "config", "listeners"},
    {"_engine", "simulation"},
    {"batcher", "traces"},
    {"coalescer", "decorator"},
    {"__init__", "aio"},
    {"integrations"},
    {"apps", "cli"},
    {"__main__"},
]
"""The layers from the bottom up, with the modules and packages in each."""

LAYER = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
MODULES = sorted(FILES)


@lru_cache(maxsize=None)
def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imports(module: str) -> set[str]:
    path = FILES[module].relative_to(PACKAGE.parent)
    return set(imports_of(parsed(module), ".".join(path.parent.parts)))


def imports_of(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the modules of microbatch that the code of a module in *package* imports, absolutely or relatively."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names = [(origin, alias.name) for alias in node.names]
        else:
            continue
        for origin, name in names:
            top, _, module = origin.partition(".")
            if top == "microbatch":
                submodule = f"{module}.{name}".strip(".")
                yield submodule if submodule in FILES else module or "__init__"


def test_absolute_and_relative_imports_are_found() -> None:
    code = """
    import ast, microbatch
    import microbatch.cli.run
    from microbatch import Batcher, traces
    from microbatch._engine import queue
    from os import path
    def later():
        from . import ledger, Engine
        from .runner import Runner
        from .. import batcher
        from ..futures import job_future
    """
    assert [
        "__init__",
        "cli.run",
        "__init__",
        "traces",
        "_engine.queue",
        "_engine.ledger",
        "_engine",
        "_engine.runner",
        "batcher",
        "futures.job_future",
    ] == list(imports_of(ast.parse(textwrap.dedent(code)), "microbatch._engine"))


def package(module: str) -> str:
    return module.partition(".")[0]


def test_every_package_has_a_layer() -> None:
    assert set(LAYER) == set(map(package, MODULES))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_package_and_from_the_layers_below(module: str) -> None:
    others = {package(name) for name in imports(module)} - {package(module)}
    assert [] == [name for name in others if LAYER[name] >= LAYER[package(module)]]


def test_there_are_no_circular_imports() -> None:
    graph = {module: imports(module) for module in MODULES}
    assert sorted(TopologicalSorter(graph).static_order()) == MODULES  # a cycle would raise CycleError


@pytest.mark.parametrize("module", MODULES)
def test_top_level_imports_are_from_the_standard_library_except_in_integrations(module: str) -> None:
    tree = parsed(module)
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
    others = {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "microbatch"}
    assert INTEGRATIONS.get(module, set()) == others


COSTLY = {"ast", "contextvars", "dataclasses", "inspect", "numbers", "pickle"}
"""Modules of the standard library that only some programs need, and that take long to import."""


def test_importing_the_package_loads_no_costly_module() -> None:
    code = "import concurrent.futures.thread, sys; before = {*sys.modules}; import microbatch; print(*{*sys.modules} - before)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert set() == loaded & COSTLY
    own = {name.partition(".")[2] for name in loaded if name.startswith("microbatch.")}
    assert set() == {module for module in own if package(module) in {"cli", "integrations", "simulation", "testing"}}


@pytest.mark.parametrize("module", INTEGRATIONS)
def test_an_integration_imports_only_public_modules(module: str) -> None:
    public = {"__init__", "batcher", "integrations.django", "policies.text", "processors", "testing"}
    assert imports(module) <= public


@pytest.mark.parametrize(
    "modules, word",
    [
        ({"_basics.clock", "cli.demo"}, "import time"),
        ({"_basics.clock"}, ".monotonic"),
        ({"cli.demo"}, "perf_counter"),
        ({"_engine.engine", "aio", "cli.run"}, "Thread("),
        ({"futures.job_future"}, "futures._base"),
    ],
)
def test_each_confined_name_appears_only_in_its_modules(modules: "set[str]", word: str) -> None:
    code = {module: ast.unparse(parsed(module)) for module in MODULES}
    assert modules == {module for module in MODULES if word in code[module]}


@pytest.mark.parametrize("module", ["_engine.queue", "_engine.ledger", "futures.job_future"])
def test_no_function_that_writes_the_state_of_a_job_looks_up_a_member_of_an_enum(module: str) -> None:
    """Up to Python 3.10, that is a call, between a look and the write that depends on it: rule L3."""
    functions = [node for node in ast.walk(parsed(module)) if isinstance(node, ast.FunctionDef)]
    nodes = [node for function in functions for statement in function.body for node in ast.walk(statement)]
    assert [] == [
        node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "JobState"
    ]
