"""The fixtures for users' tests, in runs of pytest with a project of their own.

The runs work whether or not this package is installed: they get the module of the fixtures from this folder.
"""

import gc
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from microbatch import Batcher
from microbatch.batcher import left_open, next_number
from microbatch.integrations.pytest import pytest_microbatch

pytest_plugins = ["pytester"]

MODULE = Path(pytest_microbatch.__file__)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def without_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs load no plugins of other packages, which would take most of the time."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def run(pytester: pytest.Pytester) -> pytest.RunResult:
    """Run the tests of the project in this process, with warnings as errors."""
    without = "-pno:cacheprovider", "-pno:unraisableexception"  # the latter collects all garbage several times
    return pytester.runpytest_inprocess(*without, "-Werror", plugins=[pytest_microbatch])


def test_the_fixtures_are_a_clock_that_shows_0_and_a_processor_that_returns_the_jobs(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        from microbatch import Batcher, Interval

        def test_it(manual_clock, recording_processor):
            with Batcher(recording_processor, Interval(60), clock=manual_clock) as batcher:
                future = batcher.submit("job")
                assert 0 == manual_clock.now()
                manual_clock.advance(60)
                assert "job" == future.result(timeout=10).value
            assert [["job"]] == recording_processor.batches
        """)
    run(pytester).assert_outcomes(passed=1)


def test_a_processor_that_a_test_holds_is_released_at_its_end(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        from microbatch import Batcher

        def test_it(recording_processor):
            global batcher, processor
            batcher, processor = Batcher(recording_processor), recording_processor
            recording_processor.hold()
            batcher.submit("job")
            recording_processor.wait_for_batches(1)

        def teardown_module():
            ended = batcher.shutdown(timeout=10)
            processor.release()
            assert ended
        """)
    run(pytester).assert_outcomes(passed=1)


@pytest.mark.parametrize("place", ["conftest", "test_it"])
def test_a_fixture_of_the_user_wins_over_one_of_the_same_name(pytester: pytest.Pytester, place: str) -> None:
    fixtures = """
        import pytest

        @pytest.fixture
        def manual_clock():
            return "mine"

        @pytest.fixture
        def recording_processor():
            return "mine"

        @pytest.fixture
        def no_open_batchers():
            return "mine"
        """
    test = """
        def test_it(manual_clock, recording_processor, no_open_batchers):
            assert "mine" == manual_clock == recording_processor == no_open_batchers
        """
    if place == "conftest":
        pytester.makeconftest(fixtures)
        pytester.makepyfile(test)
    else:
        pytester.makepyfile(fixtures + test)
    run(pytester).assert_outcomes(passed=1)


OPEN = """
    from microbatch import Batcher

    batcher = None

    def test_it(no_open_batchers):
        global batcher
        batcher = Batcher(list, name="inserts")
        batcher.submit(1).result(timeout=10)

    def teardown_module():
        batcher.shutdown()
    """


def test_a_test_that_leaves_a_batcher_open_fails_and_the_message_names_it(pytester: pytest.Pytester) -> None:
    path = pytester.makepyfile(OPEN)
    result = run(pytester)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_it*",
            "the test left these batchers open (call shutdown(), or use a with statement):",
            f"  batcher 'inserts', created at {path}:7",
        ],
        consecutive=True,
    )


def test_a_test_that_does_not_ask_for_the_check_may_leave_a_batcher_open(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(OPEN.replace("no_open_batchers", ""))
    run(pytester).assert_outcomes(passed=1)


@pytest.mark.parametrize("way", ["mark", "setting", "autouse"])
def test_the_check_can_be_asked_for_once_for_many_tests(pytester: pytest.Pytester, way: str) -> None:
    module = OPEN.replace("no_open_batchers", "")
    if way == "mark":
        module = f"""
    import pytest

    pytestmark = pytest.mark.usefixtures("no_open_batchers")
    {module}"""
    elif way == "setting":
        pytester.makeini("[pytest]\nusefixtures = no_open_batchers")
    else:
        pytester.makeconftest("""
            import pytest

            @pytest.fixture(autouse=True)
            def check_batchers(no_open_batchers):
                pass
            """)
    pytester.makepyfile(module)
    run(pytester).assert_outcomes(passed=1, errors=1)


def test_the_check_finds_a_batcher_that_another_thread_created(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import threading
        from microbatch import Batcher

        kept = []

        def leave_open():
            kept.append(Batcher(list))
            kept[0].submit(1).result(timeout=10)

        def test_it(no_open_batchers):
            thread = threading.Thread(target=leave_open)
            thread.start()
            thread.join()

        def teardown_module():
            kept[0].shutdown()
        """)
    run(pytester).assert_outcomes(passed=1, errors=1)


def test_the_check_finds_a_batcher_that_was_collected_before_the_end_of_the_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest
        from microbatch import Batcher

        @pytest.mark.filterwarnings("ignore::ResourceWarning")
        def test_it(no_open_batchers):
            Batcher(list, name="collected").submit(1).result(timeout=10)
        """)
    result = run(pytester)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["  batcher 'collected', created at *:6"])


def test_the_check_finds_the_batcher_of_a_fixture_that_does_not_shut_it_down(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest
        from microbatch import Batcher

        kept = []

        @pytest.fixture
        def batcher():
            kept.append(Batcher(list))
            return kept[0]

        @pytest.mark.usefixtures("no_open_batchers")
        def test_it(batcher):
            batcher.submit(1).result(timeout=10)

        def teardown_module():
            kept[0].shutdown()
        """)
    run(pytester).assert_outcomes(passed=1, errors=1)


def test_the_check_accepts_batchers_that_are_older_or_never_started_or_shut_down(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest
        from microbatch import Batcher, batched

        pytestmark = pytest.mark.usefixtures("no_open_batchers")
        of_the_module = Batcher(list)
        decorated = batched()(list)
        kept = []

        @pytest.fixture(scope="module")
        def wide():
            with Batcher(list) as batcher:
                yield batcher

        @pytest.fixture
        def narrow():
            with Batcher(list) as batcher:
                yield batcher

        def test_that_starts_older_ones(wide):
            wide.submit(1).result(timeout=10)
            of_the_module.submit(1).result(timeout=10)
            decorated.submit(1).result(timeout=10)

        def test_that_starts_none():
            kept.append(Batcher(list))

        def test_with_a_fixture(narrow):
            narrow.submit(1).result(timeout=10)

        def test_that_shuts_down_without_waiting():
            kept.append(Batcher(list))
            kept[-1].submit(1)
            kept[-1].shutdown(wait=False)

        def teardown_module():
            of_the_module.shutdown()
            decorated.shutdown()
        """)
    run(pytester).assert_outcomes(passed=4)


def test_each_test_is_blamed_only_for_its_own_batchers(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(OPEN + "\n    def test_later(no_open_batchers): pass\n")
    result = run(pytester)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.no_fnmatch_line("*ERROR at teardown of test_later*")


def test_the_tests_on_the_page_about_testing_pass(pytester: pytest.Pytester) -> None:
    page = (ROOT / "docs" / "testing.rst").read_text(encoding="utf-8")
    blocks = re.findall(r"^\.\. code-block:: (\w+)\n\n((?:(?: {4}.*)?\n)+)", page, re.MULTILINE)
    (settings,) = [block for language, block in blocks if language == "toml"]
    tests = [block for language, block in blocks if "def test_" in block]
    pytester.makepyprojecttoml(settings)
    pytester.makepyfile(*tests)
    run(pytester).assert_outcomes(passed=len(tests))


def test_batchers_that_are_left_open_are_described_in_the_order_of_their_creation() -> None:
    since = next_number()
    collected, shut_down, left = (Batcher[int, int](list, name=name) for name in ("collected", "shut down", "left"))
    for batcher in (left, shut_down, collected):
        batcher.submit(1).result(timeout=10)
    shut_down.shutdown()
    with pytest.warns(ResourceWarning, match="batcher 'collected', created at .*, was never shut down"):
        del batcher, collected
        gc.collect()
    assert ["batcher 'collected'", "batcher 'left'"] == [each.split(",")[0] for each in left_open(since)]
    left.shutdown()
    assert ["batcher 'collected'"] == [each.split(",")[0] for each in left_open(since)]


def setting(section: str, name: str) -> list[str]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config[section][name].strip().splitlines()


def test_the_module_of_the_entry_point_is_installed_at_the_top_level() -> None:
    """In the package, it would import all of it at each start of pytest."""
    assert ["microbatch = pytest_microbatch"] == setting("options.entry_points", "pytest11")
    assert [MODULE.stem] == setting("options", "py_modules")
    assert f"= {MODULE.parent.relative_to(ROOT).as_posix()}" in setting("options", "package_dir")
    assert {MODULE.name, "__init__.py"} == {path.name for path in MODULE.parent.glob("*.py")}  # it may be on the path


def run_installed(folder: Path, *command: str) -> str:
    """Run Python in *folder* as if this package was installed, with warnings as errors, and return what it prints."""
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: microbatch\nVersion: 0\n",
        "RECORD": "microbatch/__init__.py,,\npytest_microbatch.py,,\n",
        "entry_points.txt": "\n".join(["[pytest11]", *setting("options.entry_points", "pytest11")]),
    }
    metadata = folder / "installed" / "microbatch-0.dist-info"
    metadata.mkdir(parents=True)
    for name, text in files.items():
        (metadata / name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [metadata.parent, MODULE.parent, ROOT]))}
    del environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=25,
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("option, imported", [("--fixtures", False), ("-k=plain", False), ("-k=clock", True)])
def test_pytest_finds_the_fixtures_and_imports_microbatch_only_for_a_test_that_uses_one(
    option: str, imported: bool, tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text(
        "import sys\ndef pytest_unconfigure(): print('imported:', 'microbatch' in sys.modules)\n", encoding="utf-8"
    )
    (tmp_path / "test_it.py").write_text(
        "def test_plain(): pass\ndef test_clock(manual_clock): assert not manual_clock.now()\n", encoding="utf-8"
    )
    out = run_installed(tmp_path, "-m", "pytest", option)
    assert f"imported: {imported}" in out
    assert option != "--fixtures" or "no_open_batchers -- " in out


@pytest.mark.slow
def test_a_program_that_imports_microbatch_may_run_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(no_open_batchers): pass\n", encoding="utf-8")
    assert "1 passed" in run_installed(tmp_path, "-c", "import microbatch, pytest; pytest.main(['-W', 'error'])")
