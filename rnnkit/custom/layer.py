"""One layer of a custom cell, one direction, all T: the autograd boundary of custom cells.

What happens, in order: autocast; the choice of a backend; the reference's formulas where a transform asks for a
function it can differentiate (vmap, torch.func, forward mode) or for a graph of torch's own operators (tracing, ONNX);
one opaque operator under compile and export; else the backend itself, below an autograd function when a gradient is
wanted. What such a function gives is differentiated again, or batched, by the reference on live inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks
from ..autocast import autocasting, no_autocast
from ..backends import asked
from ..layer.autograd import any_requires_grad, is_differentiated, save_for_backward, was_changed
from ..layer.profiler import annotated, as_row, named, recording
from . import choose, derivative, operators, scan
from .choose import Asked, Choice
from .declare import CellSpec
from .facts import report
from .inputs import CellInputs, CellOptions, CellOutputs, outputs_of, unflat

_plain_eager, _transforming = checks.is_plain_eager, checks.transforming


def run(spec: CellSpec, hidden: int, t: CellInputs, o: CellOptions, backend: str = "auto") -> CellOutputs:
    """One layer in one direction, of hidden size `hidden`. `t` is checked already.

    Raises NotImplementedError where a named backend cannot run it.
    """
    device = t.x.device.type
    if autocasting(device):
        wide = torch.float64 in (t.x.dtype, t.weights[0].dtype if t.weights else t.x.dtype)
        t = t.to(torch.float64 if wide else torch.get_autocast_dtype(device))
        with no_autocast(device):
            return _run(spec, hidden, t, o, asked(backend))
    return _run(spec, hidden, t, o, asked(backend))


def _run(spec: CellSpec, hidden: int, t: CellInputs, o: CellOptions, backend: str) -> CellOutputs:
    flat, device, dtype = t.flat(), t.x.device.type, t.x.dtype
    plain = _plain_eager(*flat) and not t.x.is_meta
    train = torch.is_grad_enabled() and any_requires_grad(flat)
    if not plain:
        t = t.with_zero_states(hidden)
        name = choose.choose_by_key(spec.key, hidden, device, dtype, *o, backend)
        return _traced(spec, name, t, o, train)
    chosen = choose.choose(spec, Asked(hidden, device, dtype, o), backend)
    report(spec, hidden, t, o, backend, chosen.name, train)
    return _direct(spec, hidden, chosen, t, o, train)


def _direct(spec: CellSpec, hidden: int, chosen: Choice, t: CellInputs, o: CellOptions, train: bool) -> CellOutputs:
    """The backend itself on plain tensors, below an autograd function when a gradient is wanted."""
    if not chosen.backend.takes_none_states:
        t = t.with_zero_states(hidden)
    if not train:
        if recording():
            return _as_row(spec, chosen, t, o)
        return chosen.backend.forward(chosen.plan, t, o, False)[0]
    if chosen.name == "reference" and t.lengths is None and t.reset is None:
        return _formulas(spec, t, o)
    found = named(CellFunction, spec.name).apply((spec, hidden, chosen, o), t, *t.flat())
    return outputs_of(spec, o, found)


def _as_row(spec: CellSpec, chosen: Choice, t: CellInputs, o: CellOptions) -> CellOutputs:
    """The same, where a profiler records."""

    def forward() -> tuple[Tensor, ...]:
        return _flat(chosen.backend.forward(chosen.plan, t, o, False)[0])

    return outputs_of(spec, o, as_row(spec.name, forward, t.flat()))


def _formulas(spec: CellSpec, t: CellInputs, o: CellOptions) -> CellOutputs:
    """The reference, for torch to differentiate, batch or trace."""
    return outputs_of(spec, o, annotated(spec.name, lambda: _flat(scan.outputs(spec, t, o)), t.flat()))


def _flat(outputs: CellOutputs) -> tuple[Tensor, ...]:
    y, last, every = outputs
    return y, *last, *every


def _traced(spec: CellSpec, backend: str, t: CellInputs, o: CellOptions, train: bool) -> CellOutputs:
    """Where torch, or somebody, looks at what is called."""
    compiling = torch.compiler.is_compiling()
    opaque = compiling and not torch.onnx.is_in_onnx_export() and not operators.compiling_a_transform()
    if not opaque and (compiling or torch.jit.is_tracing() or _transforming() or forward_ad._current_level >= 0):
        return _formulas(spec, t, o)
    return operators.forward(spec, backend, t, o, train)


class CellFunction(torch.autograd.Function):
    """A backend's forward and backward as one node of torch's graph. Takes `CellInputs`, then the same flat."""

    @staticmethod
    def forward(
        ctx: Any, how: tuple[CellSpec, int, Choice, CellOptions], t: CellInputs, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        _, _, chosen, o = ctx.how = how
        (y, last, every), saved = chosen.backend.forward(chosen.plan, t, o, True)
        ctx.version_guard = None
        save_for_backward(ctx, flat, y, saved, guard=True)
        ctx.set_materialize_grads(False)
        return y, *last, *every

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors, from those of the outputs."""
        spec, hidden, chosen, o = ctx.how
        kept = ctx.saved_tensors  # once: hooks such as checkpoint's unpack at each access
        needs = list(ctx.needs_input_grad[2:])
        if all(g is None for g in grads):
            return (None,) * (2 + len(needs))
        t, y, saved = unflat(spec, kept[: len(needs)]), kept[len(needs)], kept[len(needs) + 1 :]
        given = outputs_of(spec, o, grads)  # type: ignore[arg-type]
        with no_autocast(t.x.device.type):
            if is_differentiated(grads):
                live = t.with_zero_states(hidden)
                return (None, None, *derivative.differentiable_backward(spec, live, o, given, needs))
            if was_changed(ctx):  # make y again
                (y, _, _), saved = chosen.backend.forward(chosen.plan, t, o, True)
            return (None, None, *chosen.backend.backward(chosen.plan, t, o, y, saved, given, needs))
