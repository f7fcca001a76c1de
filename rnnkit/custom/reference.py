"""Backend `reference` of custom cells: the loop over time in torch's operators, right and slow. It takes every cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import compute_dtype
from .declare import CellSpec
from .derivative import Gradient, vjp
from .inputs import CellInputs, CellOptions, CellOutputs
from .scan import outputs_in, scan, stack

name = "reference"
takes_none_states = False


def unsupported(*_: object) -> list[str]:
    """It takes every cell."""
    return []


def forward(spec: CellSpec, t: CellInputs, o: CellOptions, train: bool) -> tuple[CellOutputs, tuple[Tensor, ...]]:
    """The outputs, and with `train` what every step started from, [T, B, H] for each state."""
    wide = t.to(compute_dtype(t.x.dtype))
    after, last, before = scan(spec, wide, o)
    keep = train and not o.recompute
    saved = [stack([states[k] for states in before], v) for k, v in enumerate(wide.states)] if keep else []
    return outputs_in(t, o, after, last), tuple(saved)


def saved_shapes(spec: CellSpec, t: CellInputs, o: CellOptions) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of what `forward` keeps."""
    wide, count = compute_dtype(t.x.dtype), 0 if o.recompute else len(spec.states)
    return [((t.x.shape[0], *t.states[0].shape), wide)] * count


def backward(
    spec: CellSpec,
    t: CellInputs,
    o: CellOptions,
    y: Tensor,
    saved: Sequence[Tensor],
    grads: CellOutputs,
    needs: Sequence[bool],
) -> list[Gradient]:
    """Gradients in the flat order of `t`."""
    return vjp(spec, t, o, saved, grads, needs, again=False)
