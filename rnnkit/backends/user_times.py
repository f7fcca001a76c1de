"""What `python -m rnnkit tune` measured on this machine: a table of times in the user's own folder.

It is read at the first choice on a CPU and is nothing but numbers: it orders backends. Its first lines say for which
processor, torch and rnnkit it was made; for any other it is ignored. A file that does not begin as ours is never
written over, and a link is neither followed nor replaced.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import itertools
import math
import os
import stat
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..version import __version__
from . import dispatch_times, processor
from .dispatch_times import FACTS, Kind, RecordedShape

MARK = "# rnnkit: times of this machine, by `python -m rnnkit tune`"
LARGEST = 1 << 20  # bytes; a table has some 20 000
NAMES = ("cpu", "torch")
"""The backends that are measured."""
AGAIN = "`python -m rnnkit tune` makes it anew"


class Refused(Exception):
    """What is at a path is not written over, or a table is not believed; says why."""


class Table(NamedTuple):
    """The user's table as found."""

    path: Path | None
    """Where it is, or would be; None where the user has no folder."""
    rows: tuple[RecordedShape, ...]
    reason: str | None
    """Why it is not used; None where it is."""


def why(error: Exception) -> str:
    """What an error says, without the path that is said before it."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def default_path() -> Path:
    """Where the table is: in XDG_DATA_HOME, else ~/.local/share; on Windows in LOCALAPPDATA.

    Raises Refused where the user has no home.
    """
    given = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_DATA_HOME", "")
    try:
        folder = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "share"
    except RuntimeError as error:
        raise Refused(f"there is no folder of your own to write to ({error}); set XDG_DATA_HOME") from error
    return folder / "rnnkit" / "dispatch_times.csv"


def made_for() -> dict[str, str]:
    """What a table holds for, by the words of its first lines."""
    return {"processor": processor.identity(), "torch": torch.__version__, "rnnkit": __version__}


@functools.cache
def load() -> Table:
    """The user's table, read once in a process."""
    try:
        path = default_path()
    except Refused as error:
        return Table(None, (), str(error))
    switch = os.environ.get("RNNKIT_TUNED") or "1"
    if switch != "1":
        held = "RNNKIT_TUNED=0" if switch == "0" else f"RNNKIT_TUNED must be 0, 1 or unset, got {switch!r}"
        return Table(path, (), held)
    try:
        return Table(path, tuple(read(path)), None)
    except FileNotFoundError:
        return Table(path, (), "there is none; `python -m rnnkit tune` measures this machine")
    except (Refused, OSError) as error:
        return Table(path, (), why(error))


@functools.lru_cache(maxsize=256)
def rows(kind: Kind) -> tuple[RecordedShape, ...]:
    """The user's rows of a kind."""
    return tuple(row for row in load().rows if row.kind == kind)


def forget() -> None:
    """Read the table again when it is next asked for."""
    load.cache_clear()
    rows.cache_clear()


def read(path: Path) -> list[RecordedShape]:
    """The rows of a table that was made for this machine. Raises Refused, with the reason; OSError; FileNotFoundError
    where there is none."""
    head, *lines = _text(path).splitlines() or [""]
    if head != MARK:
        raise Refused("it is no table of `python -m rnnkit tune`")
    about = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
    told = dict(line[2:].split(": ", 1) for line in about if ": " in line)
    for what, here in made_for().items():
        if told.get(what) != here:
            raise Refused(f"it was made for {what} {told.get(what, 'unknown')}, and this is {here}; {AGAIN}")
    table = csv.DictReader(lines[len(about) :], strict=True)
    found = []
    try:
        if table.fieldnames != [*FACTS, *NAMES]:
            raise ValueError(f"has the columns {table.fieldnames}")
        for row in dispatch_times.parsed(table):
            times = row.ms.values()
            if min(*row[:4], row.threads) < 1 or not times or not all(0 < ms < math.inf for ms in times):
                raise ValueError("a size or a time is not above 0")
            found.append(row._replace(source=f"this machine ({path})"))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        where = len(about) + 1 + table.line_num
        raise Refused(f"it is broken in line {where}: {error}; {AGAIN}") from error
    if not found:
        raise Refused(f"it is broken: there are no rows in it; {AGAIN}")
    return found


def _text(path: Path) -> str:
    """A regular file's text, through no link, and without waiting for a pipe."""
    careful = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))
    try:
        handle = os.open(path, os.O_RDONLY | careful)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused("it is a link, and links are not followed") from error
        raise
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise Refused("it is no regular file")
        if found.st_size > LARGEST:
            raise Refused(f"it has {found.st_size} bytes, and a table at most {LARGEST}")
        with open(handle, encoding="utf-8", errors="replace", newline="", closefd=False) as file:
            return file.read(LARGEST)
    finally:
        os.close(handle)


def claim(path: Path) -> None:
    """Make sure that a table can be written to a path: the folder is there and takes files, and what lies at the path,
    if anything, is ours. Raises Refused or OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        text = _text(path)
    except FileNotFoundError:
        text = MARK
    if not text.startswith(MARK):
        raise Refused("it is no table of `python -m rnnkit tune`, and is left as it is")
    _replace(path, "#" * (LARGEST // 16), keep=False)


def write(path: Path, rows: Sequence[RecordedShape]) -> list[RecordedShape]:
    """Write a table whole: whoever reads it meanwhile sees the old one or the new one. Rows of the old one that were
    made for this machine, and that these do not replace, are kept. Returns all rows. Raises Refused or OSError."""
    claim(path)
    try:
        old = read(path)
    except (Refused, FileNotFoundError):
        old = []
    every = list({row.key: row for row in (*old, *rows)}.values())
    isas = ", ".join(dict.fromkeys(row.kind.isa for row in every))
    lines = [MARK, *(f"# {what}: {value}" for what, value in made_for().items()), f"# instruction sets: {isas}"]
    lines.append(",".join((*FACTS, *NAMES)))
    lines += [",".join(dispatch_times.written(row._replace(source="tune"), NAMES)) for row in every]
    _replace(path, "\n".join(lines) + "\n")
    return every


def _replace(path: Path, text: str, *, keep: bool = True) -> None:
    """Put text in a new file beside path, then in its place; with keep=False only try it. Leaves nothing else."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        if keep:
            os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
