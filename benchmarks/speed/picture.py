"""README's picture of speed as SVG: a dot for each recorded shape, a bar to the geometric mean, for each cell.

Written as text, number by number, so that the same rows give the same file on every machine. There are two, for light
and for dark pages; both are transparent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .bench_cases import CELLS, MODES
from .implementations import CELLS as STEPWISE
from .implementations import PACKED, SPLIT, TORCH
from .rows import BenchRow
from .timing import geometric_mean


class Theme(NamedTuple):
    """Colours of a page."""

    text: str
    quiet: str
    line: str
    cells: tuple[str, str, str]


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#d1d9e0", ("#c2334a", "#00798c", "#7d4fa0")),
    "dark": Theme("#f0f6fc", "#9198a1", "#3d444d", ("#ff7b8a", "#39c5d8", "#c9a0ea")),
}
# Group, peer, and the words beside its bars, in two lines.
GROUPS = (
    ("grid", TORCH, ("plain layers", "against torch.nn")),
    ("lengths", PACKED, ("lengths", "against packing")),
    ("resets", STEPWISE, ("resets", "against a loop of cells")),
    ("resets", SPLIT, ("resets", "against split rows")),
)
MARGIN, WIDTH, LEFT, PANEL, GAP = 8, 800, 186, 258, 50  # pixels; GAP has the means of the panel before it
TOP, LINE, BETWEEN = 90, 18, 14  # a bar each LINE, BETWEEN two groups
LOW, HIGH = 0.75, 25.0  # of the axis, which is logarithmic
TICKS = (1, 2, 5, 10, 20)
FONT = "-apple-system,BlinkMacSystemFont,'Segoe UI',Helvetica,Arial,sans-serif"


def draw(rows: Sequence[BenchRow], where: str, theme: Theme) -> str:
    """The picture of a processor's rows; `where`: a line about what they were measured on."""
    rows = [row for row in rows if row.implementation == "auto"]
    groups = [g for g in GROUPS if any((row.group, row.against) == g[:2] for row in rows)]
    bottom = TOP + len(groups) * (len(CELLS) * LINE + BETWEEN) - BETWEEN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 36}" '
        f'viewBox="0 0 {WIDTH} {bottom + 36}" font-family="{FONT}" role="img">',
        "<title>How many times as fast as torch.nn, for each cell, in inference and in training</title>",
        _text(MARGIN, 20, "How many times as fast as torch.nn", theme.text, size=18, weight=600),
        _text(MARGIN, 42, f"{where}. A dot is a shape, a bar ends at their geometric mean.", theme.quiet, size=13),
    ]
    for k, mode in enumerate(MODES):
        left = LEFT + k * (PANEL + GAP)
        parts += [_text(left + _at(1), TOP - 22, mode, theme.text, size=14, weight=600)]
        for tick in TICKS:
            x = left + _at(tick)
            parts += [
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 12}" y2="{bottom + 8}" stroke="{theme.line}" '
                f'stroke-width="{2 if tick == 1 else 1}"/>',
                _text(x, bottom + 25, "torch.nn" if tick == 1 else f"{tick}×", theme.quiet, size=12, anchor="middle"),
            ]
    for n, (group, peer, words) in enumerate(groups):
        top = TOP + n * (len(CELLS) * LINE + BETWEEN)
        parts += [
            _text(MARGIN, top + 14, words[0], theme.text, size=13, weight=600),
            _text(MARGIN, top + 31, words[1], theme.quiet, size=12),
        ]
        for c, (cell, colour) in enumerate(zip(CELLS, theme.cells, strict=True)):
            middle = top + c * LINE + LINE / 2
            parts.append(_text(LEFT - 6, middle + 4, cell, colour, size=12, weight=600, anchor="end"))
            for k, mode in enumerate(MODES):
                found = [r.ratio_p50 for r in rows if (r.group, r.against, r.cell, r.mode) == (group, peer, cell, mode)]
                if found:
                    parts += _bar(found, LEFT + k * (PANEL + GAP), middle, colour)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(ratios: Sequence[float], left: float, middle: float, colour: str) -> list[str]:
    """One cell's line in a panel: the bar, the dots over it, the mean in figures."""
    mean = geometric_mean(ratios)
    ends = sorted((_at(1), _at(mean)))
    dots = [
        f'<circle cx="{left + _at(ratio):.1f}" cy="{middle:.1f}" r="3.2" fill="{colour}" fill-opacity="0.55"/>'
        for ratio in sorted(ratios)
    ]
    return [
        f'<rect x="{left + ends[0]:.1f}" y="{middle - 5:.1f}" width="{ends[1] - ends[0]:.1f}" height="10" rx="2" '
        f'fill="{colour}" fill-opacity="0.35"/>',
        *dots,
        _text(left + PANEL + 4, middle + 4, f"{mean:.2f}", colour, size=13, weight=600),
    ]


def _at(ratio: float) -> float:
    """Where a ratio lies in a panel, in pixels from its left edge."""
    share = math.log(min(max(ratio, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
    return PANEL * share


def _text(x: float, y: float, words: str, colour: str, *, size: int, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )
