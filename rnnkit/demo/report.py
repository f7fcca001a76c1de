"""What the demo says at its end: do the curves lie on one another, the table, the picture, and result.json."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .train import Run

COMPARED = 20  # first steps: later ones amplify roundings, whatever the layer
TOLERANCE = 1e-4  # bits per character
NO_PLOTS = "no curves.png, since matplotlib is not installed: pip install rnnkit[plots]"


@dataclass(frozen=True)
class CurveCheck:
    """Whether two loss curves lie on one another. max_difference is None where there is nothing to compare."""

    steps: int
    max_difference: float | None
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Not where a difference is NaN, nor where no step was compared."""
        return self.max_difference is not None and self.max_difference <= self.tolerance

    def __str__(self) -> str:
        if self.max_difference is None:
            return "no step was trained by both layers: the curves cannot be compared"
        verdict = "the curves lie on one another" if self.passed else "THE CURVES DIFFER"
        limit = f"at most {self.tolerance:g} allowed"
        found = f"largest difference over the first {self.steps} steps {self.max_difference:.2g}"
        return f"{verdict}: {found} bits per character, {limit}"


def compare(theirs: list[float], ours: list[float]) -> CurveCheck:
    """Hold the first steps of two loss curves against one another, as many as both have, at most COMPARED."""
    pairs = list(zip(theirs[:COMPARED], ours[:COMPARED], strict=False))
    differences = [abs(a - b) for a, b in pairs]
    if any(math.isnan(d) for d in differences):
        return CurveCheck(len(pairs), math.nan)
    return CurveCheck(len(pairs), max(differences, default=None))


class Speed(NamedTuple):
    """torch.nn's time over rnnkit's, step by step."""

    p20: float
    p50: float
    p80: float

    def __str__(self) -> str:
        return (
            f"rnnkit trains {self.p50:.2f} times as fast as torch.nn ({self.p20:.2f} to {self.p80:.2f}: p20 to p80 of "
            "the steps' ratios)"
        )


def speed(theirs: Run, ours: Run) -> Speed | None:
    """Over the later half of the steps that both have taken; None where these are fewer than two."""
    pairs = list(zip(theirs.milliseconds, ours.milliseconds, strict=False))
    ratios = [a / b for a, b in pairs[len(pairs) // 2 :]]
    if len(ratios) < 2:
        return None
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return Speed(tenths[1], tenths[4], tenths[7])


def table(runs: list[Run]) -> str:
    """A line for each run, columns aligned."""
    head = ["", "held-out bits per character", "ms a step", "tokens per second", "peak memory, MiB", "backend"]
    rows = [head]
    for run in runs:
        figures = [
            _figure(run.held_out_bits, ".4f"),
            _figure(run.ms_per_step(), ".1f"),
            _figure(run.tokens_per_second(), ",.0f"),
            _figure(run.peak_mib, ".1f"),
        ]
        rows.append([run.name, *figures, ", ".join(run.backends) or "-"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for name, *figures, backend in rows:
        middle = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=False)]
        lines.append("  ".join([name.ljust(widths[0]), *middle, backend]))
    return "\n".join(lines)


def footnotes(runs: list[Run]) -> str:
    """How the figures of the table came about."""
    kept = runs[0].held_out_characters
    notes = [
        "held-out: " + ("not reached." if kept is None else f"{kept:,} characters that training has not seen."),
        "ms a step: median over the later half of the run. Both sides take each step in turn, on one batch, so that "
        "whatever else this machine does meanwhile falls on both.",
        f"peak memory: {runs[0].peak_how or 'not measured'}.",
    ]
    return "\n".join(textwrap.fill(note, 100, subsequent_indent="  ") for note in notes)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result as strict JSON; a number that is not finite becomes null."""
    path.write_text(json.dumps(_strict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def plot(path: Path, theirs: Run, ours: Run, check: CurveCheck, title: str) -> None:
    """Both loss curves over one another, and what lies between them below. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for run, style in ((theirs, {"color": "0.7", "lw": 5}), (ours, {"color": "#0b3d91", "lw": 1.3, "ls": "--"})):
        steps = range(1, len(run.loss) + 1)
        upper.plot(steps, run.loss, label=run.name, marker="o" if len(run.loss) == 1 else None, **style)
    upper.set_ylabel("training loss (bits per character)")
    upper.set_title(title)
    upper.legend()

    both = [abs(a - b) for a, b in zip(theirs.loss, ours.loss, strict=False)]
    if both:
        lower.axvspan(0.5, check.steps + 0.5, color="0.92", label=f"compared: first {check.steps} steps")
        lower.plot(range(1, len(both) + 1), both, color="black", lw=1, marker="." if len(both) < 50 else None)
        lower.axhline(check.tolerance, color="tab:red", ls=":", label=f"allowed there: {check.tolerance:g}")
        lower.set_yscale("symlog", linthresh=1e-7)
        lower.set_ylim(-3e-8, 300 * max([check.tolerance, *filter(math.isfinite, both)]))
        lower.legend(loc="upper right", ncols=2)
    lower.set_ylabel("|difference|\n(bits per character)")
    lower.set_xlabel("training step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
