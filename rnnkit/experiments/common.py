"""What every experiment gives, and how it is written: a CSV of all numbers, a picture, and sentences made from them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..diagnostics.pictures import figure

Show = Callable[[int, int, str], None]
"""show(done, of, what): how far an experiment is."""

STYLES = tuple(
    {"color": color, "linestyle": dash, "marker": mark, "markersize": 5, "markerfacecolor": "white", "linewidth": 1.3}
    for color, dash, mark in zip(
        ("black", "tab:blue", "tab:red", "tab:green"), ("-", "--", "-.", (0, (1, 1))), "osD^", strict=True
    )
)
"""Lines that are told apart in grey too, by dashes and marks."""


@dataclass(frozen=True)
class Finding:
    """An experiment's result."""

    rows: list[dict[str, Any]]
    """All with the same keys."""
    sentences: list[str]
    """Three, from the numbers just computed."""
    draw: Callable[[], Any]
    """The matplotlib figure."""


def files_of(name: str, out: Path) -> list[Path]:
    """What `write` writes."""
    return [out / f"{name}.{kind}" for kind in ("csv", "txt", "png")]


def expect_room(names: Sequence[str], out: Path) -> None:
    """Make the folder and see that the files can be written, before anything is computed; raises OSError.

    And that there is matplotlib; raises ModuleNotFoundError.
    """
    figure(1, 1)
    out.mkdir(parents=True, exist_ok=True)
    for file in [file for name in names for file in files_of(name, out)]:
        new = not file.exists()
        file.open("a").close()
        if new:
            file.unlink()


def write(finding: Finding, name: str, out: Path) -> list[Path]:
    """The files that were written."""
    table, words, picture = files_of(name, out)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(finding.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(finding.rows)
    words.write_text("\n".join(finding.sentences) + "\n", encoding="utf-8")
    finding.draw().savefig(picture, dpi=130)
    return [table, words, picture]


def listed(words: Iterable[str]) -> str:
    """a, b and c; none of nothing."""
    *most, last = list(words) or ["none"]
    return f"{', '.join(most)} and {last}" if most else last


def mean(numbers: Iterable[float]) -> float:
    """Of one number or more."""
    some = list(numbers)
    return sum(some) / len(some)
