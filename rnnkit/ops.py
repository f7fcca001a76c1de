"""`layer`: one layer, one direction, all T, input projection inside. The autograd boundary of the package.

What happens, in order: checks; the choice of a backend; autocast, as torch.nn does it on that device; the
reference's formulas where a transform asks for a function it can differentiate (vmap, torch.func, forward mode) or
for a graph of torch's own operators (tracing, ONNX); one opaque operator under compile and export; else the backend
itself, below an autograd function when a gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .autocast import autocasting, layer_dtypes, no_autocast
from .backends import REFERENCE, Options, Outputs, Result, Tensors, describe, resolve
from .registry import run_backward, run_forward, second_backward, states_of

_transforming = torch._C._are_functorch_transforms_active


def layer(
    cell: str,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | Sequence[Tensor] | None = None,
    reverse: bool = False,
    all_states: bool = False,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one recurrent layer in one direction over a whole sequence.

    T steps (0 is allowed), B rows, I input size, H hidden size, P projection size, G gates (RNN 1, LSTM 4, GRU 3);
    N is P with a projection, else H.

    Args:
        cell: `rnn_tanh`, `rnn_relu`, `lstm`, `gru` (reset after the product, as torch) or `gru_reset_before`.
        x: [T, B, I].
        h_0: [B, N], zeros where None.
        c_0: [B, H], LSTM only, zeros where None.
        weights: w_ih [G·H, I], w_hh [G·H, N], then b_ih and b_hh [G·H] or neither, then w_hr [P, H] for an LSTM
            with a projection; torch.nn's order.
        lengths: [B] integers in [0, T], on any device. Row b is processed for its first lengths[b] steps. Values are
            checked on the CPU in eager mode; elsewhere what lies outside is clamped.
        reset: [T, B] (or [T, B, 1]) of 0 and 1: where 1, the row's state is replaced before the step. With `reverse`
            the cut lies between the same two steps, t - 1 and t.
        reset_state: what it is replaced by, in the form of the state: [B, N], or ([B, N], [B, H]) for an LSTM; zeros
            where None.
        reverse: process the last step first.
        all_states: also return every c_t (LSTM).
        recompute: keep nothing but inputs and outputs for the backward and compute the gates again there.
        backend: a backend's name, or `auto`.

    Returns:
        y [T, B, N] (0 at t >= lengths[b]), h_n [B, N], c_n [B, H] or None, c_all [T, B, H] or None.

    Raises:
        ValueError: sizes, ranks, values. TypeError: types and dtypes. NotImplementedError: a named backend that
            cannot run this problem, with its reasons.
    """
    t, options = checks.layer(cell, x, h_0, c_0, weights, lengths, reset, reset_state, reverse, all_states, recompute)
    return _layer(cell, t, options, backend, fused=True)


def step(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell: x [B, I], h and c [B, H] (zeros where None), weights as for `layer`. Returns h, c."""
    checks.expect_rows(x)
    t, options = checks.layer(cell, x.unsqueeze(0), h, c, weights)
    _, h_n, c_n, _ = _layer(cell, t, options, backend, fused=False)
    return h_n, c_n


def _layer(
    cell: str, t: Tensors, o: Options, backend: str, *, fused: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if not autocasting(t.x.device.type):
        return _run(cell, t, o, backend)
    dtype, shown = layer_dtypes(cell, t, fused=fused)
    y, h_n, c_n, c_all = _run(cell, t.cast(dtype), o, backend)
    return y.to(shown), h_n.to(shown), c_n, c_all


def _run(cell: str, t: Tensors, o: Options, backend: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    device = t.x.device.type
    train = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in t)
    chosen = resolve(backend, describe(cell, t, o, train=train)).name
    compiling = torch.compiler.is_compiling()
    onnx = compiling and torch.onnx.is_in_onnx_export()
    if compiling and not onnx:
        return _opaque(cell, chosen, t, o, train)
    if onnx or torch.jit.is_tracing() or _transforming() or forward_ad._current_level >= 0:
        with no_autocast(device):
            return REFERENCE.forward(cell, t, o, train=False).outputs
    if not _eager(t):
        return _opaque(cell, chosen, t, o, train)
    if train:
        found = iter(_Layer.apply(cell, chosen, o, *t))
        has_c_n, has_c_all = states_of(cell, o)
        return next(found), next(found), next(found) if has_c_n else None, next(found) if has_c_all else None
    return run_forward(chosen, cell, t, o, train=False, graph=False).outputs


def _opaque(cell: str, backend: str, t: Tensors, o: Options, train: bool) -> Outputs:
    y, h_n, c_n, c_all, _, _ = torch.ops.rnnkit.layer_forward(cell, backend, *o, *t, train)
    has_c_n, has_c_all = states_of(cell, o)
    return Outputs(y, h_n, c_n if has_c_n else None, c_all if has_c_all else None)


def _eager(t: Tensors) -> bool:
    """Plain tensors with memory behind them, and no dispatch mode that wants to see an operator."""
    plain = all(v is None or type(v) is Tensor or type(v) is torch.nn.Parameter for v in t)
    return plain and t.x.device.type != "meta" and torch._C._len_torch_dispatch_stack() == 0


class _Layer(torch.autograd.Function):
    """A backend's forward and backward as one node of torch's graph."""

    @staticmethod
    def forward(ctx: Any, cell: str, backend: str, o: Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        t = Tensors(*tensors)  # type: ignore[arg-type]
        result = run_forward(backend, cell, t, o, train=True, graph=True)
        kept = () if result.graph is not None else (result.outputs.y, *result.saved)
        ctx.save_for_backward(*t, *kept)
        ctx.how = (cell, backend, o)
        ctx.graph = result.graph
        ctx.set_materialize_grads(False)
        return tuple(v for v in result.outputs if v is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell, backend, o = ctx.how
        saved = ctx.saved_tensors  # once: hooks such as checkpoint's unpack at each access
        t, kept = Tensors(*saved[: len(Tensors._fields)]), saved[len(Tensors._fields) :]
        needs = list(ctx.needs_input_grad[3:])
        given = iter(grads)
        has_c_n, has_c_all = states_of(cell, o)
        some = Outputs(
            next(given),  # type: ignore[arg-type]
            next(given),  # type: ignore[arg-type]
            next(given) if has_c_n else None,
            next(given) if has_c_all else None,
        )
        if all(g is None for g in some):
            return (None,) * 15
        if torch.is_grad_enabled() or _transforming():  # create_graph, batched gradients: torch's own operators
            every = second_backward(cell, t, o, some, needs)
        else:
            y = kept[0] if kept else t.x
            result = Result(some, tuple(kept[1:]), ctx.graph)
            every = run_backward(backend, cell, t, o, y, result, some, needs)
        return (None, None, None, *every)
