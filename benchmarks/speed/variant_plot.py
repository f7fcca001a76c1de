"""The picture of custom cells: how many times as fast each is as a loop of torch operators, and as that compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .bench_cases import MODES, VARIANTS
from .rows import BenchRow
from .timing import geometric_mean
from .variant_goals import is_custom
from .variant_loops import COMPILED_LOOP, LOOP

COLOURS = ("#00798c", "#d1495b", "#8d6a9f", "#edae49", "#3d5a80")
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def ratios(rows: Sequence[BenchRow], about: str) -> Figure | None:
    """A line for each cell, a mark for each shape, p20 to p80: a panel for training, one for inference, one for the
    compiled loop. about: where the rows come from."""
    panels = [
        (f"{mode}, against a {against}", some)
        for against in (LOOP, COMPILED_LOOP)
        for mode in reversed(MODES)
        if (some := [row for row in rows if is_custom(row) and (row.against, row.mode) == (against, mode)])
    ]
    if not panels:
        return None
    every = [row for _, some in panels for row in some]
    cells = [cell for cell in VARIANTS if any(row.cell == cell for row in every)]
    shapes = list(dict.fromkeys(row.case for row in every))
    figure = Figure(figsize=(2.4 + 4.6 * len(panels), 3.0 + 0.3 * len(cells)), layout="constrained")
    low, high = min(row.ratio_p20 for row in every), max(row.ratio_p80 for row in every)
    marks: dict[str, Any] = {}
    limits = (min(low / 1.15, 0.75), max(high * 1.15, 1.5))
    for axes, (title, some) in zip(
        figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0], panels, strict=True
    ):
        axes.axvspan(limits[0], 1, color="#d1495b", alpha=0.07, lw=0)
        axes.axvline(1, color="0.3", lw=1)
        means = []
        for shape, colour in zip(shapes, COLOURS, strict=False):
            own = [row for row in some if row.case == shape]
            if not own:
                continue
            x = [row.ratio_p50 for row in own]
            spread = [
                [max(row.ratio_p50 - row.ratio_p20, 0) for row in own],
                [max(row.ratio_p80 - row.ratio_p50, 0) for row in own],
            ]
            means.append(f"{shape.replace('x', '×')}: {geometric_mean(x):.2f}")
            y = [cells.index(row.cell) for row in own]
            axes.errorbar(x, y, xerr=spread, fmt="o", ms=4.5, lw=1.2, color=colour, label=shape.replace("x", "×"))
        axes.set_title("\n".join([title, *means]), fontsize=9)
        marks |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if limits[0] <= tick <= limits[1]]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.set_xlabel("its time / rnnkit's")
        axes.set_yticks(range(len(cells)), cells, fontsize=8)
        axes.set_ylim(len(cells) - 0.5, -0.5)
        axes.grid(alpha=0.25)
    figure.legend(
        marks.values(), marks.keys(), loc="outside lower center", ncols=len(marks), title="B×T×I×H", fontsize=8
    )
    figure.suptitle(
        f"Custom cells: median of paired runs, p20 to p80; geometric means in figures\n{about}", fontsize=10, wrap=True
    )
    return figure
