"""A custom layer in torch operators: the loop over time of the user's own step, and its derivative by autograd.

What every kernel is held against, and what runs a cell that kernels cannot. Nothing is written in place, so that torch
differentiates, batches and traces the forward. With lengths or resets a gradient goes step by step: autograd through
the whole loop would let a NaN pass that stands in padding or before a reset, since 0 · NaN is NaN.

T steps, B rows, G gates, H hidden size. States are carried, and the step is computed, in float32 or wider.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import masks
from ..cells import compute_dtype
from .declare import CellSpec
from .inputs import CellInputs, CellOptions, CellOutputs

Gradient = Tensor | None
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
    n, recurrent = len(spec.states), spec.recurrent
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
        if n == 1 and isinstance(new, Tensor):
            new = (new,)
        return states_returned(spec, new, before[0])

    return step


def states_returned(spec: CellSpec, new: object, like: Tensor) -> tuple[Tensor, ...]:
    """What a step gave back, checked: a tensor [B, H] for each state."""
    wanted = ", ".join(spec.states)
    if not isinstance(new, tuple | list) or len(new) != len(spec.states):
        got = f"{len(new)} values" if isinstance(new, tuple | list) else type(new).__name__
        got = "one tensor" if isinstance(new, Tensor) else got
        raise ValueError(f"{spec.name}.step returned {got}; its states are {wanted}: return {wanted}")
    for name, v in zip(spec.states, new, strict=True):
        if not isinstance(v, Tensor):
            raise TypeError(f"{spec.name}.step returned {type(v).__name__} for {name}; it must be a tensor [B, H]")
        if v.shape != like.shape:
            raise ValueError(
                f"{spec.name}.step returned {name} of shape {list(v.shape)}; it must be [B, H] = {list(like.shape)}"
            )
    return tuple([v if v.dtype == like.dtype else v.to(like.dtype) for v in new])


def _guard(t: CellInputs, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
    """Where steps belong to rows, and before which the states are replaced: [T, B, 1] or None."""
    valid = masks.valid_mask(t.lengths, t.x.shape[0], t.x.device)
    return valid, masks.reset_mask(t.reset, valid, reverse)


def _prepared(spec: CellSpec, t: CellInputs, valid: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """gx [T, B, G·H] and inputs of the steps [T, B, H] or [T, B, 1], with nothing of padding in them."""
    x = t.x if valid is None else t.x.masked_fill(~valid, 0)
    gx = x if t.w_ih is None else F.linear(x, t.w_ih, t.b_ih)
    given = [v if kind == "unit" else v.unsqueeze(-1) for (_, kind, _), v in zip(spec.steps, t.steps, strict=True)]
    return gx, given if valid is None else [v.masked_fill(~valid, 0) for v in given]


def _order(steps: int, reverse: bool) -> range:
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
    valid, resets = _guard(t, o.reverse)
    gx, given = _prepared(spec, t, valid)
    weights = [dense(w, o.heads) for w in t.weights]
    now = list(zip(*(v.unbind(0) for v in given), strict=True)) if given else [()] * steps
    inputs = gx.unbind(0)
    after: list[list[Tensor]] = [[v] * steps for v in t.states]
    before: list[tuple[Tensor, ...]] = [t.states] * steps
    states = list(t.states)
    for k in _order(steps, o.reverse):
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


def _stack(values: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(values)) if len(values) else like.new_zeros((0, *like.shape))


def _outputs(t: CellInputs, o: CellOptions, after: list[list[Tensor]], last: list[Tensor]) -> CellOutputs:
    dtype = t.x.dtype
    y, *others = [_stack(v, t.states[0]).to(dtype) for v in after[: None if o.all_states else 1]]
    return CellOutputs(y, tuple([v.to(dtype) for v in last]), tuple(others))


def outputs(spec: CellSpec, t: CellInputs, o: CellOptions) -> CellOutputs:
    """The layer, in operators that torch can differentiate, batch and trace."""
    after, last, _ = scan(spec, t.to(compute_dtype(t.x.dtype)), o)
    return _outputs(t, o, after, last)


name = "reference"


def unsupported(*_: object) -> list[str]:
    """It takes every cell."""
    return []


def forward(spec: CellSpec, t: CellInputs, o: CellOptions, train: bool) -> tuple[CellOutputs, tuple[Tensor, ...]]:
    """The outputs, and with `train` what every step started from, [T, B, H] for each state."""
    wide = t.to(compute_dtype(t.x.dtype))
    after, last, before = scan(spec, wide, o)
    keep = train and not o.recompute
    saved = [_stack([states[k] for states in before], v) for k, v in enumerate(wide.states)] if keep else []
    return _outputs(t, o, after, last), tuple(saved)


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
    valid, resets = _guard(t, o.reverse)
    guarded = valid is not None or resets is not None
    step, (gx, given) = step_of(spec), _prepared(spec, t, valid)
    if saved and not again:
        before: Sequence[Sequence[Tensor]] = list(zip(*(v.unbind(0) for v in saved), strict=True))
    else:
        before = scan(spec, t, o)[2]
    gy = None if grads.y is None else grads.y.to(wide)
    g_all = [None if g is None else g.to(wide) for g in grads.all]
    carried = [torch.zeros_like(v) if g is None else g.to(wide) for v, g in zip(t.states, grads.last, strict=True)]

    grad_of = functools.partial(_live, again=again)
    weights = [grad_of(dense(w, o.heads)) for w in t.weights]
    fixed = [*weights, *([] if t.b_hh is None else [grad_of(t.b_hh)]), *map(grad_of, t.units)]
    sums: list[Tensor | None] = [None] * len(fixed)
    d_gx: list[Tensor] = [gx] * steps
    d_given: list[list[Tensor]] = [[v] * steps for v in given]
    d_reset: list[Tensor | None] = [None] * count
    for k in _order(steps, not o.reverse):
        received = list(carried)
        if gy is not None:
            received[0] = received[0] + gy[k]
        received[1:] = [r if g is None else r + g[k] for r, g in zip(received[1:], g_all or [None] * count)]
        if valid is not None:
            received = [g.masked_fill(~valid[k], 0) for g in received]
        varying = [gx[k], *before[k], *(v[k] for v in given)]
        if guarded:
            dead = functools.reduce(torch.logical_and, [(g == 0).all(-1, keepdim=True) for g in received])
            varying = [v.masked_fill(dead, 0) for v in varying]
        varying = [grad_of(v) for v in varying]
        found = _step_vjp(step, varying, count, fixed, len(weights), t.b_hh is not None, received, again)
        d_varying, d_fixed = found[: len(varying)], found[len(varying) :]
        if guarded:
            d_varying = [g.masked_fill(dead, 0) for g in d_varying]
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
        *_projection(t, _stack(d_gx, gx.new_zeros(gx.shape[1:])), guarded, carried),
        None if t.b_hh is None else totals[len(d_weights)],
        *d_weights,
        *totals[after:],
        *(_stack(d, v.new_zeros(v.shape[1:])).reshape(g.shape) for d, v, g in zip(d_given, given, t.steps)),
        None,
        None,
        *([torch.zeros_like(v) if g is None else g for v, g in zip(t.reset_states, d_reset)]),
    ]
    return [
        None if g is None or v is None or not need else g.to(v.dtype)
        for g, v, need in zip(every, own.flat(), needs, strict=True)
    ]


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
