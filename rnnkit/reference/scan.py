"""The loop over time that every cell shares: order, lengths, resets, and what a backward needs.

Shapes: T steps (n of them in a range), B rows, H hidden size, G gates, N the state's size (P with a projection).
Nothing is written in place, so torch differentiates the forward to any order; the backward is written in torch
operators too and can be differentiated in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import masks
from .step import Gradients, State, Step, Weights

StepFunction = Callable[[Tensor, State, Weights], Step]
StepVJP = Callable[[Tensor, Tensor | None, State, Step, Weights], Gradients]


class LengthsAndResets(NamedTuple):
    """Lengths [B], resets [T, B] bool, and the states [B, N], [B, H] that a reset puts in place; None where absent."""

    lengths: Tensor | None = None
    reset: Tensor | None = None
    h_reset: Tensor | None = None
    c_reset: Tensor | None = None


def _stack(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(parts) if parts else like.new_zeros((0, *like.shape))


def forward(
    step: StepFunction,
    gx: Tensor,
    start: State,
    w: Weights,
    masking: LengthsAndResets,
    *,
    t0: int = 0,
    reverse: bool = False,
) -> tuple[Tensor, State, Tensor | None, Tensor | None]:
    """States after each step of the range [t0, t0 + n), and what its backward needs.

    gx: [n, B, G·H] as `rnnkit.backends.scan_backend.project` makes it. start: the state before the first step that is
    processed (the last in time, in reverse). Returns y [n, B, N], the final state, c_all [n, B, H] or None, gates
    [n, B, S·H] or None.
    """
    n = gx.shape[0]
    total = masking.reset.shape[0] if masking.reset is not None else t0 + n
    valid = masks.valid_mask(masking.lengths, total, gx.device)
    resets = masks.reset_mask(masking.reset, valid, reverse)
    inputs = gx.unbind(0)
    state = start
    ys: list[Tensor] = [start.h] * n
    cs: list[Tensor | None] = [None] * n
    gates: list[Tensor | None] = [None] * n
    for k in reversed(range(n)) if reverse else range(n):
        t = t0 + k
        if resets is not None:
            h = masks.replace(state.h, resets[t], masking.h_reset)
            c = None if state.c is None else masks.replace(state.c, resets[t], masking.c_reset)
            state = State(h, c)
        # a row that does not live steps from zeros: NaN in its state must not reach a derivative of any order
        entering = state if valid is None else _masked(state, ~valid[t])
        new = step(inputs[k], entering, w)
        ys[k], cs[k], gates[k] = new.h, new.c, new.gates
        if valid is None:
            state = State(new.h, new.c)
        else:
            ys[k] = new.h.masked_fill(~valid[t], 0)
            h = torch.where(valid[t], new.h, state.h)
            if new.c is None or state.c is None:
                state = State(h, None)
            else:
                cs[k] = new.c.masked_fill(~valid[t], 0)
                state = State(h, torch.where(valid[t], new.c, state.c))
    if n == 0:  # fresh memory, never an alias of what came in
        state = State(start.h.clone(), None if start.c is None else start.c.clone())
    c_all = None if start.c is None else _stack([c for c in cs if c is not None], start.c)
    width = [g for g in gates if g is not None]
    return _stack(ys, start.h), state, c_all, torch.stack(width) if width else None


def _masked(state: State, where: Tensor) -> State:
    return State(state.h.masked_fill(where, 0), None if state.c is None else state.c.masked_fill(where, 0))


class ScanGradients(NamedTuple):
    """Gradients of a scan. dgx, dgh: [T, B, G·H]; dh_0, dh_reset: [B, N]; dc_0, dc_reset: [B, H]; dp: [T, B, P]."""

    dgx: Tensor
    dgh: Tensor
    dh_0: Tensor
    dc_0: Tensor | None
    dh_reset: Tensor | None
    dc_reset: Tensor | None
    dp: Tensor | None
    """With a projection: the whole gradient of the projected state, for the gradient of W_hr."""


def backward(
    step_vjp: StepVJP,
    gy: Tensor | None,
    gh_n: Tensor | None,
    gc_n: Tensor | None,
    gc_all: Tensor | None,
    y: Tensor,
    c_all: Tensor | None,
    gates: Tensor | None,
    start: State,
    w: Weights,
    masking: LengthsAndResets,
    *,
    reverse: bool = False,
) -> ScanGradients:
    """Gradients of `forward` over the whole range of time, given those of its results (None: zeros).

    With lengths or resets, a row whose incoming gradient is all zero passes on zeros, whatever was saved for it:
    so NaN in padding or before a reset reaches no gradient.
    """
    steps = y.shape[0]
    valid = masks.valid_mask(masking.lengths, steps, y.device)
    resets = masks.reset_mask(masking.reset, valid, reverse)
    h_before = masks.previous(y, start.h, masking.lengths, resets, masking.h_reset, reverse)
    c_before = None
    if c_all is not None and start.c is not None:
        c_before = masks.previous(c_all, start.c, masking.lengths, resets, masking.c_reset, reverse)
    guarded = valid is not None or resets is not None

    dh = torch.zeros_like(start.h) if gh_n is None else gh_n
    dc = None if start.c is None else (torch.zeros_like(start.c) if gc_n is None else gc_n)
    dh_reset = None if resets is None else torch.zeros_like(start.h)
    dc_reset = None if resets is None or start.c is None else torch.zeros_like(start.c)
    dgx: list[Tensor] = [y] * steps
    dgh: list[Tensor] = [y] * steps
    dp: list[Tensor] = [y] * steps
    for t in range(steps) if reverse else reversed(range(steps)):
        state = State(h_before[t], None if c_before is None else c_before[t])
        state = state if valid is None else _masked(state, ~valid[t])
        new = Step(y[t], None if c_all is None else c_all[t], None if gates is None else gates[t])
        dh_new = dh if gy is None else dh + gy[t]
        dc_new = dc if gc_all is None or dc is None else dc + gc_all[t]
        if valid is not None:
            dh_new = dh_new.masked_fill(~valid[t], 0)
            dc_new = None if dc_new is None else dc_new.masked_fill(~valid[t], 0)
        g = step_vjp(dh_new, dc_new, state, new, w)
        if guarded:
            dead = (dh_new == 0).all(-1, keepdim=True)
            if dc_new is not None:
                dead = dead & (dc_new == 0).all(-1, keepdim=True)
            g = Gradients(*(None if v is None else v.masked_fill(dead, 0) for v in g))  # type: ignore[arg-type]
        dgx[t], dgh[t], dp[t] = g.dgx, g.dgh, dh_new
        if valid is None:
            dh, dc = g.dh, g.dc
        else:
            dh = torch.where(valid[t], g.dh, dh)
            dc = None if g.dc is None or dc is None else torch.where(valid[t], g.dc, dc)
        if resets is not None and dh_reset is not None:
            dh_reset = dh_reset + dh.masked_fill(~resets[t], 0)
            dh = dh.masked_fill(resets[t], 0)
            if dc is not None and dc_reset is not None:
                dc_reset = dc_reset + dc.masked_fill(~resets[t], 0)
                dc = dc.masked_fill(resets[t], 0)
    width = y.new_zeros((y.shape[1], w.w_hh.shape[0]))
    return ScanGradients(
        _stack(dgx, width),
        _stack(dgh, width),
        dh,
        dc,
        dh_reset,
        dc_reset,
        None if w.w_hr is None else _stack(dp, start.h),
    )
