"""The rooms of the package: imports go only downward, never sideways."""

import ast
import sys
from pathlib import Path
from typing import Iterator

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

LAYERS = [
    {"errors", "_bells", "_clock", "_arguments", "_log", "_plots"},
    {"_opening", "_callers", "_exceptions", "_lanes", "_process", "_results", "_returned", "_sending"},
    {"_futures", "_policy"},
    {"_queue", "policies"},
    {"_ledger", "_collector", "config", "processors"},
    {"_settle", "listeners"},
    {"_worker"},
    {"batcher"},
    {"decorator", "simulation", "testing"},
    {"traces"},
    {"__init__"},
    {"integrations", *INTEGRATIONS},
    {"_progress"},
    {"_demo", "_jsonlines", "_simulate", "_words"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
MODULES = sorted(FILES)


def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "microbatch":
            yield node.module.partition(".")[2] or "__init__"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("microbatch"))


def test_every_module_has_a_layer() -> None:
    assert sorted(LEVEL) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_layers_below_it(module: str) -> None:
    assert [] == [name for name in imports(module) if LEVEL[name] >= LEVEL[module]]


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
        ({"_demo"}, "import time"),
        ({"_clock"}, "'monotonic'"),
        ({"_demo"}, "perf_counter"),
        ({"_worker", "_jsonlines"}, "Thread("),
        ({"_futures"}, "._state"),
        ({"_futures"}, "futures._base"),
    ],
)
def test_one_file_knows_what_it_is_about(modules: "set[str]", word: str) -> None:
    code = {module: ast.unparse(parsed(module)) for module in MODULES}
    assert {module for module in MODULES if word in code[module]} <= modules
