"""A layer in eager mode: the backend itself, below an autograd function when a gradient is wanted.

The backward runs the backend's own, or, where what it gives is to be differentiated again or is batched, the
reference's formulas in torch's operators. It holds y without keeping its memory from a program that changes it in
place, as torch's RNN and GRU allow, and makes y again where that happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import Backend, LayerInputs, LayerOptions, LayerOutputs, Result
from ..cells import CELLS
from . import streams
from .custom_ops import run_backward, run_forward, second_backward

_modes, _transforming = checks.dispatch_modes, checks.transforming
_batched = torch._C._functorch.is_legacy_batchedtensor  # what autograd.grad(is_grads_batched=True) hands to a backward
_grad = torch.is_grad_enabled
_MISSING = (None,) * 4  # what is left out at the end of four weights or four outputs
_BARE = 7  # what the simplest layer has of `LayerInputs`: x to b_hh
_NOTHING = torch.empty(0)


def any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd has to record a call with these tensors, where it is on."""
    return any(v is not None and v.requires_grad for v in tensors)


def direct(cell: str, backend: Backend, t: LayerInputs, o: LayerOptions, train: bool) -> LayerOutputs:
    """The backend itself on plain tensors, below an autograd function when a gradient is wanted."""
    if not backend.validates_inputs:
        t = t.with_zero_states(CELLS[cell].has_c)
    if not train:
        return backend.forward(cell, t, o, train=False).outputs
    bare = t.w_hr is None and t.lengths is None and t.reset is None
    found: tuple[Tensor, ...] = LayerFunction.apply((cell, backend, o, None), *(t[:_BARE] if bare else t))
    return LayerOutputs(*found, *_MISSING[len(found) :])


How = tuple[str, Backend, LayerOptions, bool | None]
"""Cell, backend, options; whether a `single` is batch first, None for any other layer."""


class LayerFunction(torch.autograd.Function):
    """A backend's forward and backward as one node of torch's graph. Takes `LayerInputs`, without trailing Nones."""

    @staticmethod
    def forward(ctx: Any, how: How, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The outputs that there are: y, h_n, then for an LSTM c_n, and c_all where it is asked for."""
        cell, backend, o, batch_first = how
        graph = None
        if batch_first is None:
            outputs, saved, graph = backend.forward(cell, LayerInputs(*tensors), o, train=True, graph=True)  # type: ignore[arg-type]
            given = outputs[: 2 if outputs.c_n is None else 3 if outputs.c_all is None else 4]
        else:
            given, saved = _run_single(how, tensors)
        ctx.how, ctx.graph, ctx.version_guard, ctx.side = how, graph, None, streams.current_side_stream()
        y: Tensor = given[0]  # type: ignore[assignment]
        if graph is not None:
            ctx.save_for_backward(*tensors)
        elif len(given) > 2:
            ctx.save_for_backward(*tensors, y, *saved)
        else:  # torch's RNN and GRU let a program change y in place before the backward
            ctx.save_for_backward(*tensors, y.data, *saved)
            counter = y.detach()  # counts the changes of y,
            counter.data = _NOTHING  # but does not keep its memory
            ctx.version_guard = counter, counter._version
        ctx.set_materialize_grads(False)
        return given  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of `how` (none) and of the tensors, from those of the outputs."""
        if ctx.side is None:
            return LayerFunction._gradients(ctx, *grads)
        try:
            return LayerFunction._gradients(ctx, *grads)
        finally:
            ctx.side.join()  # before autograd lets go of what was saved

    @staticmethod
    def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell, backend, o, batch_first = ctx.how
        saved = ctx.saved_tensors  # once: hooks such as checkpoint's unpack at each access
        needs = ctx.needs_input_grad[1:]
        count = len(needs)
        inputs, kept = saved[:count], saved[count:]
        changed = ctx.version_guard is not None and ctx.version_guard[0]._version != ctx.version_guard[1]
        received = [g for g in grads if g is not None]
        if not received:
            return (None,) * (1 + count)
        # create_graph, batched gradients: torch's own operators
        through_graph = _grad() or _transforming() or any(map(_batched, received))
        if batch_first is not None and not through_graph and not _modes():
            if changed:
                (y, *_), kept = _run_single(ctx.how, inputs)
                kept = (y, *kept)
            found = backend.single_backward(cell, inputs, batch_first, kept[0], kept[1:], grads, needs)
            if found is not None:
                return (None, *found)
        t, given = _as_layer(batch_first, LayerInputs(*inputs), LayerOutputs(*grads, *_MISSING[len(grads) :]))  # type: ignore[arg-type]
        wanted = [*needs, *(False,) * (len(t) - count)]
        if through_graph:
            found = second_backward(cell, t.with_zero_states(CELLS[cell].has_c), o, given, wanted)
        else:
            y, result = kept[0] if kept else t.x, Result(given, kept[1:], ctx.graph)
            if batch_first is True:
                y = y.transpose(0, 1)
            if changed:  # make y again
                result = run_forward(backend.name, cell, t, o, train=True, graph=False)
                y = result.outputs.y
            found = run_backward(backend.name, cell, t, o, y, result, given, wanted)
        return (None, *_as_single(batch_first, found[:count]))


def _run_single(how: How, tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The forward of a `single`: its outputs, and what it saves."""
    cell, backend, _, batch_first = how
    made = backend.single(cell, *tensors, batch_first, True)  # type: ignore[arg-type,call-arg]
    if made is None:
        raise RuntimeError("rnnkit: not every tensor is plain")
    outputs = 3 if cell == "lstm" else 2
    return tuple(made[:outputs]), tuple(made[outputs:])


def _as_layer(batch_first: bool | None, t: LayerInputs, grads: LayerOutputs) -> tuple[LayerInputs, LayerOutputs]:
    """Inputs and gradients of a `single` in the layouts of a layer. Any other's as they are."""
    if batch_first is None:
        return t, grads
    states = [None if v is None else v[0] for v in (t.h_0, t.c_0, grads.h_n, grads.c_n)]
    x, gy = t.x, grads.y
    if batch_first:
        x, gy = x.transpose(0, 1), None if gy is None else gy.transpose(0, 1)
    return t._replace(x=x, h_0=states[0], c_0=states[1]), LayerOutputs(gy, states[2], states[3], None)  # type: ignore[arg-type]


def _as_single(batch_first: bool | None, found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients of a layer in the layouts of a `single`, where it was one."""
    if batch_first is None:
        return found
    dx, dh, dc, *weights = found
    if dx is not None and batch_first:
        dx = dx.transpose(0, 1)
    return dx, None if dh is None else dh[None], None if dc is None else dc[None], *weights
