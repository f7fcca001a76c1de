"""How a backend is run: directly in eager mode, as one opaque operator under compile, export and dispatch modes.

`rnnkit::layer_forward` and `rnnkit::layer_backward` stand for a whole layer, so T is never unrolled and any backend
passes through torch.compile and torch.export. Their results are a fixed tuple: y, h_n, c_n, c_all, gates, cells;
what a cell or an option does not give is an empty tensor. For RNN and GRU of backend `cpu`, `cells` is a copy of y for
the backward: torch's let a program change y in place before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..autocast import no_autocast
from ..backends import BY_NAME, REFERENCE, LayerInputs, LayerOptions, LayerOutputs, Result
from ..backends.base import Gradient
from ..cells import CELLS, compute_dtype

_ARGUMENTS = (
    "str cell, str backend, bool reverse, bool all_states, bool recompute, Tensor x, Tensor h_0, Tensor? c_0, "
    "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? lengths, Tensor? reset, "
    "Tensor? h_r, Tensor? c_r"
)
_LIBRARY = torch.library.Library("rnnkit", "FRAGMENT")
_LIBRARY.define(
    f"layer_forward({_ARGUMENTS}, bool train) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"layer_backward({_ARGUMENTS}, bool[] needs, Tensor y, Tensor gates, Tensor cells, Tensor? gy, Tensor? gh_n, "
    "Tensor? gc_n, Tensor? gc_all) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def run_forward(backend: str, cell: str, t: LayerInputs, o: LayerOptions, *, train: bool, graph: bool) -> Result:
    """A backend's forward, directly."""
    with no_autocast(t.x.device.type):
        return BY_NAME[backend].forward(cell, t, o, train=train, graph=graph)


def run_backward(
    backend: str,
    cell: str,
    t: LayerInputs,
    o: LayerOptions,
    y: Tensor,
    result: Result | None,
    grads: LayerOutputs,
    needs: list[bool],
) -> list[Gradient]:
    """A backend's backward, directly."""
    with no_autocast(t.x.device.type):
        return BY_NAME[backend].backward(cell, t, o, y, result, grads, needs)


def second_backward(
    cell: str, t: LayerInputs, o: LayerOptions, grads: LayerOutputs, needs: list[bool]
) -> list[Gradient]:
    """The same gradients as a function that torch can differentiate again: the reference's formulas on live inputs."""
    o = o._replace(recompute=False)  # the gates are needed right away
    with no_autocast(t.x.device.type):
        result = REFERENCE.forward(cell, t, o, train=True)
        return REFERENCE.backward(cell, t, o, result.outputs.y, result, grads, needs)


# The opaque operators.

_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _some(v: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if v is None else v


def _forward(
    cell: str, backend: str, reverse: bool, all_states: bool, recompute: bool, *rest: Tensor | bool | None
) -> _Six:
    *tensors, train = rest
    t = LayerInputs(*tensors)  # type: ignore[arg-type]
    options = LayerOptions(reverse, all_states, recompute)
    outputs, saved, _ = run_forward(backend, cell, t, options, train=bool(train), graph=False)
    gates, cells = _split(cell, recompute, saved)
    if train and returns_y_copy(cell, backend):
        cells = outputs.y.clone(memory_format=torch.contiguous_format)
    every = (*outputs, gates, cells)
    if outputs.c_all is not None and cells is outputs.c_all:  # an operator's results may not be one tensor
        every = (*outputs, gates, cells.clone())
    return tuple(_some(v, t.x) for v in every)  # type: ignore[return-value]


def _split(cell: str, recompute: bool, saved: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Gates and c, of those that a backend has saved."""
    if not saved or not CELLS[cell].saved:
        return None, None
    return None if recompute else saved[0], saved[-1] if CELLS[cell].has_c else None


def _backward(
    cell: str,
    backend: str,
    reverse: bool,
    all_states: bool,
    recompute: bool,
    *rest: Tensor | list[bool] | None,
) -> list[Tensor]:
    tensors, (needs, y, gates, cells), grads = rest[:12], rest[12:16], rest[16:]
    t = LayerInputs(*tensors)  # type: ignore[arg-type]
    kept = zip((gates, cells), saves_gates_and_c(cell, backend, recompute), strict=True)
    saved = tuple(v for v, is_kept in kept if is_kept)
    found = run_backward(
        backend,
        cell,
        t,
        LayerOptions(reverse, all_states, recompute),
        y,  # type: ignore[arg-type]
        Result(LayerOutputs(y, t.h_0, None, None), saved),  # type: ignore[arg-type]
        LayerOutputs(*grads),  # type: ignore[arg-type]
        needs,  # type: ignore[arg-type]
    )
    given: list[Tensor] = []
    for v in found:
        if v is not None:
            given.append(v.clone() if any(v is other for other in given) else v)
    return given


def saves_gates_and_c(cell: str, backend: str, recompute: bool) -> tuple[bool, bool]:
    """Whether the operator's forward returns gates, and c of an LSTM: not for backend `torch`, whose workspace has no
    stated size."""
    kind = CELLS[cell]
    return backend != "torch" and not recompute and kind.saved > 0, backend != "torch" and kind.has_c


def returns_y_copy(cell: str, backend: str) -> bool:
    """Whether the operator's forward returns y twice: where torch runs a chain of operators whose output is free."""
    return backend != "torch" and not CELLS[cell].has_c


_LIBRARY.impl("layer_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("layer_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rnnkit::layer_forward", lib=_LIBRARY)
def _fake_forward(
    cell: str, backend: str, reverse: bool, all_states: bool, recompute: bool, *rest: Tensor | bool | None
) -> _Six:
    *tensors, train = rest
    t = LayerInputs(*tensors)  # type: ignore[arg-type]
    kind = CELLS[cell]
    steps, rows = t.x.shape[0], t.x.shape[1]
    hidden = t.w_hh.shape[0] // kind.gates
    wide = t.x.dtype if BY_NAME[backend].saves_narrow or recompute else compute_dtype(t.x.dtype)
    y = t.x.new_empty((steps, rows, t.h_0.shape[1]))
    h_n = t.x.new_empty((rows, t.h_0.shape[1]))
    c_n = t.x.new_empty((rows, hidden) if kind.has_c else (0,))
    c_all = t.x.new_empty((steps, rows, hidden) if kind.has_c and all_states else (0,))
    keeps_gates, keeps_c = saves_gates_and_c(cell, backend, recompute) if train else (False, False)
    gates = t.x.new_empty((steps, rows, kind.saved * hidden), dtype=wide) if keeps_gates else t.x.new_empty(0)
    cells = t.x.new_empty((steps, rows, hidden), dtype=wide) if keeps_c else t.x.new_empty(0)
    if train and returns_y_copy(cell, backend):
        cells = torch.empty_like(y)
    return y, h_n, c_n, c_all, gates, cells


@torch.library.register_fake("rnnkit::layer_backward", lib=_LIBRARY)
def _fake_backward(
    cell: str,
    backend: str,
    reverse: bool,
    all_states: bool,
    recompute: bool,
    *rest: Tensor | list[bool] | None,
) -> list[Tensor]:
    tensors, needs = rest[:12], rest[12]
    wanted = zip(tensors, needs, strict=True)  # type: ignore[arg-type]
    return [v.new_empty(v.shape) for v, need in wanted if need and v is not None]  # type: ignore[union-attr]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: _Six) -> None:
    cell, backend, reverse, all_states, recompute, *tensors, _ = inputs
    if backend == "torch":
        y = output[4]  # nothing: it runs again
    else:
        y = output[5] if returns_y_copy(cell, backend) else output[0]
    ctx.save_for_backward(*tensors, y, output[4], output[5])
    ctx.how = (cell, backend, LayerOptions(reverse, all_states, recompute))  # type: ignore[attr-defined]
    ctx.set_materialize_grads(False)


def _derivative(ctx: torch.autograd.function.FunctionCtx, *grads: Gradient) -> tuple:
    cell, backend, o = ctx.how  # type: ignore[attr-defined]
    *tensors, y, gates, cells = ctx.saved_tensors  # type: ignore[attr-defined]
    t = LayerInputs(*tensors)
    needs = list(ctx.needs_input_grad[5:17])  # type: ignore[attr-defined]
    has_c_n, has_c_all = states_of(cell, o)
    given = LayerOutputs(grads[0], grads[1], grads[2] if has_c_n else None, grads[3] if has_c_all else None)  # type: ignore[arg-type]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        every = second_backward(cell, t, o, given, needs)
    else:
        found = iter(torch.ops.rnnkit.layer_backward(cell, backend, *o, *t, needs, y, gates, cells, *given))
        every = [next(found) if need else None for need in needs]
    return (None,) * 5 + tuple(every) + (None,)


def states_of(cell: str, o: LayerOptions) -> tuple[bool, bool]:
    """Whether there is a c_n, and a c_all."""
    has_c = CELLS[cell].has_c
    return has_c, has_c and o.all_states


torch.library.register_autograd("rnnkit::layer_forward", _derivative, setup_context=_setup_context, lib=_LIBRARY)


@register_flop_formula([torch.ops.rnnkit.layer_forward])
def _forward_flops(
    cell: str, backend: str, reverse: bool, all_states: bool, recompute: bool, *shapes: Any, **more: Any
) -> int:
    """Operations of the products: two for each multiply-add."""
    x, _, _, w_ih, w_hh, _, _, w_hr, *_ = shapes
    steps, rows = x[0], x[1]
    return 2 * steps * rows * sum(w[0] * w[1] for w in (w_ih, w_hh, w_hr) if w is not None)


@register_flop_formula([torch.ops.rnnkit.layer_backward])
def _backward_flops(
    cell: str, backend: str, reverse: bool, all_states: bool, recompute: bool, *shapes: Any, **more: Any
) -> int:
    """One product for the gradient of each factor."""
    return 2 * _forward_flops(cell, backend, reverse, all_states, recompute, *shapes)
