"""Custom cells on the C++ engine: a cell's program, run over a whole layer in one direction.

csrc/layer/program.h says what the two functions take and give; rnnkit/custom/program.py writes the words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...cells import compute_dtype
from ...custom.graph import CellProgram
from ...custom.inputs import CellInputs, CellOptions, CellOutputs
from ...custom.program import B_HH, B_IH, ProgramKey, backward_words, forward_words
from . import extension

name = "cpu"
takes_none_states = True
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST = 62
_HALF = (torch.bfloat16, torch.float16)


def unsupported(program: CellProgram | None, device: str, dtype: torch.dtype, o: CellOptions) -> list[str]:
    """Why the engine cannot run this layer; empty where it can. `program` None: before there is one."""
    reasons = []
    if not extension.available():
        reasons.append(extension.reason())
    elif extension.refusal:
        reasons.append(extension.refusal)
    elif extension.native is None:
        reasons.append("this torch has no way for tensors to cross into the extension; torch 2.11 and later have")
    if device != "cpu":
        reasons.append(f"runs on the device cpu, got {device}")
    if dtype not in DTYPES:
        reasons.append(f"computes in float32, float64, bfloat16 and float16, got {dtype}")
    if program is not None:
        blocks = max((count for _, count in program.weights), default=0)
        if program.gates > MOST or len(program.states) > MOST or blocks > MOST:
            reasons.append(
                f"takes at most {MOST} gates, states and blocks of a weight, got {program.gates} gates, "
                f"{len(program.states)} states and up to {blocks} blocks"
            )
    return reasons


def _kept(p: CellProgram, o: CellOptions) -> list[bool]:
    """Which states after each step the backward wants, beside y."""
    return [o.recompute or state in p.needs for state in p.states[1:]]


def _keeps_first(p: CellProgram, dtype: torch.dtype, o: CellOptions) -> bool:
    """Whether the backward wants the first state as it was before y rounded it: a derivative may jump between."""
    return dtype in _HALF and (o.recompute or p.states[0] in p.needs)


def saved_shapes(p: CellProgram, t: CellInputs, o: CellOptions) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of what a training forward keeps beside y: states, blocks per unit, numbers per row; in the compute type."""
    wide, (steps, rows) = compute_dtype(t.x.dtype), t.x.shape[:2]
    count = _keeps_first(p, t.x.dtype, o) + sum(_kept(p, o))
    shapes: list[tuple[int, ...]] = [(steps, rows, p.hidden)] * count
    if not o.recompute:
        shapes += [(len(p.saved), steps, rows, p.hidden)] if p.saved else []
        shapes += [(len(p.saved_rows), steps, rows)] if p.saved_rows else []
    return [(shape, wide) for shape in shapes]


def _tensors(p: CellProgram, t: CellInputs) -> tuple[Tensor | None, ...]:
    return t.flat() if t.reset_states else (*t.flat(), *(None,) * len(p.states))


def _biases(t: CellInputs) -> int:
    return B_IH * (t.b_ih is not None) + B_HH * (t.b_hh is not None)


def _native(function: Callable[..., list[Any]], *words: Any, tensors: tuple[Tensor | None, ...]) -> list[Any]:
    """One of the extension's functions. The memory of a tensor with torch's negative bit does not hold its values."""
    try:
        return function(*words, tensors)
    except extension.NotPlain:
        return function(*words, tuple(None if v is None else v.resolve_neg() for v in tensors))


def forward(p: CellProgram, t: CellInputs, o: CellOptions, train: bool) -> tuple[CellOutputs, tuple[Tensor, ...]]:
    """The outputs, and with `train` what `backward` wants: states, saved, saved_rows, as far as there are any."""
    kept = _kept(p, o) if train else [False] * (len(p.states) - 1)
    mask = sum(1 << k for k, wanted in enumerate(kept, 1) if wanted or o.all_states)
    first = train and _keeps_first(p, t.x.dtype, o)
    words = forward_words(ProgramKey(p), train and not o.recompute, _biases(t), first)
    run = extension.native.program_forward  # type: ignore[union-attr]
    found = _native(run, words, o.heads, int(o.reverse), mask, tensors=_tensors(p, t))
    n = len(p.states)
    y, last, states, others = found[0], tuple(found[1 : n + 1]), found[n + 1 : 2 * n], found[2 * n :]
    every = tuple(v.to(t.x.dtype) for v in states) if o.all_states else ()
    if not train:
        return CellOutputs(y, last, every), ()
    wanted = [others[0], *(v if keep else None for v, keep in zip(states, kept, strict=True)), *others[1:]]
    return CellOutputs(y, last, every), tuple(v for v in wanted if v is not None)


def backward(
    p: CellProgram,
    t: CellInputs,
    o: CellOptions,
    y: Tensor,
    saved: Sequence[Tensor],
    grads: CellOutputs,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients in the flat order of `t`, None where they are not needed."""
    kept = iter(saved)
    first = next(kept) if _keeps_first(p, t.x.dtype, o) else None
    states = [next(kept) if wanted else None for wanted in _kept(p, o)]
    blocks = [None if o.recompute or not some else next(kept) for some in (p.saved, p.saved_rows)]
    key = ProgramKey(p)
    tensors, every = _tensors(p, t), grads.all or (None,) * (len(p.states) - 1)
    found = _native(
        extension.native.program_backward,  # type: ignore[union-attr]
        backward_words(key, t.x.dtype in _HALF),
        forward_words(key, True, _biases(t)),
        o.heads,
        int(o.reverse),
        bytes(needs).ljust(len(tensors), b"\0"),
        tensors=(*tensors, y, first, *states, *blocks, grads.y, *grads.last, *every),
    )
    return list(found[: len(needs)])
