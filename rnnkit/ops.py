"""`layer`: one layer, one direction, all T, input projection inside. The autograd boundary of the package.

What happens, in order: checks; the choice of a backend; autocast, as torch.nn does it on that device; the
reference's formulas where a transform asks for a function it can differentiate (vmap, torch.func, forward mode) or
for a graph of torch's own operators (tracing, ONNX); one opaque operator under compile and export; else the backend
itself, below an autograd function when a gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .autocast import autocasting, layer_dtypes, no_autocast
from .backends import (
    REFERENCE,
    Backend,
    Options,
    Outputs,
    Result,
    Tensors,
    choose,
    describe,
    recall,
    resolve,
)
from .cells import CELLS
from .registry import run_backward, run_forward, second_backward, states_of

plain = checks.plain
_transforming = torch._C._are_functorch_transforms_active
_batched = torch._C._functorch.is_legacy_batchedtensor  # what autograd.grad(is_grads_batched=True) hands to a backward
_grad = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled  # for any type of device
_FORWARD, _REVERSE = Options(), Options(reverse=True)
_MISSING = (None,) * 4  # what is left out at the end of four weights or four outputs
_BARE = 7  # what the simplest layer has of `Tensors`: x to b_hh
_NOTHING = torch.empty(0)


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
    if lengths is None and reset is None and reset_state is None and all_states is False and recompute is False:
        quick = _quick_layer(cell, x, h_0, c_0, weights, reverse, backend)
        if quick is not None:
            return quick
    t, options = checks.layer(cell, x, h_0, c_0, weights, lengths, reset, reset_state, reverse, all_states, recompute)
    return _layer(cell, t, options, backend, fused=True)


def step(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell: x [B, I], h and c [B, H] (zeros where None), weights as for `layer`. Returns h, c."""
    quick = _quick_step(cell, x, h, c, weights, backend)
    if quick is not None:
        return quick
    checks.expect_rows(x)
    t, options = checks.layer(cell, x.unsqueeze(0), h, c, weights)
    _, h_n, c_n, _ = _layer(cell, t, options, backend, fused=False)
    return h_n, c_n


# The quick way: a backend whose operators check all that they are given gets the tensors as they are. What it refuses,
# by a RuntimeError, goes the ordinary way over `checks`, which says what is wrong or makes it right.


def single(
    cell: str,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_first: bool,
    backend: str,
) -> Sequence[Tensor] | None:
    """A module's only layer, one direction, without gradients and in the module's layouts, see `Backend.single`.

    None where the call is not that plain, or something is wrong with it: `layer` says what.
    """
    if _grad() or type(x) is not Tensor or x.dim() != 3 or not plain() or _autocast():
        return None
    steps, rows, features = x.shape
    if batch_first:
        steps, rows = rows, steps
    if len(weights) == 4:
        w_ih, w_hh, b_ih, b_hh = weights
    elif len(weights) == 2:
        (w_ih, w_hh), b_ih, b_hh = weights, None, None
    else:
        return None
    if not isinstance(w_hh, Tensor) or w_hh.dim() != 2:
        return None
    hidden, bias = w_hh.shape[1], b_ih is not None
    known = recall(
        backend,  # and what `Problem` holds
        (cell, "cpu", x.dtype, steps, rows, features, hidden, 0, bias, False, False, False, *_FORWARD, False),
    )
    if known is None:
        return None
    try:
        return known.single(cell, x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, batch_first)
    except RuntimeError:
        return None


def _quick_step(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], backend: str
) -> tuple[Tensor, Tensor | None] | None:
    """`step` without gradients the quick way; None where there is none."""
    found = _quick(cell, 2, x, h, c, weights, _FORWARD, backend)
    if found is None or found[1]:
        return None
    try:
        return found[0].step(cell, x, h, c, *found[2])  # type: ignore[arg-type]
    except RuntimeError:
        return None


def _quick_layer(
    cell: str, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Sequence[Tensor], reverse: bool, backend: str
) -> Outputs | None:
    """`layer` without lengths, resets and options the quick way; None where there is none."""
    o = _REVERSE if reverse is True else _FORWARD
    found = _quick(cell, 3, x, h_0, c_0, weights, o, backend) if o.reverse is reverse else None
    if found is None or not found[0].takes_none_states:
        return None
    known, train, four = found
    try:
        return _direct(cell, known, Tensors(x, h_0, c_0, *four), o, train)  # type: ignore[arg-type]
    except RuntimeError:
        return None


def _quick(
    cell: str,
    dims: int,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    o: Options,
    backend: str,
) -> tuple[Backend, bool, Sequence[Tensor | None]] | None:
    """The backend that an earlier call with the same facts came to, whether a gradient is wanted, and w_ih, w_hh, b_ih,
    b_hh. None where the call is not plain, there was no such call, or no operator would see what is wrong."""
    if type(weights) is not list and type(weights) is not tuple:
        return None
    if len(weights) != 4 and len(weights) != 2:
        return None
    for w in weights:
        if w is None:
            return None
    four = weights if len(weights) == 4 else (*weights, None, None)
    if type(x) is not Tensor or x.dim() != dims or not checks.plain(h, c, *weights) or not x.is_cpu or _autocast():
        return None
    w_hh = weights[1]
    if w_hh.dim() != 2 or (c is not None and cell != "lstm"):
        return None
    train = _grad() and _any_grad((x, h, c, *weights))
    sizes = x.shape if dims == 3 else (1, *x.shape)
    known = recall(
        backend,  # and what `Problem` holds
        (cell, "cpu", x.dtype, *sizes, w_hh.shape[1], 0, four is weights, False, False, False, *o, train),
    )
    return None if known is None else (known, train, four)


def _any_grad(tensors: Iterable[Tensor | None]) -> bool:
    return any(v is not None and v.requires_grad for v in tensors)


def _layer(
    cell: str, t: Tensors, o: Options, backend: str, *, fused: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if checks.plain(*t) and not t.x.is_meta and not _autocast():
        train = _grad() and _any_grad(t)
        chosen = choose(backend, describe(cell, t, o, train=train))
        return _direct(cell, chosen, t, o, train)
    t = t.filled(CELLS[cell].has_c)
    if not autocasting(t.x.device.type):
        return _run(cell, t, o, backend)
    dtype, shown = layer_dtypes(cell, t, fused=fused)
    y, h_n, c_n, c_all = _run(cell, t.cast(dtype), o, backend)
    return y.to(shown), h_n.to(shown), c_n, c_all


def _run(cell: str, t: Tensors, o: Options, backend: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Where the call is not plain, or was not before autocast had its way."""
    train = _grad() and _any_grad(t)
    chosen = resolve(backend, describe(cell, t, o, train=train))
    compiling = torch.compiler.is_compiling()
    onnx = compiling and torch.onnx.is_in_onnx_export()
    if compiling and not onnx:
        return _opaque(cell, chosen.name, t, o, train)
    with no_autocast(t.x.device.type):
        if onnx or torch.jit.is_tracing() or _transforming() or forward_ad._current_level >= 0:
            return REFERENCE.forward(cell, t, o, train=False).outputs
        if checks.plain(*t) and not t.x.is_meta:
            return _direct(cell, chosen, t, o, train)
    return _opaque(cell, chosen.name, t, o, train)


def _direct(cell: str, backend: Backend, t: Tensors, o: Options, train: bool) -> Outputs:
    """The backend itself on plain tensors, below an autograd function when a gradient is wanted."""
    if not backend.takes_none_states:
        t = t.filled(CELLS[cell].has_c)
    if not train:
        return backend.forward(cell, t, o, train=False).outputs
    bare = t.w_hr is None and t.lengths is None and t.reset is None
    found: tuple[Tensor, ...] = _Layer.apply((cell, backend, o), *(t[:_BARE] if bare else t))
    return Outputs(*found, *_MISSING[len(found) :])


def _opaque(cell: str, backend: str, t: Tensors, o: Options, train: bool) -> Outputs:
    y, h_n, c_n, c_all, _, _ = torch.ops.rnnkit.layer_forward(cell, backend, *o, *t, train)
    has_c_n, has_c_all = states_of(cell, o)
    return Outputs(y, h_n, c_n if has_c_n else None, c_all if has_c_all else None)


class _Layer(torch.autograd.Function):
    """A backend's forward and backward as one node of torch's graph. Takes `Tensors`, without trailing Nones."""

    @staticmethod
    def forward(ctx: Any, how: tuple[str, Backend, Options], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        cell, backend, o = how
        outputs, saved, graph = backend.forward(cell, Tensors(*tensors), o, train=True, graph=True)  # type: ignore[arg-type]
        ctx.how, ctx.graph, ctx.watched = how, graph, None
        y, h_n, c_n, c_all = outputs
        if graph is not None:
            ctx.save_for_backward(*tensors)
        elif c_n is not None:
            ctx.save_for_backward(*tensors, y, *saved)
        else:  # torch's RNN and GRU let a program change y in place before the backward
            ctx.save_for_backward(*tensors, y.data, *saved)
            counter = y.detach()  # counts the changes of y,
            counter.data = _NOTHING  # but does not keep its memory
            ctx.watched = counter, counter._version
        ctx.set_materialize_grads(False)
        if c_n is None:
            return y, h_n
        return (y, h_n, c_n) if c_all is None else (y, h_n, c_n, c_all)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell, backend, o = ctx.how
        saved = ctx.saved_tensors  # once: hooks such as checkpoint's unpack at each access
        count = len(ctx.needs_input_grad) - 1
        t, kept = Tensors(*saved[:count]), saved[count:]
        needs = [*ctx.needs_input_grad[1:], *(False,) * (len(t) - count)]
        given = Outputs(*grads, *_MISSING[len(grads) :])  # type: ignore[arg-type]
        if all(g is None for g in grads):
            return (None,) * (1 + count)
        # create_graph, batched gradients: torch's own operators
        if _grad() or _transforming() or any(g is not None and _batched(g) for g in grads):
            found = second_backward(cell, t.filled(CELLS[cell].has_c), o, given, needs)
        else:
            y, result = kept[0] if kept else t.x, Result(given, kept[1:], ctx.graph)
            if ctx.watched is not None and ctx.watched[0]._version != ctx.watched[1]:  # y was changed: make it again
                result = run_forward(backend.name, cell, t, o, train=True, graph=False)
                y = result.outputs.y
            found = run_backward(backend.name, cell, t, o, y, result, given, needs)
        return (None, *found[:count])
