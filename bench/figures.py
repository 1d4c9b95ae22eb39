"""The report's plots, as SVG to put into a page: bars, speed-up against fill, roofs, scaling."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from .results import Run, Scaling
from .standings import OURS, Standing, fill, ordered, standings

STRONG = "#d1490c"
MUTED = ("#7f94b5", "#9dbb94", "#b59fc4", "#c9b37e", "#84b8b3", "#c99aa0", "#a7a7a7", "#6f8f78",
         "#8a7ca8", "#b98d6a", "#5f8aa0", "#c2c492")  # fmt: skip
BY_PRECISION = {
    "fp32": "#1d4e89",
    "bf16": "#8f3b8a",
    "fp16": "#3d7a3a",
    "int8": "#8a6d1b",
    "fp8": "#7a3d3d",
}
BY_KERNEL = (STRONG, "#1d4e89", "#3d7a3a", "#7a3b8f", "#b8901c", "#0f7f83", "#8c2f39", "#4a4a8a")
REFERENCE = "reference"
MARKERS = "osD^vP*Xh<>p"
INK = "#1c1c1c"
WIDTH = 11.4  # inches, the width of the page
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",  # the page looks alike where the font is not there
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a8a8a",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def colors(names: Iterable[str]) -> dict[str, str]:
    """bert_fast always the same strong colour, the others muted ones in the order of the names."""
    others = sorted(set(names) - {OURS})
    return {OURS: STRONG, **{n: MUTED[i % len(MUTED)] for i, n in enumerate(others)}}


def svg(name: str, draw: Callable[[Figure], None], height: float) -> str:
    """An <svg> element of what `draw` draws; its ids start with `name`, as a page has many."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        no = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=no)
    text = out.getvalue()
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    return re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", text, count=2)


def bars(name: str, run: Run, model: str, precision: str) -> str:
    """Real tokens/s of every contender on every workload; as texts arrive, and sorted."""
    entries = [e for e in run.models if (e.model, e.precision) == (model, precision)]
    timed = {e.contender for e in entries if e.tokens_per_s}
    contenders = sorted(timed, key=lambda c: (c != OURS, c))
    color = colors(e.contender for e in run.models)
    orders = [o for o in ("arrival", "sorted") if any(e.order == o for e in entries)]
    places = {o: list(dict.fromkeys(e.workload for e in entries if e.order == o)) for o in orders}
    found = {s.ours.key: s for s in standings(run)}

    def panel(axes: Axes, order: str) -> None:
        width = 0.82 / max(len(contenders), 1)
        for i, workload in enumerate(places[order]):
            here = {e.contender: e for e in entries if (e.workload, e.order) == (workload, order)}
            for j, contender in enumerate(contenders):
                x = i - 0.41 + (j + 0.5) * width
                rate = here[contender].tokens_per_s if contender in here else None
                if rate:
                    axes.bar(x, rate, width * 0.94, color=color[contender])
                else:
                    axes.plot(
                        x, 0, "x", color=color[contender], ms=6, mew=1.8, clip_on=False, zorder=5
                    )
            top = max((e.tokens_per_s or 0 for e in here.values()), default=0)
            axes.annotate(
                _times(found.get((model, workload, order, OURS, precision))),
                (i, top),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                fontweight="bold",
            )
        axes.set_xticks(range(len(places[order])), places[order])
        axes.set_xlim(-0.6, len(places[order]) - 0.4)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_title("as texts arrive" if order == "arrival" else "sorted by length")

    def draw(figure: Figure) -> None:
        ratios = [max(len(places[o]), 2) for o in orders]
        grid = figure.subplots(1, len(orders), sharey=True, squeeze=False, width_ratios=ratios)
        for axes, order in zip(grid[0], orders, strict=True):
            panel(axes, order)
        grid[0][0].set_ylabel("real tokens/s")
        _legend(figure, [Patch(color=color[c], label=c) for c in contenders])

    return svg(name, draw, 3.9)


def _times(standing: Standing | None) -> str:
    if standing and standing.peer and standing.peer.ratio:
        return f"{standing.peer.ratio.value:.2f}x"
    return ""


def speedups(name: str, run: Run) -> str:
    """Over the fastest peer against the share of real tokens: one dot a workload and order."""
    found = [s for s in standings(run) if s.peer and s.peer.ratio]
    models = list(dict.fromkeys(s.ours.model for s in found))
    workloads = list(dict.fromkeys(s.ours.workload for s in found))
    marker = {w: MARKERS[i % len(MARKERS)] for i, w in enumerate(workloads)}

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(models), sharey=True, squeeze=False)
        for axes, model in zip(grid[0], models, strict=True):
            axes.axhline(1.0, color=INK, lw=1)
            for s in (s for s in found if s.ours.model == model):
                _dot(axes, s, marker[s.ours.workload])
            axes.set(title=model, xlabel="real tokens / padded tokens", yscale="log")
        _log_labels(grid[0][0].yaxis, "x")
        grid[0][0].set_ylabel("time of the fastest peer\n/ time of bert_fast")
        shapes = [_shape(marker[w], "#555555", w) for w in workloads]
        tints = [
            _shape("s", BY_PRECISION.get(p, INK), p)
            for p in ordered(s.ours.precision for s in found)
        ]
        fills = [_shape("o", "#555555", "as they arrive"), _shape("o", "#555555", "sorted", True)]
        _legend(figure, shapes + tints + fills)

    return svg(name, draw, 4.4)


def _dot(axes: Axes, standing: Standing, marker: str) -> None:
    ratio = standing.peer and standing.peer.ratio
    if not ratio:
        return
    color = BY_PRECISION.get(standing.ours.precision, INK)
    hollow = standing.ours.order == "sorted"
    axes.errorbar(
        fill(standing.ours),
        ratio.value,
        yerr=[[max(ratio.value - ratio.low, 0)], [max(ratio.high - ratio.value, 0)]],
        fmt=marker,
        ms=6,
        color=color,
        mfc="white" if hollow else color,
        lw=1,
    )


def rooflines(name: str, run: Run) -> str:
    """Each op's kernels below the roofs that this machine was measured to have."""
    entries = [e for e in run.ops if e.tflop_per_s and e.flop and e.bytes]
    ops = list(dict.fromkeys(e.op for e in entries))
    kernels = sorted({e.kernel for e in entries} - {REFERENCE})
    color = {k: BY_KERNEL[i % len(BY_KERNEL)] for i, k in enumerate(kernels)}
    color[REFERENCE] = "#9a9a9a"
    dtypes = ordered(e.dtype for e in entries)
    marker = {d: MARKERS[i % len(MARKERS)] for i, d in enumerate(dtypes)}
    columns = 3
    rows = math.ceil(len(ops) / columns)
    reach = [e.flop / e.bytes for e in entries]
    top = max((rate for _, rate, _ in _matmuls(run)), default=1.0)
    unit, scale = ("TFLOP/s", 1.0) if top >= 1 else ("GFLOP/s", 1e3)
    x = np.geomspace(min(reach) / 2, max(reach) * 2, 200)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(ops) :]:
            axes.set_visible(False)
        for i, op in enumerate(ops):
            axes = grid.flat[i]
            _roofs(axes, run, x, scale)
            for e in (e for e in entries if e.op == op):
                face = "white" if e.step != "forward" else color[e.kernel]
                style = {"color": color[e.kernel], "mfc": face, "ms": 6, "ls": ""}
                axes.plot(e.flop / e.bytes, (e.tflop_per_s or 0) * scale, marker[e.dtype], **style)
            axes.set(title=op, xscale="log", yscale="log", xlim=(x[0], x[-1]))
            if i + columns >= len(ops):
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("flop / byte")
            if i % columns == 0:
                axes.set_ylabel(unit)
        _log_labels(grid[0][0].xaxis)
        _log_labels(grid[0][0].yaxis)
        hues = [_shape("o", tint, k) for k, tint in color.items()]
        shapes = [_shape(marker[d], "#555555", d) for d in dtypes]
        steps = [_shape("o", "#555555", "with backward", True)]
        roofs = [Line2D([], [], color="#444444", ls=ls, label=n) for n, _, ls in _matmuls(run)]
        _legend(figure, hues + shapes + steps + roofs)

    return svg(name, draw, 1.0 + 2.3 * rows)


def ceiling(name: str, value: float) -> str:
    """One of `Run.ceilings` in words."""
    if name == "copy_gb_per_s":
        return f"copy {value:,.1f} GB/s"
    what = name.removesuffix("_tflop_per_s").replace("_", " ")
    return f"{what} {value:,.1f} TFLOP/s" if value >= 1 else f"{what} {value * 1e3:,.0f} GFLOP/s"


def _matmuls(run: Run) -> list[tuple[str, float, str]]:
    """(label, TFLOP/s, line style) of the matmul ceilings, one a dtype."""
    found = []
    for key, value in run.ceilings.items():
        if match := re.fullmatch(r"matmul_(?:(\w+)_)?tflop_per_s", key):
            found.append((f"roof, matmul {match[1] or ''}".strip(), value))
    styles = ("-", "--", ":", "-.")
    return [(label, value, styles[i % 4]) for i, (label, value) in enumerate(found)]


def _roofs(axes: Axes, run: Run, x: np.ndarray, scale: float) -> None:
    """min(bandwidth times intensity, matmul rate): a line a dtype. scale: of TFLOP/s."""
    slope = run.ceilings.get("copy_gb_per_s", math.inf) * x / 1e3
    for _, roof, style in _matmuls(run) or [("", math.inf, "-")]:
        if np.isfinite(line := np.minimum(slope, roof)).all():
            axes.plot(x, line * scale, style, color="#444444", lw=1)


def scaling(name: str, run: Run) -> str:
    """Log-log: seconds against each axis, with the fitted exponents in the legend."""
    color = colors(n for s in run.scaling for n in s.seconds)
    columns = min(3, len(run.scaling))
    rows = math.ceil(len(run.scaling) / columns)

    def panel(axes: Axes, s: Scaling) -> None:
        for contender in sorted(s.seconds, key=lambda c: (c == OURS, c)):
            label = contender
            if contender in s.exponents:
                label += f": {s.axis}^{s.exponents[contender]:.2f}"
            seconds = s.seconds[contender]
            axes.plot(s.x, seconds, "o-", ms=4, color=color[contender], label=label)
        axes.set(
            title=f"{s.model} {s.precision}, against {s.axis}", xlabel=s.axis, ylabel="seconds"
        )
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(s.x, [f"{x:g}" for x in s.x], minor=False)
        axes.xaxis.set_minor_formatter(lambda *_: "")
        _log_labels(axes.yaxis)
        axes.legend(loc="best")

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(run.scaling) :]:
            axes.set_visible(False)
        for axes, s in zip(grid.flat, run.scaling, strict=False):
            panel(axes, s)

    return svg(name, draw, 3.2 * rows)


def _log_labels(axis: Axis, suffix: str = "") -> None:
    """Plain numbers; between the decades too where there is hardly more than one."""

    def plain(value: float, _: object = None) -> str:
        return f"{value:g}{suffix}"

    low, high = axis.get_view_interval()
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())
    if high / low < 12:
        axis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 4, 5, 7)))
        axis.set_minor_formatter(plain)


def _shape(marker: str, color: str, label: str, hollow: bool = False) -> Line2D:
    face = "white" if hollow else color
    return Line2D([], [], ls="", marker=marker, color=color, mfc=face, label=label)


def _legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 9))
