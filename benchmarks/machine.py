"""Describes the machine and the versions that the figures belong to, without host names or paths."""

import os
import platform
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.contenders import Contender


def python() -> str:
    """Return the version of Python, such as ``3.13``, or ``3.13t`` for a build without the GIL."""
    return f"{sys.version_info.major}.{sys.version_info.minor}" + (
        "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    )


def machine() -> dict[str, str]:
    """Return facts about this machine and this Python."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "CPU": f"{_cpu_model()}, {usable} cores usable",
        "OS": f"{platform.system()} {platform.release()} {platform.machine()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}, {platform.python_compiler()}",
    }
    if hasattr(os, "getloadavg"):
        facts["load average before"] = f"{os.getloadavg()[0]:.1f}"
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def versions(contenders: Iterable[type[Contender]]) -> dict[str, str]:
    """Return the version of each package that is measured."""
    return {name: _version(name) for name in sorted({one.distribution for one in contenders if one.distribution})}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
