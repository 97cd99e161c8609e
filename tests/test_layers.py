"""The layers of the package: each imports only from those below it. ``docs/map.rst`` explains what each is for."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from graphlib import TopologicalSorter
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
    {"decorator"},
    {"__init__"},
    {"integrations"},
    {"cli"},
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


def imports(module: str) -> Iterator[str]:
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "microbatch":
            yield node.module.partition(".")[2] or "__init__"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("microbatch"))


def package(module: str) -> str:
    return module.partition(".")[0]


def test_every_package_has_a_layer() -> None:
    assert set(LAYER) == set(map(package, MODULES))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_package_and_from_the_layers_below(module: str) -> None:
    others = {package(name) for name in imports(module)} - {package(module)}
    assert [] == [name for name in others if LAYER[name] >= LAYER[package(module)]]


def test_there_are_no_circular_imports() -> None:
    graph = {module: {name for name in imports(module) if name in FILES} for module in MODULES}
    assert sorted(TopologicalSorter(graph).static_order()) == MODULES  # a cycle would raise CycleError


@pytest.mark.parametrize("module", MODULES)
def test_top_level_imports_are_from_the_standard_library_except_in_integrations(module: str) -> None:
    tree = parsed(module)
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
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
    assert set(imports(module)) <= {"__init__", "batcher", "policies.text", "processors", "testing"}


@pytest.mark.parametrize(
    "modules, word",
    [
        ({"cli.demo"}, "import time"),
        ({"_basics.clock"}, ".monotonic"),
        ({"cli.demo"}, "perf_counter"),
        ({"_engine.engine", "cli.run"}, "Thread("),
        ({"futures.job_future"}, "futures._base"),
    ],
)
def test_each_confined_name_appears_only_in_its_modules(modules: "set[str]", word: str) -> None:
    code = {module: ast.unparse(parsed(module)) for module in MODULES}
    assert modules == {module for module in MODULES if word in code[module]}


@pytest.mark.parametrize("module", ["_engine.queue", "_engine.ledger", "futures.job_future"])
def test_no_function_that_writes_the_state_of_a_job_looks_up_a_member_of_an_enum(module: str) -> None:
    """Up to Python 3.10, that is a call, between a look and the write that depends on it: rule R5."""
    functions = [node for node in ast.walk(parsed(module)) if isinstance(node, ast.FunctionDef)]
    nodes = [node for function in functions for statement in function.body for node in ast.walk(statement)]
    assert [] == [
        node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "JobState"
    ]
