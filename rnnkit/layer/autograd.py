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
from ..backends import REFERENCE, Backend, LayerInputs, LayerOptions, LayerOutputs, Result
from ..cells import CELLS
from . import streams
from .custom_ops import run_backward, run_forward, second_backward
from .profiler import as_row, named, recording

_transforming = checks.transforming
_batched = torch._C._functorch.is_legacy_batchedtensor  # what autograd.grad(is_grads_batched=True) hands to a backward
_MISSING = (None,) * 4  # what is left out at the end of four outputs
_NOTHING = torch.empty(0)


def any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd has to record a call with these tensors, where it is on."""
    return any(v is not None and v.requires_grad for v in tensors)


def direct(cell: str, backend: Backend, t: LayerInputs, o: LayerOptions, train: bool) -> LayerOutputs:
    """The backend itself on plain tensors, below an autograd function when a gradient is wanted."""
    if not backend.takes_none_states:
        t = t.with_zero_states(CELLS[cell].has_c)
    if not train:
        if recording():
            return LayerOutputs(*as_row(cell, lambda: backend.forward(cell, t, o, train=False).outputs, t))
        return backend.forward(cell, t, o, train=False).outputs
    found = named(LayerFunction, cell).apply((cell, backend, o), *t)
    return LayerOutputs(*found, *_MISSING[len(found) :])


def direct_layer(backend: Backend, cell: str, *tensors: Any, **how: Any) -> LayerOutputs:
    """`ops.layer` by a backend that was chosen before; under a transform the reference's formulas."""
    t, o = checks.layer(cell, *tensors, **how)
    if _transforming():
        return REFERENCE.forward(cell, t.with_zero_states(CELLS[cell].has_c), o, train=False).outputs
    return direct(cell, backend, t, o, True)


def save_for_backward(
    ctx: Any, tensors: Sequence[Tensor | None], y: Tensor, kept: Sequence[Tensor], *, guard: bool
) -> None:
    """Save inputs, y and what the backend keeps. Where torch's layers let a program change y in place before the
    backward, `guard` holds a counter of its changes with it."""
    if not guard:
        ctx.save_for_backward(*tensors, y, *kept)
        return
    ctx.save_for_backward(*tensors, y.data, *kept)
    counter = y.detach()  # counts the changes of y,
    counter.data = _NOTHING  # but does not keep its memory
    ctx.version_guard = counter, counter._version


def was_changed(ctx: Any) -> bool:
    """Whether the y that was saved has been changed in place since."""
    return ctx.version_guard is not None and ctx.version_guard[0]._version != ctx.version_guard[1]


def is_differentiated(grads: Iterable[Tensor | None]) -> bool:
    """Whether a backward's results are to be differentiated again, or batched: torch's own operators give them."""
    return torch.is_grad_enabled() or _transforming() or any(_batched(g) for g in grads if g is not None)


class LayerFunction(torch.autograd.Function):
    """A backend's forward and backward as one node of torch's graph. Takes `LayerInputs`."""

    @staticmethod
    def forward(ctx: Any, how: tuple[str, Backend, LayerOptions], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The outputs that there are: y, h_n, then for an LSTM c_n, and c_all where it is asked for."""
        cell, backend, o = how
        outputs, saved, graph = backend.forward(cell, LayerInputs(*tensors), o, train=True, graph=True)  # type: ignore[arg-type]
        given = outputs[: 2 if outputs.c_n is None else 3 if outputs.c_all is None else 4]
        ctx.how, ctx.graph, ctx.version_guard, ctx.side = how, graph, None, streams.current_side_stream()
        if graph is not None:
            ctx.save_for_backward(*tensors)
        else:
            save_for_backward(ctx, tensors, outputs.y, saved, guard=len(given) == 2)
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
        cell, backend, o = ctx.how
        saved = ctx.saved_tensors  # once: hooks such as checkpoint's unpack at each access
        needs = list(ctx.needs_input_grad[1:])
        t, kept = LayerInputs(*saved[: len(needs)]), saved[len(needs) :]
        if all(g is None for g in grads):
            return (None,) * (1 + len(needs))
        given = LayerOutputs(*grads, *_MISSING[len(grads) :])  # type: ignore[arg-type]
        if is_differentiated(grads):
            found = second_backward(cell, t.with_zero_states(CELLS[cell].has_c), o, given, needs)
        else:
            y, result = kept[0] if kept else t.x, Result(given, kept[1:], ctx.graph)
            if was_changed(ctx):  # make y again
                result = run_forward(backend.name, cell, t, o, train=True, graph=False)
                y = result.outputs.y
            found = run_backward(backend.name, cell, t, o, y, result, given, needs)
        return (None, *found)
