"""The rooms of the package: imports go only downward, never sideways."""

import ast
from pathlib import Path
from typing import Iterator

import pytest

import microbatch

PACKAGE = Path(microbatch.__file__).parent

LAYERS = [
    {"errors", "_bells", "_clock", "_arguments", "_log", "_opening", "_plots"},
    {"_callers", "_lanes", "_process", "_results", "_returned"},
    {"_futures", "_policy"},
    {"_plain_future", "_queue", "policies"},
    {"_ledger", "_collector", "config", "processors"},
    {"_settle", "listeners"},
    {"_worker"},
    {"batcher"},
    {"decorator", "simulation", "testing"},
    {"traces"},
    {"__init__"},
    {"_demo", "_jsonlines", "_simulate", "_words"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
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
    import sys

    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "microbatch"}


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
    code = {
        module: ast.unparse(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))) for module in MODULES
    }
    assert {module for module in MODULES if word in code[module]} <= modules
