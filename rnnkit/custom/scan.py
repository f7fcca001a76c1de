"""A custom layer in torch operators: the loop over time of the user's own step.

What every kernel is held against, and what runs a cell that kernels cannot. Nothing is written in place, so that torch
differentiates, batches and traces it.

T steps, B rows, G gates, H hidden size. States are carried, and the step is computed, in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import masks
from ..cells import compute_dtype
from .declare import CellSpec
from .inputs import CellInputs, CellOptions, CellOutputs
from .trace import results

Step = Callable[..., tuple[Tensor, ...]]
"""gx [B, G·H], the states [B, H], inputs of the step, weights, b_hh, units -> the new states."""


def dense(w: Tensor, heads: int) -> Tensor:
    """A block-diagonal weight [m·H, H/n] as [m·H, H], zeros outside of each unit's head."""
    if heads == 1:
        return w
    each = w.shape[1]
    blocks = w.reshape(-1, heads, each, 1, each)
    here = torch.eye(heads, dtype=torch.bool, device=w.device)[:, None, :, None]
    return torch.where(here, blocks, 0).reshape(w.shape[0], heads * each)


def step_of(spec: CellSpec) -> Step:
    """The user's step on what it names."""
    recurrent = spec.recurrent
    weights = [name for name, _ in spec.weights[recurrent:]]
    inputs = [name for name, _, _ in spec.steps]
    has_a, has_gx, has_gh = (name in spec.arguments for name in ("a", "gx", "gh"))
    states = [(k, name) for k, name in enumerate(spec.states) if name in spec.arguments]

    def step(
        gx: Tensor,
        before: Sequence[Tensor],
        now: Sequence[Tensor],
        w: Sequence[Tensor],
        b_hh: Tensor | None,
        units: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(spec.options)
        given.update(zip(spec.units, units, strict=True))
        given.update(zip(weights, w[recurrent:], strict=True))
        given.update(zip(inputs, now, strict=True))
        for k, name in states:
            given[name] = before[k]
        if has_gx:
            given["gx"] = gx
        if recurrent:
            gh = F.linear(before[0], w[0], b_hh)
            if has_gh:
                given["gh"] = gh
            if has_a:
                given["a"] = gx + gh
        new = spec.step(**given)
        found = results(new, spec.states, *before[0].shape)
        return tuple([v if v.dtype == gx.dtype else v.to(gx.dtype) for v in found])

    return step


def guard(t: CellInputs, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
    """Where steps belong to rows, and before which the states are replaced: [T, B, 1] or None."""
    valid = masks.valid_mask(t.lengths, t.x.shape[0], t.x.device)
    return valid, masks.reset_mask(t.reset, valid, reverse)


def prepared(spec: CellSpec, t: CellInputs, valid: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """gx [T, B, G·H] and inputs of the steps [T, B, H] or [T, B, 1], with nothing of padding in them."""
    x = _without_padding(t.x, valid)
    gx = x if t.w_ih is None else F.linear(x, t.w_ih, t.b_ih)
    given = [v if kind == "unit" else v.unsqueeze(-1) for (_, kind, _), v in zip(spec.steps, t.steps, strict=True)]
    return gx, [_without_padding(v, valid) for v in given]


def _without_padding(v: Tensor, valid: Tensor | None) -> Tensor:
    """In its place what the row's step 0 has, or 1 in a row without steps. A step runs on it too, and one that divides
    by an input would have NaN in its derivatives at zero."""
    if valid is None or not len(v):
        return v
    return torch.where(valid, v, torch.where(valid[:1], v[:1], 1))


def order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _replaced(states: Sequence[Tensor], at: Tensor | None, by: Sequence[Tensor]) -> list[Tensor]:
    if at is None:
        return list(states)
    return [masks.replace(v, at, by[k] if by else None) for k, v in enumerate(states)]


def scan(
    spec: CellSpec, t: CellInputs, o: CellOptions
) -> tuple[list[list[Tensor]], list[Tensor], list[tuple[Tensor, ...]]]:
    """Everything in one floating dtype. Of each state its values after every step; the last states; and what every
    step started from, zeros where a row has ended."""
    steps, step = t.x.shape[0], step_of(spec)
    valid, resets = guard(t, o.reverse)
    gx, given = prepared(spec, t, valid)
    weights = [dense(w, o.heads) for w in t.weights]
    now = list(zip(*(v.unbind(0) for v in given), strict=True)) if given else [()] * steps
    inputs = gx.unbind(0)
    after: list[list[Tensor]] = [[v] * steps for v in t.states]
    before: list[tuple[Tensor, ...]] = [t.states] * steps
    states = list(t.states)
    for k in order(steps, o.reverse):
        if resets is not None:
            states = _replaced(states, resets[k], t.reset_states)
        # a row that does not live steps from zeros: NaN in its state must not reach a derivative of any order
        before[k] = tuple(states) if valid is None else tuple([v.masked_fill(~valid[k], 0) for v in states])
        new: Sequence[Tensor] = step(inputs[k], before[k], now[k], weights, t.b_hh, t.units)
        if valid is None:
            states = list(new)
        else:
            states = [torch.where(valid[k], v, old) for v, old in zip(new, states, strict=True)]
            new = [v.masked_fill(~valid[k], 0) for v in new]
        for values, v in zip(after, new, strict=True):
            values[k] = v
    if not steps:  # fresh memory, never an alias of what came in
        states = [v.clone() for v in states]
    return after, states, before


def stack(values: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(values)) if len(values) else like.new_zeros((0, *like.shape))


def outputs_in(t: CellInputs, o: CellOptions, after: list[list[Tensor]], last: list[Tensor]) -> CellOutputs:
    dtype = t.x.dtype
    y, *others = [stack(v, t.states[0]).to(dtype) for v in after[: None if o.all_states else 1]]
    return CellOutputs(y, tuple([torch.stack([v]).to(dtype) for v in last]), tuple(others))


def outputs(spec: CellSpec, t: CellInputs, o: CellOptions) -> CellOutputs:
    """The layer, in operators that torch can differentiate, batch and trace."""
    after, last, _ = scan(spec, t.to(compute_dtype(t.x.dtype)), o)
    return outputs_in(t, o, after, last)
