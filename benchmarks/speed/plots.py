"""Pictures of a run: the ratio for each shape, and time against T, B and H. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from . import variant_plot
from .bench_cases import CELLS, MODES
from .implementations import ORT, TORCH
from .rows import BenchRow
from .targets import geometric_mean, judged

COLOURS = {"RNN": "#d1495b", "LSTM": "#00798c", "GRU": "#8d6a9f"}
TITLES = {"inference": "inference", "training": "training (forward and backward)"}
OURS, THEIRS, RUNTIME = "#00798c", "0.55", "#edae49"


def draw(folder: Path, rows: Sequence[BenchRow]) -> list[Path]:
    """Whatever pictures these rows are enough for, one of each kind for each number of threads, launch and dtype."""
    written = []
    rows = judged(rows)
    settings = sorted({(row.threads, row.launch, row.dtype) for row in rows})
    for setting in settings:
        some = [row for row in rows if (row.threads, row.launch, row.dtype) == setting]
        names = (f"-{setting[0]}t", f"-{setting[1]}", f"-{setting[2]}")
        suffix = "".join(name for k, name in enumerate(names) if len({other[k] for other in settings}) > 1)
        figures = (
            ("ratios", ratios(some)),
            ("variants", variant_plot.ratios(some, about(some))),
            *((f"sizes-{mode}", sizes(some, mode)) for mode in MODES),
        )
        for name, figure in figures:
            if figure is not None:
                written.append(folder / f"{name}{suffix}.png")
                figure.savefig(written[-1], dpi=130)
    return written


def about(rows: Sequence[BenchRow]) -> str:
    """Where these rows come from, below a title."""
    row = rows[0]
    threads = f", {row.threads} thread{'s' if row.threads > 1 else ''}" if row.device == "cpu" else f", {row.launch}"
    return f"{row.processor}{threads}, torch {row.torch}, {row.dtype}, rnnkit {row.commit}"


def ratios(rows: Sequence[BenchRow]) -> Figure | None:
    """A line for each shape of the grid, a mark for each cell: torch's time over rnnkit's, p20 to p80."""
    grid = [row for row in rows if row.group == "grid" and row.against == TORCH]
    if not grid:
        return None
    shapes = list(dict.fromkeys(row.case for row in grid))
    modes = [mode for mode in MODES if any(row.mode == mode for row in grid)]
    figure = Figure(figsize=(1.6 + 5.6 * len(modes), 1.9 + 0.36 * len(shapes)), layout="constrained")
    every = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    low, high = min(row.ratio_p20 for row in grid), max(row.ratio_p80 for row in grid)
    limits = (min(low / 1.15, 0.75), max(high * 1.15, 1.5))
    for axes, mode in zip(every, modes, strict=True):
        axes.axvspan(limits[0], 1, color="#d1495b", alpha=0.07, lw=0)
        axes.axvline(1, color="0.3", lw=1)
        for k in range(1, len(shapes), 2):
            axes.axhspan(k - 0.5, k + 0.5, color="0.5", alpha=0.08, lw=0)
        for k, cell in enumerate(CELLS):
            some = [row for row in grid if row.mode == mode and row.cell == cell]
            if not some:
                continue
            y = [shapes.index(row.case) + 0.22 * (k - 1) for row in some]
            x = [row.ratio_p50 for row in some]
            spread = [
                [max(row.ratio_p50 - row.ratio_p20, 0) for row in some],
                [max(row.ratio_p80 - row.ratio_p50, 0) for row in some],
            ]
            mean = geometric_mean(x)
            label = f"{cell}  {mean:.2f}"
            axes.errorbar(x, y, xerr=spread, fmt="o", ms=4.5, lw=1.2, color=COLOURS[cell], label=label)
            axes.axvline(mean, color=COLOURS[cell], lw=1, ls=":", zorder=0)
        axes.set_title(TITLES[mode], fontsize=10)
        beside = {
            "loc": "upper left",
            "bbox_to_anchor": (1, 1),
            "frameon": False,
        }  # within, it hides marks of few shapes
        axes.legend(title="geometric mean", fontsize=8, title_fontsize=8, **beside)
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        _plain_ticks(axes.xaxis, limits)
        axes.set_xlabel("torch.nn's time / rnnkit's   (right of 1: rnnkit is faster)")
        axes.grid(axis="x", alpha=0.25)
    every[0].set_yticks(range(len(shapes)), [shape.replace("x", "×") for shape in shapes], fontsize=8)
    every[0].set_ylim(len(shapes) - 0.5, -0.5)
    every[0].set_ylabel("B × T × I × H")  # short: with few shapes the axis is
    deep = "; 2b: two layers, both directions" if any(row.layers > 1 for row in grid) else ""
    title = f"rnnkit against torch.nn: median of paired runs, p20 to p80{deep}"
    figure.suptitle(f"{title}\n{about(grid)}", fontsize=10, wrap=True)
    return figure


def sizes(rows: Sequence[BenchRow], mode: str) -> Figure | None:
    """Time against T, B and H through one shape: a row of panels for each cell, log on both axes."""
    sweep = [row for row in rows if row.group == "sweep" and row.mode == mode]
    if not sweep:
        return None
    lines = {axis: _line(sweep, axis) for axis in "TBH"}
    kinds = [cell for cell in CELLS if any(row.cell == cell for row in sweep)]
    figure = Figure(figsize=(11.5, 1.2 + 2.4 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 3, sharex="col", sharey="row", squeeze=False)
    for cell, row_of_panels in zip(kinds, panels, strict=True):
        for axes, axis in zip(row_of_panels, "TBH", strict=True):
            some = [row for row in lines[axis] if row.cell == cell]
            ours = {getattr(row, axis): row for row in some}
            _curve(axes, {at: row.limit_ms for at, row in ours.items()}, "the machine's limit", "0.2", ls=":", lw=1.2)
            for peer, label, colour in ((TORCH, "torch.nn", THEIRS), (ORT, "ONNX Runtime", RUNTIME)):
                times = {getattr(row, axis): row.against_ms for row in some if row.against == peer}
                _curve(axes, times, label, colour, marker="s", ms=6, lw=2)
            _curve(axes, {at: row.ms for at, row in ours.items()}, "rnnkit", OURS, marker="o", ms=4, lw=1.6)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(alpha=0.25)
            axes.xaxis.set_major_locator(FixedLocator(sorted(ours)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        row_of_panels[0].set_ylabel(f"{cell}, ms")
    words = {"T": "T, steps (B = 16, H = 128)", "B": "B, rows (T = 64, H = 128)", "H": "H = I, units (B = 16, T = 64)"}
    for axes, axis in zip(panels[-1], "TBH", strict=True):
        axes.set_xlabel(words[axis])
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles), fontsize=9)
    figure.suptitle(
        f"{TITLES[mode].capitalize()}: time against T, B and H\n{about(sweep)}", fontsize=10, x=0.01, ha="left"
    )
    return figure


def _line(sweep: Sequence[BenchRow], axis: str) -> list[BenchRow]:
    """The rows of the sweep that differ from its middle, (B, T, H) = (16, 64, 128), along one axis alone."""
    middle = {"B": 16, "T": 64, "H": 128}
    return [row for row in sweep if all(getattr(row, other) == v for other, v in middle.items() if other != axis)]


def _curve(axes: Any, values: dict[int, float], label: str, colour: str, **style: Any) -> None:
    if values:
        at = sorted(values)
        axes.plot(at, [values[x] for x in at], label=label, color=colour, **style)


def _plain_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Ratios as people write them: 0.5, 1, 2, 5."""
    marks = [m * 10.0**k for k in range(-3, 4) for m in (1, 2, 3, 5, 7)]
    if limits[1] / limits[0] > 12:
        marks = [m * 10.0**k for k in range(-3, 4) for m in (1, 2, 5)]
    axis.set_major_locator(FixedLocator([m for m in marks if limits[0] <= m <= limits[1]]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
