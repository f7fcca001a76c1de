"""Shared by the CUDA and Triton usage records: picking jobs, one kernel's usage, reading a record."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from ..speed.bench_cases import BadInput


class Usage(NamedTuple):
    """What a kernel takes: registers a thread, bytes of shared memory a block."""

    registers: int
    spilled: int
    shared: int


def part_option(text: str) -> tuple[int, int]:
    """K/N with 1 ≤ K ≤ N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected K/N with 1 ≤ K ≤ N, got {text!r}")
    return int(found[1]), int(found[2])


def find_number(pattern: str, text: str) -> int:
    """What a tool says; an error where it says nothing, so that a spill is never overlooked."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"found no {pattern} in what the tool says")
    return int(found[1])


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a record, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a record; none where there is none yet. Raises BadInput where a file is none of ours."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != tuple(columns):
            raise BadInput(f"{path} has the columns {rows.fieldnames}, expected {', '.join(columns)}; remove it")
        return list(rows)


def from_columns(kind: Any, row: dict[str, str]) -> Any:
    """A NamedTuple of this kind from the columns that bear the names of its fields."""
    types = get_type_hints(kind)
    return kind(**{name: types[name](row[name]) for name in kind._fields})
