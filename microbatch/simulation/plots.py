"""Draws the results of simulations with matplotlib. The same results give the same file, without a date or a path."""

import heapq
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

__all__ = ["Point", "check_plot", "draw_front", "draw_loads", "draw_run", "line_style", "percentile"]

_SLICE = 50
"""The minimum number of jobs in a slice of time. A load and a latency are computed for each slice."""

_SHOWN = 150
"""The maximum number of batches in a timeline. More would look like one black bar."""

_MARKERS = "os^DvPX<>*"


class Point(NamedTuple):
    """The results of a policy under one load."""

    load: float
    """Jobs per second."""
    p50: float
    """The median latency, in seconds."""
    p99: float
    """The 99th percentile of the latency, in seconds."""
    calls: float
    """Calls of the processor per 1,000 jobs."""


def check_plot(path: str) -> None:
    """Check that a plot can be written to *path*, before it is computed.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file can't be written.
        ValueError: The extension of the file is not that of a format that matplotlib can write.
    """
    from matplotlib import backend_bases

    known, ending = backend_bases.FigureCanvasBase.get_supported_filetypes(), os.path.splitext(path)[1][1:].lower()
    if ending not in {"", *known}:
        endings = ", ".join(f".{each}" for each in sorted(known))
        raise ValueError(f"a plot file must end with one of {endings}, got {path!r}")
    existed = os.path.lexists(path)
    open(path, "ab").close()
    if not existed:
        os.remove(path)


def draw_run(path: Any, jobs: Sequence[tuple[float, float]], runs: Sequence[tuple[float, float, int, str]]) -> None:
    """Draw the latency over the load, and a timeline of the batches.

    Args:
        path: The file to write. Its extension determines the format.
        jobs: For each job, when it was submitted, and its latency.
        runs: For each batch, its start, its end, its size and its trigger, in the order of the starts.
    """
    with _figure(path, (8, 6), 2) as (_, (over_load, timeline)):
        _draw_latency(over_load, _points(sorted(jobs)))
        at = max(0, (len(runs) - _SHOWN) // 2)
        _draw_timeline(timeline, runs[at : at + _SHOWN])


def draw_loads(path: Any, curves: Mapping[str, Sequence[Point]]) -> None:
    """Draw the latency, and the number of calls of the processor, over the load, with one curve per policy.

    The plot is narrow and its legend is above the curves. So the letters stay readable on the screen of a phone, and the
    legend covers no curve.
    """
    with _figure(path, (5.5, 6 + 0.2 * len(curves)), 3) as (figure, parts):
        for number, (name, points) in enumerate(curves.items()):
            loads, style = [point.load for point in points], line_style(number, len(curves))
            values = zip(*((point.p50 * 1e3, point.p99 * 1e3, point.calls) for point in points))
            for axes, those in zip(parts, values):
                axes.plot(loads, those, label=name, **style)
        titles = (
            "latency in ms: half of the jobs took at most this",
            "latency in ms: 99 % of the jobs took at most this",
            "calls of the processor per 1,000 jobs",
        )
        for axes, title in zip(parts, titles):
            _label(axes, title, "", "")
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_major_formatter("{x:,g}")
        parts[-1].set_xlabel("jobs per second")
        figure.legend(*parts[0].get_legend_handles_labels(), loc="outside upper left", frameon=False)


def draw_front(
    path: Any,
    tried: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    named: Mapping[str, tuple[float, float]],
    target: float,
) -> None:
    """Draw policies by their p99, in seconds, and their calls per 1,000 jobs.

    Args:
        path: The file to write. Its extension determines the format.
        tried: The figures of all policies.
        front: The figures of those that no other one beats, the lowest p99 first. A line connects them.
        named: The figures of those that get a marker and an entry in the legend of their own.
        target: The p99 to reach, in seconds. A vertical line shows it.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
        shown = [point for point in points if math.isfinite(point[0])]
        return [p99 * 1e3 for p99, _ in shown], [calls for _, calls in shown]

    with _figure(path, (5.5, 4.2 + 0.2 * len(named)), 1) as (figure, axes):
        axes.axvline(target * 1e3, color="0.6", linestyle="--", linewidth=1, label=f"p99 of {target * 1e3:,.4g} ms")
        axes.plot(*columns(tried), "o", color="0.75", markersize=5, label=f"one of {len(tried)} policies")
        axes.plot(
            *columns(front), drawstyle="steps-post", marker="o", markersize=5, color="C0", label="no policy is better"
        )
        for number, (name, point) in enumerate(named.items(), 1):
            look = {"marker": _MARKERS[number], "markersize": 9, "markeredgecolor": "white", "linestyle": "none"}
            axes.plot(*columns([point]), color=f"C{number}", label=name, **look)
        _label(axes, "calls of the processor per 1,000 jobs", "latency in ms: 99 % of the jobs took at most this", "")
        for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside upper left", frameon=False)


def line_style(number: int, lines: int) -> dict[str, Any]:
    """Return matplotlib's arguments for one of several lines, of which some may coincide.

    Each line is thinner than the one before, which it may cover. The markers of the lines differ, and are at different
    points.
    """
    step = min(lines, 4)
    return {
        "color": f"C{number % 10}",
        "linewidth": 1.2 + 2.4 * (lines - 1 - number) / max(lines - 1, 1),
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 7,
        "markeredgecolor": "white",
        "markevery": (number % step, step),
    }


def _points(jobs: Sequence[tuple[float, float]]) -> list[Point]:
    """Return the latencies over the load, the lowest load first.

    The time is cut into slices with the same number of jobs. The slices are sorted by their load, and each group of ten
    makes one point.
    """
    size = max(_SLICE, len(jobs) // 200)
    slices = []
    for at in range(0, len(jobs) - size, size):
        time = jobs[at + size][0] - jobs[at][0]
        if time > 0:
            slices.append((size / time, [latency for _, latency in jobs[at : at + size]]))
    slices.sort(key=lambda each: each[0])
    points = []
    for at in range(0, len(slices), 10):
        group = slices[at : at + 10]
        latencies = sorted(latency for _, those in group for latency in those)
        load = sum(load for load, _ in group) / len(group)
        points.append(Point(load, percentile(latencies, 0.5), percentile(latencies, 0.99), 0.0))
    return points


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the lowest of the sorted values that is not exceeded by a *share* of them, or NaN if there are none."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan


def _draw_latency(axes: Any, points: Sequence[Point]) -> None:
    loads = [point.load for point in points]
    axes.plot(loads, [point.p50 * 1e3 for point in points], marker=".", label="50 % of the jobs")
    axes.plot(loads, [point.p99 * 1e3 for point in points], marker=".", label="99 %")
    _label(axes, "latency, in slices of time by their load", "jobs per second", "ms")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)


def _draw_timeline(axes: Any, runs: Sequence[tuple[float, float, int, str]]) -> None:
    colors: dict[str, str] = {}
    largest = max(size for _, _, size, _ in runs)
    for worker, (started, ended, size, trigger) in zip(_workers(runs), runs):
        known = trigger in colors
        color = colors.setdefault(trigger, f"C{len(colors) % 10}")
        look = {"align": "edge", "color": color, "edgecolor": "white", "linewidth": 0.3}
        label = None if known else trigger
        axes.bar(started, 0.9 * size / largest, width=ended - started, bottom=worker, label=label, **look)
    _label(axes, f"batches; the highest has {largest:,} jobs", "s", "worker")
    axes.set_yticks([])
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _workers(runs: Sequence[tuple[float, float, int, str]]) -> Iterator[int]:
    """Yield a worker for each batch: the free worker with the lowest number."""
    free, busy = list[int](), list[tuple[float, int]]()
    for started, ended, _, _ in runs:
        while busy and busy[0][0] <= started:
            heapq.heappush(free, heapq.heappop(busy)[1])
        worker = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (ended, worker))
        yield worker


def _label(axes: Any, title: str, across: str, up: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def _figure(path: Any, inches: tuple[float, float], rows: int) -> Iterator[tuple[Any, Any]]:
    """Yield a new figure with its axes, and write the figure to *path* at the end."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "microbatch", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)  # a default; savefig() replaces it if the format needs another canvas
        yield figure, figure.subplots(rows)
        figure.savefig(path, metadata={"Date": None, "Creator": None} if str(path).endswith(".svg") else None)
