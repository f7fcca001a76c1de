"""The derivative of a custom layer, by autograd of the user's own step.

With lengths or resets it goes step by step: autograd through the whole loop would let a NaN pass that stands in padding
or before a reset, since 0 · NaN is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import compute_dtype
from . import scan
from .declare import CellSpec
from .inputs import CellInputs, CellOptions, CellOutputs, unflat
from .scan import Step, dense, guard, order, prepared, stack, step_of

Gradient = Tensor | None
_batched = torch._C._functorch.is_legacy_batchedtensor  # what autograd.grad(is_grads_batched=True) hands to a backward


def vjp(
    spec: CellSpec,
    t: CellInputs,
    o: CellOptions,
    saved: Sequence[Tensor],
    grads: CellOutputs,
    needs: Sequence[bool],
    *,
    again: bool,
) -> list[Gradient]:
    """The gradients step by step, the last one first. again: in terms of live inputs, for a further derivative.

    With lengths or resets, a row whose incoming gradient is all zero passes on zeros, whatever stands there.
    """
    own, t = t, t.to(compute_dtype(t.x.dtype))
    wide, steps, count = t.x.dtype, t.x.shape[0], len(t.states)
    valid, resets = guard(t, o.reverse)
    guarded = valid is not None or resets is not None
    step, (gx, given) = step_of(spec), prepared(spec, t, valid)
    if saved and not again:
        before: Sequence[Sequence[Tensor]] = list(zip(*(v.unbind(0) for v in saved), strict=True))
    else:
        before = scan.scan(spec, t, o)[2]
    gy = None if grads.y is None else grads.y.to(wide)
    g_all = [None if g is None else g.to(wide) for g in grads.all]
    carried = [torch.zeros_like(v) if g is None else g[0].to(wide) for v, g in zip(t.states, grads.last, strict=True)]

    grad_of = functools.partial(_live, again=again)
    weights = [grad_of(dense(w, o.heads)) for w in t.weights]
    fixed = [*weights, *([] if t.b_hh is None else [grad_of(t.b_hh)]), *map(grad_of, t.units)]
    sums: list[Tensor | None] = [None] * len(fixed)
    d_gx: list[Tensor] = [gx] * steps
    d_given: list[list[Tensor]] = [[v] * steps for v in given]
    d_reset: list[Tensor | None] = [None] * count
    for k in order(steps, not o.reverse):
        received = list(carried)
        if gy is not None:
            received[0] = received[0] + gy[k]
        for s, g in enumerate(g_all, 1):
            received[s] = received[s] if g is None else received[s] + g[k]
        if valid is not None:
            received = [g.masked_fill(~valid[k], 0) for g in received]
        varying = [gx[k], *before[k], *(v[k] for v in given)]
        if guarded:
            dead = functools.reduce(torch.logical_and, [(g == 0).all(-1, keepdim=True) for g in received])
            nobody = dead.all()
            varying = [_of_the_living(v, dead, nobody) for v in varying]
        varying = [grad_of(v) for v in varying]
        found = _step_vjp(step, varying, count, fixed, len(weights), t.b_hh is not None, received, again)
        d_varying, d_fixed = found[: len(varying)], found[len(varying) :]
        if guarded:
            d_varying = [g.masked_fill(dead, 0) for g in d_varying]
            d_fixed = [g.masked_fill(nobody, 0) for g in d_fixed]
        d_gx[k] = d_varying[0]
        for values, g in zip(d_given, d_varying[1 + count :], strict=True):
            values[k] = g
        sums = [g if total is None else total + g for total, g in zip(sums, d_fixed, strict=True)]
        d_before = d_varying[1 : 1 + count]
        if valid is not None:
            d_before = [torch.where(valid[k], g, old) for g, old in zip(d_before, carried, strict=True)]
        if resets is not None:
            cut = [g.masked_fill(~resets[k], 0) for g in d_before]
            d_reset = [g if total is None else total + g for total, g in zip(d_reset, cut, strict=True)]
            d_before = [g.masked_fill(resets[k], 0) for g in d_before]
        carried = d_before

    totals = [torch.zeros_like(v) if g is None else g for v, g in zip(fixed, sums, strict=True)]
    d_weights = [_compact(g, w, o.heads) for g, w in zip(totals, t.weights, strict=False)]
    after = len(d_weights) + (t.b_hh is not None)
    every: list[Gradient] = [
        *_projection(t, stack(d_gx, gx.new_zeros(gx.shape[1:])), guarded, carried),
        None if t.b_hh is None else totals[len(d_weights)],
        *d_weights,
        *totals[after:],
        *(stack(d, v.new_zeros(v.shape[1:])).reshape(g.shape) for d, v, g in zip(d_given, given, t.steps, strict=True)),
        None,
        None,
        *(torch.zeros_like(v) if g is None else g for v, g in zip(t.reset_states, d_reset, strict=False)),
    ]
    return [
        None if g is None or v is None or not need else g.to(v.dtype)
        for g, v, need in zip(every, own.flat(), needs, strict=True)
    ]


def _of_the_living(v: Tensor, dead: Tensor, nobody: Tensor) -> Tensor:
    """v [B, m], in dead rows the values of the first that lives, where derivatives are finite if they are at all; zeros
    where nobody does."""
    alive = v.index_select(0, (~dead).flatten().byte().argmax(0, keepdim=True))
    return torch.where(dead, alive.masked_fill(nobody, 0), v)


def _live(v: Tensor, *, again: bool) -> Tensor:
    """`v` as something that a gradient may be asked for: of this use of it alone, also where it is used twice."""
    return v.view_as(v) if again and v.requires_grad else v.detach().requires_grad_()


def _step_vjp(
    step: Step,
    varying: list[Tensor],
    count: int,
    fixed: list[Tensor],
    weights: int,
    biased: bool,
    received: list[Tensor],
    again: bool,
) -> list[Tensor]:
    """Gradients of one step's inputs, those that vary and those that do not, from those of the states after it."""
    wanted = [*varying, *fixed]
    with torch.enable_grad():
        gx, before, now = varying[0], varying[1 : 1 + count], varying[1 + count :]
        rest = fixed[weights:]
        b_hh = rest.pop(0) if biased else None
        new = step(gx, before, now, fixed[:weights], b_hh, rest)
        pairs = [(v, g) for v, g in zip(new, received, strict=True) if v.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            ends, gradients = zip(*pairs, strict=True)
            found = torch.autograd.grad(ends, wanted, gradients, create_graph=again, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(wanted, found, strict=True)]


def _compact(g: Tensor, w: Tensor, heads: int) -> Tensor:
    """The gradient of a block-diagonal weight from that of its dense form."""
    if heads == 1:
        return g
    each = w.shape[1]
    blocks = g.reshape(-1, heads, each, heads, each)
    return torch.diagonal(blocks, dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(w.shape)


def _projection(t: CellInputs, d_gx: Tensor, guarded: bool, d_states: list[Tensor]) -> list[Gradient]:
    """Gradients of x, the states, w_ih and b_ih."""
    if t.w_ih is None:
        return [d_gx, *d_states, None, None]
    x = t.x.masked_fill((d_gx == 0).all(-1, keepdim=True), 0) if guarded else t.x
    rows = d_gx.shape[0] * d_gx.shape[1]  # flatten has no rule for autograd.grad(is_grads_batched=True)
    flat = d_gx.reshape(rows, d_gx.shape[2])
    d_w_ih = flat.T @ x.reshape(rows, x.shape[2])
    return [d_gx @ t.w_ih, *d_states, d_w_ih, None if t.b_ih is None else flat.sum(0)]


def differentiable_backward(
    spec: CellSpec, t: CellInputs, o: CellOptions, grads: CellOutputs, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients as a function that torch can differentiate again, or batch: by the reference."""
    again = torch.is_grad_enabled()
    batched = any(g is not None and _batched(g) for g in (grads.y, *grads.last, *grads.all))
    if again and not batched and (t.lengths is not None or t.reset is not None):
        return vjp(spec, t, o, (), grads, needs, again=again)
    with torch.enable_grad():
        flat = t.flat()
        # views: what is asked for is the gradient of each alone, also where one of them was made of another
        live: Any = [v.view_as(v) if v is not None and need else v for v, need in zip(flat, needs, strict=True)]
        if not again:
            live = [v.detach().requires_grad_() if v is not None and n else v for v, n in zip(live, needs, strict=True)]
        y, last, every = scan.outputs(spec, unflat(spec, live), o)
        pairs: Any = zip((y, *last, *every), (grads.y, *grads.last, *grads.all), strict=True)
        pairs = [(v, g) for v, g in pairs if g is not None and v.requires_grad]
        wanted = [v for v, need in zip(live, needs, strict=True) if need]
        ends, received = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ends, wanted, received, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needs]
