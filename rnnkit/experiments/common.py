"""What every experiment gives, and how it is written: a CSV of all numbers, a picture, and sentences made from them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Show = Callable[[int, int, str], None]
"""show(done, of, what): how far an experiment is."""

DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKS = "osD^v"
"""Lines and marks that are told apart in grey."""


class MissingPackage(Exception):
    """An optional package is not here; the message names the extra."""


@dataclass(frozen=True)
class Finding:
    """An experiment's result."""

    rows: list[dict[str, Any]]
    """All with the same keys."""
    sentences: list[str]
    """Three, from the numbers just computed."""
    draw: Callable[[], Any]
    """The matplotlib figure."""


def write(finding: Finding, name: str, out: Path) -> list[Path]:
    """name.csv, name.txt and, with matplotlib, name.png in `out`; what was written."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.csv", out / f"{name}.txt"]
    with files[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(finding.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(finding.rows)
    files[1].write_text("\n".join(finding.sentences) + "\n", encoding="utf-8")
    try:
        picture = finding.draw()
    except ModuleNotFoundError:
        return files
    picture.savefig(out / f"{name}.png", dpi=130)
    return [*files, out / f"{name}.png"]


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
