"""What `explain` says of a custom layer: who runs it and why, its program in numbers, its self-check.

Layers that run report themselves to whoever records in their thread. Everything else is made from that afterwards, so
that a call pays for one look at a variable.
"""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..cells import compute_dtype
from . import check, choose, kernel_check
from .choose import Asked
from .declare import CellSpec
from .inputs import CellInputs, CellOptions
from .program import B_HH, B_IH, Counts, counts


class Met(NamedTuple):
    """One layer in one direction, as it ran."""

    spec: CellSpec
    asked: Asked
    wanted: str
    """The backend that was asked for."""
    backend: str
    """The one that ran."""
    steps: int
    batch: int
    input_size: int
    projected: bool
    """Whether the cell's own `project` has made gx, which x then is."""
    biases: int
    """B_IH and B_HH as bits."""
    train: bool


class _Thread(threading.local):
    def __init__(self) -> None:
        self.record: list[Met] | None = None


_thread = _Thread()


class record:
    """While it is open the custom layers that run in this thread are appended to the list that it gives."""

    def __enter__(self) -> list[Met]:
        self._outside = _thread.record
        found: list[Met] = []
        _thread.record = found
        return found

    def __exit__(self, *_: object) -> None:
        _thread.record = self._outside


def report(spec: CellSpec, hidden: int, t: CellInputs, o: CellOptions, wanted: str, backend: str, train: bool) -> None:
    """Tell whoever records that this layer runs by `backend`."""
    if _thread.record is not None:
        steps, batch, width = t.x.shape
        biases = B_IH * (t.b_ih is not None) + B_HH * (t.b_hh is not None)
        asked = Asked(hidden, t.x.device.type, t.x.dtype, o)
        _thread.record.append(Met(spec, asked, wanted, backend, steps, batch, width, t.w_ih is None, biases, train))


@dataclass(frozen=True)
class ProgramFacts:
    """A step's program in numbers. `saved`: what a training step keeps for its backward, beside the output."""

    forward: Counts
    backward: Counts
    saved_blocks: int
    """Of H numbers per row, states among them."""
    saved_row_values: int
    """Numbers per row."""
    saved_bytes: int
    """For one step of all rows, in the type that the step computes in."""


@dataclass(frozen=True)
class CustomChoice:
    """One custom layer in one direction: the backend that runs it, the program of its step, what speaks against
    others."""

    name: str
    layer: int
    cell: str
    device: str
    dtype: torch.dtype
    steps: int
    batch: int
    input_size: int
    projected: bool
    """Whether the cell projects by itself: input_size is the width of what comes of it."""
    hidden_size: int
    heads: int
    reverse: bool
    recompute: bool
    train: bool
    asked: str
    backend: str
    reasons: dict[str, list[str]]
    """Of the backends that were not chosen."""
    program: ProgramFacts | None
    refused: str | None
    """Why the step has no program: which operation, what to write instead."""
    check_seconds: float
    """What tracing, derivative and self-check took, once for this cell, H and type."""
    kernel_check_seconds: float
    """What it took to hold the kernel of `backend` against the step, once for the same and the number of heads; 0.0 of
    the reference."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, the dtype by its name; `problem` has the sizes, as for the built-in layers."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["dtype"] = str(self.dtype).removeprefix("torch.")
        program = self.program
        if program is not None:
            found["program"] = {
                **dataclasses.asdict(program),
                "forward": program.forward._asdict(),
                "backward": program.backward._asdict(),
            }
        problem = {name: found.pop(name) for name in _PROBLEM}
        return {"name": found.pop("name"), "layer": found.pop("layer"), "problem": problem, **found}

    def lines(self) -> list[str]:
        """For a person."""
        width = f"{'gx' if self.projected else 'I'}={self.input_size}"
        size = f"T={self.steps} B={self.batch} {width} H={self.hidden_size}"
        size += f" heads={self.heads}" if self.heads > 1 else ""
        kind = f"{self.cell} {size} {str(self.dtype).removeprefix('torch.')} on {self.device}"
        direction = "reverse" if self.reverse else "forward"
        found = [f"{self.name or '(the module)'}, layer {self.layer}, {direction}: {kind}"]
        for backend in choose.EVERY:
            if backend == self.backend:
                how = "chosen" if self.asked == "auto" else f"chosen, as backend={self.asked!r} asks"
            else:
                how = "; ".join(self.reasons[backend])
            found.append(f"  {'→' if backend == self.backend else ' '} {backend:<10} {how}")
        p = self.program
        if p is None:
            return [*found, f"    {'step':<10} has no program: {self.refused}"]
        kept = f"{_many(p.saved_blocks, 'block')} of H and {_many(p.saved_row_values, 'number')} per row"
        again = ", made again by recompute=True" if self.recompute else ""
        kernel = f", that of the kernel in {self.kernel_check_seconds:.2f} s" if self.kernel_check_seconds else ""
        return [
            *found,
            f"    {'program':<10} forward {_said(p.forward)}",
            f"    {'':<10} backward {_said(p.backward)}",
            f"    {'saved':<10} beside the output {kept}: {p.saved_bytes} bytes a step in training{again}",
            f"    {'self-check':<10} passed in {self.check_seconds:.2f} s{kernel}, once for this cell, H and type",
        ]


_PROBLEM = (
    "cell",
    "device",
    "dtype",
    "steps",
    "batch",
    "input_size",
    "projected",
    "hidden_size",
    "heads",
    "reverse",
    "recompute",
    "train",
)


def _many(count: int, of: str) -> str:
    return f"{count} {of}{'' if count == 1 else 's'}"


def _said(c: Counts) -> str:
    """ "23 instructions, 1 product, 0 sums over a row, 2 barriers"."""
    sums, barriers = f"{_many(c.row_sums, 'sum')} over a row", _many(c.barriers, "barrier")
    return f"{_many(c.instructions, 'instruction')}, {_many(c.products, 'product')}, {sums}, {barriers}"


def choice_of(met: Met, name: str, layer: int) -> CustomChoice:
    """All that can be said of a layer that ran."""
    asked, o = met.asked, met.asked.o
    reasons = {other: _against(met, other) for other in choose.EVERY if other != met.backend}
    checked = check.program_of(met.spec, asked.hidden, compute_dtype(asked.dtype))
    return CustomChoice(
        name=name,
        layer=layer,
        cell=met.spec.name,
        device=asked.device,
        dtype=asked.dtype,
        steps=met.steps,
        batch=met.batch,
        input_size=met.input_size,
        projected=met.projected,
        hidden_size=asked.hidden,
        heads=o.heads,
        reverse=o.reverse,
        recompute=o.recompute,
        train=met.train,
        asked=met.wanted,
        backend=met.backend,
        reasons=reasons,
        program=None if checked.program is None else _facts(checked.program, met),
        refused=checked.reason,
        check_seconds=checked.seconds,
        kernel_check_seconds=kernel_check.seconds(
            met.backend, checked.program, asked.device, asked.dtype, asked.o.heads
        ),
    )


def _against(met: Met, name: str) -> list[str]:
    after = f"can run it; {f'auto asks {met.backend} first' if met.wanted == 'auto' else f'{met.wanted} was asked for'}"
    return choose.judge(name, met.spec, met.asked).reasons or [after]


def _facts(program: Any, met: Met) -> ProgramFacts:
    wide = compute_dtype(met.asked.dtype)
    forward, backward = counts(program, met.biases, met.asked.dtype != wide)
    o, half = met.asked.o, met.asked.dtype != wide
    states = sum(o.recompute or state in program.needs for state in program.states[not half :])  # y is there anyway
    blocks, rows = (0, 0) if o.recompute else (len(program.saved), len(program.saved_rows))
    each = (states + blocks) * program.hidden + rows
    return ProgramFacts(forward, backward, states + blocks, rows, met.batch * each * wide.itemsize)
