"""The rooms of the package: a room imports only from the rooms below it. ``docs/map.rst`` says what each is for."""

import ast
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
    "integrations.tqdm": {"tqdm"},
}
"""And what each of them needs."""

FLOORS = [
    {"errors", "results", "_basics"},
    {"futures", "policies", "processors", "testing"},
    {"_forming", "config", "listeners"},
    {"_engine", "simulation"},
    {"batcher", "traces"},
    {"decorator"},
    {"__init__"},
    {"integrations"},
    {"cli"},
    {"__main__"},
]
"""The rooms, from the ground up: modules, and packages, which are one room each."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
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


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_a_floor() -> None:
    assert set(FLOOR) == set(map(room, MODULES))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_room_and_from_the_floors_below(module: str) -> None:
    others = {room(name) for name in imports(module)} - {room(module)}
    assert [] == [name for name in others if FLOOR[name] >= FLOOR[room(module)]]


def test_within_a_room_the_modules_import_each_other_in_one_direction() -> None:
    graph = {module: {name for name in imports(module) if name in FILES} for module in MODULES}
    assert sorted(TopologicalSorter(graph).static_order()) == MODULES  # a circle would raise CycleError


@pytest.mark.parametrize("module", MODULES)
def test_nothing_beyond_the_standard_library_is_imported_at_import_time(module: str) -> None:
    tree = parsed(module)
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    others = {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "microbatch"}
    assert INTEGRATIONS.get(module, set()) == others


@pytest.mark.parametrize("module", INTEGRATIONS)
def test_an_integration_needs_only_what_anybody_can_use(module: str) -> None:
    assert set(imports(module)) <= {"__init__", "processors"}


@pytest.mark.parametrize(
    "modules, word",
    [
        ({"cli.demo"}, "import time"),
        ({"_basics.clock"}, "'monotonic'"),
        ({"cli.demo"}, "perf_counter"),
        ({"_engine.engine", "cli.run"}, "Thread("),
        ({"futures.job_future"}, "._state"),
        ({"futures.job_future"}, "futures._base"),
    ],
)
def test_one_file_knows_what_it_is_about(modules: "set[str]", word: str) -> None:
    code = {module: ast.unparse(parsed(module)) for module in MODULES}
    assert {module for module in MODULES if word in code[module]} <= modules
