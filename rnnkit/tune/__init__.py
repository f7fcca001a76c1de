"""`python -m rnnkit tune`: measure this machine for `auto`, in under 90 seconds.

The engine and torch's layers take turns on layers of each kind, with torch's number of threads (OMP_NUM_THREADS), after
an accuracy check against float64. What was measured goes into a table in your own folder, which `auto`, `explain` and
`info` use from then on; RNNKIT_TUNED=0 leaves it aside. A table that was made for another processor, torch or rnnkit is
ignored. Ctrl-C leaves everything as it was. Results depend on what else runs on the machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..backends import LayerSpec, forget, measured_order, processor, user_times
from ..backends.cpu import extension
from ..backends.dispatch_times import RecordedShape, fastest_first, said
from ..backends.user_times import NAMES, Refused
from ..cli.progress import Progress
from ..cli.values import seconds
from .measure import CELLS, DTYPES, Measured, layers, measure_layers

SECONDS = 75.0  # no layer begins later; the last one and the start take some more
SHOWN = 20  # changes
BUSY = 0.7  # processes that ran over the last minute, on average; this one has just begun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", metavar="D", help=f"{', '.join(DTYPES)}; default: both"
    )
    parser.add_argument(
        "--seconds", type=seconds, default=SECONDS, metavar="S", help="begin no layer later; default: %(default)g"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table here, where `auto` does not look")


def main(options: argparse.Namespace) -> int:
    """Measure, show what changes, write; returns the exit code."""
    missing = extension.reason() or extension.refusal
    if missing:
        return _complain(f"there is nothing to choose between: {missing}", 2)
    try:
        path = options.out or user_times.default_path()
    except Refused as error:
        return _complain(error, 2)
    try:
        user_times.claim(path)
        found = _measured(options.dtype or DTYPES, options.seconds)
        for line in found.wrong:
            print(f"rnnkit tune: {line}", file=sys.stderr)
        if not found.rows:
            return _complain("nothing was measured, and nothing is written", 1)
        changes = [changed for row in found.rows if (changed := change(row))]
        kept = len(user_times.write(path, found.rows)) - len(found.rows)
    except (Refused, OSError) as error:
        return _complain(f"cannot write {path}: {user_times.why(error)}", 2)
    except KeyboardInterrupt:
        return _complain("stopped; nothing is written", 130)
    forget()
    _report(found, changes)
    print(f"written: {path}" + (f", with {kept} rows that it had before" if kept else ""))
    if options.out is None and user_times.load().reason:
        print(f"auto does not use it: {user_times.load().reason}")
    return 1 if found.wrong else 0


def _measured(dtypes: Sequence[str], limit: float) -> Measured:
    threads = torch.get_num_threads()
    isas = dict.fromkeys(processor.instruction_set(getattr(torch, dtype)) for dtype in dtypes)
    print(f"{processor.identity()}: {', '.join(isas)}, {said(threads)}, torch {torch.__version__}", file=sys.stderr)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY:
        print("this machine is busy with other work, which may make a backend look slow", file=sys.stderr)
    progress = Progress("tune", len(layers(dtypes)), sys.stderr, "layer")
    try:
        return measure_layers(dtypes, limit, progress.show)
    finally:
        progress.close()


def change(row: RecordedShape) -> str | None:
    """What this row changes against the package's own: None where `auto` takes the same backend."""
    kind, (batch, steps, inputs, hidden) = row.kind, row[:4]
    dtype = getattr(torch, kind.dtype)
    spec = LayerSpec(kind.cell, "cpu", dtype, steps, batch, inputs, hidden, 0, bias=True, train=kind.train)
    before = next(name for name in measured_order(spec, tuned=False) if name in NAMES)
    now = fastest_first(row.ms)[0]
    if now == before or before not in row.ms:
        return None
    names = {cell: name for name, cell in CELLS.items()}
    mode = "training" if kind.train else "inference"
    return (
        f"{names[kind.cell]:<4} {mode:<9} {kind.dtype:<8} {'×'.join(map(str, row[:4])):<14} {before} → {now}: "
        f"{row.ms[before]:.3g} ms → {row.ms[now]:.3g} ms, {row.ms[before] / row.ms[now]:.2f} times as fast"
    )


def _report(found: Measured, changes: list[str]) -> None:
    left = f"; there was no time for {found.left} more" if found.left else ""
    print(f"{len(found.rows)} rows measured, each a layer (B×T×I×H) in one mode{left}.", end=" ")
    print(f"Against rnnkit's own times, auto changes for {len(changes)} of them{':' if changes else ''}")
    for line in changes[:SHOWN]:
        print(f"  {line}")
    if len(changes) > SHOWN:
        print(f"  and {len(changes) - SHOWN} more")


def _complain(error: Exception | str, code: int) -> int:
    print(f"rnnkit tune: {error}", file=sys.stderr)
    return code
