"""`layer`: one layer, one direction, all T, input projection inside. The autograd boundary of the package.

What happens, in order: checks; the choice of a backend; autocast, as torch.nn does it on that device; the
reference's formulas where a transform asks for a function it can differentiate (vmap, torch.func, forward mode) or
for a graph of torch's own operators (tracing, ONNX); one opaque operator under compile and export; else the backend
itself, below an autograd function when a gradient is wanted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks, streams
from .autocast import autocasting, layer_dtypes, no_autocast
from .backends import (
    REFERENCE,
    Backend,
    LayerInputs,
    LayerOptions,
    LayerOutputs,
    Result,
    cached_backend,
    describe,
    select_backend,
)
from .cells import CELLS
from .registry import run_backward, run_forward, second_backward, states_of

_plain, _modes, _transforming, _watching = checks.plain, checks.modes, checks.transforming, checks.watching
_batched = torch._C._functorch.is_legacy_batchedtensor  # what autograd.grad(is_grads_batched=True) hands to a backward
_grad = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled  # for any type of device
_FORWARD, _REVERSE = LayerOptions(), LayerOptions(reverse=True)
_MISSING = (None,) * 4  # what is left out at the end of four weights or four outputs
_BARE = 7  # what the simplest layer has of `LayerInputs`: x to b_hh
_NOTHING = torch.empty(0)

Run = Callable[[str, LayerInputs, LayerOptions], LayerOutputs]
_instead: Run | None = None
_looking = threading.RLock()


@contextlib.contextmanager
def computed_by(run: Run) -> Iterator[None]:
    """While it lasts every layer and step in this process is computed by `run`, which gets the cell's name and checked
    tensors, in place of a backend: for those who look inside (rnnkit.diagnostics)."""
    global _instead
    with _looking:  # another thread waits
        before, _instead = _instead, run
        try:
            yield
        finally:
            _instead = before


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
        recompute: keep nothing but inputs, y and, of an LSTM, c for the backward, which makes the gates again, one
            range of time after the other.
        backend: a backend's name, or `auto`.

    Returns:
        y [T, B, N] (0 at t >= lengths[b]), h_n [B, N], c_n [B, H] or None, c_all [T, B, H] or None.

    Raises:
        ValueError: sizes, ranks, values. TypeError: types and dtypes. NotImplementedError: a named backend that
            cannot run this problem, with its reasons.
    """
    plain = _instead is None and all_states is False and recompute is False
    if plain and lengths is None and reset is None and reset_state is None:
        quick = _quick_layer(cell, x, h_0, c_0, weights, reverse, backend)
        if quick is not None:
            return quick
    t, options = checks.layer(cell, x, h_0, c_0, weights, lengths, reset, reset_state, reverse, all_states, recompute)
    return _layer(cell, t, options, backend, fused=True)


def step(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell: x [B, I], h and c [B, H] (zeros where None), weights as for `layer`. Returns h, c."""
    quick = None if _instead is not None else _quick_step(cell, x, h, c, weights, backend)
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
    """A module's only layer, one direction, in the module's layouts, see `Backend.single`: y, h_n and, for an LSTM,
    c_n.

    None where the call is not plain, the backend has no such way, or something is wrong: `layer` says what.
    """
    four = _four(weights) if _instead is None else None
    if four is None or type(x) is not Tensor or x.dim() != 3 or not _plain() or _autocast() or _watching():
        return None
    try:
        steps, rows, features = x.shape
        if batch_first:
            steps, rows = rows, steps
        if steps == 0:  # torch's layers refuse it
            return None
        train = _grad() and _any_grad((*four, x, h_0, c_0))
        facts = (cell, "cpu", x.dtype, steps, rows, features, four[1].shape[1], 0, four[2] is not None)
        known = cached_backend(backend, (*facts, False, False, False, *_FORWARD, train, None))
        if known is None:  # a call goes the same way whether there was one like it: a checkpoint runs it twice
            known = _chosen_for_single(cell, x, h_0, c_0, weights, batch_first, backend, train)
        if known is None or not known.singles:
            return None
        if train:
            return _Layer.apply((cell, known, _FORWARD, batch_first), x, h_0, c_0, *four)
        return known.single(cell, x, h_0, c_0, *four, batch_first, False)  # type: ignore[call-arg]
    except (RuntimeError, AttributeError, IndexError):
        return None


def _chosen_for_single(
    cell: str,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_first: bool,
    backend: str,
    train: bool,
) -> Backend | None:
    """The backend for a `single` that was not met before; None where something is wrong with it."""
    if any(v is not None and (v.dim() != 3 or v.shape[0] != 1) for v in (h_0, c_0)):
        return None
    h, c = (None if v is None else v[0] for v in (h_0, c_0))
    try:
        t, options = checks.layer(cell, x.transpose(0, 1) if batch_first else x, h, c, weights)
        spec = describe(cell, t, options, train=train)
        known = select_backend(backend, spec, report=False)
        return select_backend(backend, spec) if known.singles else known  # recorded once, here or on the ordinary way
    except (checks.BadInput, ValueError, TypeError, NotImplementedError):
        return None


def _quick_step(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], backend: str
) -> tuple[Tensor, Tensor | None] | None:
    """`step` without gradients the quick way; None where there is none."""
    four = _four(weights)
    if four is None or type(x) is not Tensor or x.dim() != 2 or not _plain() or _autocast() or _watching():
        return None
    if c is not None and cell != "lstm":
        return None
    try:
        if _grad() and _any_grad((x, h, c, *four)):
            return None
        facts = (cell, "cpu", x.dtype, 1, *x.shape, four[1].shape[1], 0, four[2] is not None)
        known = cached_backend(backend, (*facts, False, False, False, *_FORWARD, False, None))
        return None if known is None else known.step(cell, x, h, c, *four)
    except (RuntimeError, AttributeError, IndexError):
        return None


def _four(weights: Sequence[Tensor]) -> Sequence[Any] | None:
    """w_ih, w_hh, b_ih and b_hh, the last two None where there is no bias; None for anything else."""
    if type(weights) is not list and type(weights) is not tuple:
        return None
    if len(weights) == 2:
        return (*weights, None, None)
    return weights if len(weights) == 4 and weights[2] is not None and weights[3] is not None else None


def _quick_layer(
    cell: str, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Sequence[Tensor], reverse: bool, backend: str
) -> LayerOutputs | None:
    """`layer` without lengths, resets and options the quick way; None where there is none."""
    o = _REVERSE if reverse is True else _FORWARD
    found = _quick(cell, x, h_0, c_0, weights, o, backend) if o.reverse is reverse else None
    if found is None or not found[0].validates_inputs:
        return None
    known, train, four = found
    try:
        return _direct(cell, known, LayerInputs(x, h_0, c_0, *four), o, train)  # type: ignore[arg-type]
    except RuntimeError:
        return None


def _quick(
    cell: str,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    o: LayerOptions,
    backend: str,
) -> tuple[Backend, bool, Sequence[Tensor | None]] | None:
    """The backend that an earlier call with the same facts came to, whether a gradient is wanted, and w_ih, w_hh, b_ih,
    b_hh. None where the call is not plain, there was no such call, or no operator would see what is wrong."""
    four = _four(weights)
    if four is None:
        return None
    if type(x) is not Tensor or x.dim() != 3 or not _plain(h, c, *weights) or not x.is_cpu or _autocast():
        return None
    w_hh = weights[1]
    if w_hh.dim() != 2 or (c is not None and cell != "lstm"):
        return None
    train = _grad() and _any_grad((x, h, c, *weights))
    known = cached_backend(
        backend,  # and what `LayerSpec` holds
        (cell, "cpu", x.dtype, *x.shape, w_hh.shape[1], 0, four is weights, False, False, False, *o, train, None),
    )
    return None if known is None else (known, train, four)


def _any_grad(tensors: Iterable[Tensor | None]) -> bool:
    return any(v is not None and v.requires_grad for v in tensors)


def overlaps(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    *states: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    options: LayerOptions,
    backend: str,
) -> bool:
    """Whether a layer's reverse direction with these weights may run on another stream than its forward one.

    On a GPU, by a backend that says so, in plain calls. Not where somebody looks at what autograd saves: `checkpoint`
    makes it again on the stream of the direction that asks first, and the other one would not wait. What is wrong with
    the arguments, `layer` says. states: the four of the state before and at a reset.
    """
    if not streams.on_gpu(x) or _instead is not None or x.is_meta:
        return False
    if not _plain(x, *weights, *states, lengths, reset) or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return False
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
    t = LayerInputs(
        x, *states[:2], w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) % 2 else None, lengths, reset, *states[2:]
    )
    spec = describe(cell, t, options, train=_grad() and _any_grad(t))
    if autocasting(x.device.type):
        spec = spec._replace(dtype=layer_dtypes(cell, t, fused=True)[0])
    try:
        return select_backend(backend, spec, report=False).concurrent_directions
    except (NotImplementedError, ValueError):
        return False


def _layer(
    cell: str, t: LayerInputs, o: LayerOptions, backend: str, *, fused: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if _instead is not None:
        return _instead(cell, t.with_zero_states(CELLS[cell].has_c), o)
    if _plain(*t) and not t.x.is_meta and not _autocast():
        train = _grad() and _any_grad(t)
        chosen = select_backend(backend, describe(cell, t, o, train=train))
        return _direct(cell, chosen, t, o, train)
    t = t.with_zero_states(CELLS[cell].has_c)
    if not autocasting(t.x.device.type):
        return _run(cell, t, o, backend)
    dtype, shown = layer_dtypes(cell, t, fused=fused)
    y, h_n, c_n, c_all = _run(cell, t.cast(dtype), o, backend)
    return y.to(shown), h_n.to(shown), c_n, c_all


def _run(
    cell: str, t: LayerInputs, o: LayerOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Where the call is not plain, or was not before autocast had its way."""
    train = _grad() and _any_grad(t)
    chosen = select_backend(backend, describe(cell, t, o, train=train), cache=False)
    compiling = torch.compiler.is_compiling()
    onnx = compiling and torch.onnx.is_in_onnx_export()
    if compiling and not onnx:
        return _opaque(cell, chosen.name, t, o, train)
    with no_autocast(t.x.device.type):
        if onnx or torch.jit.is_tracing() or _transforming() or forward_ad._current_level >= 0:
            return REFERENCE.forward(cell, t, o, train=False).outputs
        if _plain(*t) and not t.x.is_meta:
            return _direct(cell, chosen, t, o, train)
    return _opaque(cell, chosen.name, t, o, train)


def _direct(cell: str, backend: Backend, t: LayerInputs, o: LayerOptions, train: bool) -> LayerOutputs:
    """The backend itself on plain tensors, below an autograd function when a gradient is wanted."""
    if not backend.validates_inputs:
        t = t.with_zero_states(CELLS[cell].has_c)
    if not train:
        return backend.forward(cell, t, o, train=False).outputs
    bare = t.w_hr is None and t.lengths is None and t.reset is None
    found: tuple[Tensor, ...] = _Layer.apply((cell, backend, o, None), *(t[:_BARE] if bare else t))
    return LayerOutputs(*found, *_MISSING[len(found) :])


def _opaque(cell: str, backend: str, t: LayerInputs, o: LayerOptions, train: bool) -> LayerOutputs:
    y, h_n, c_n, c_all, _, _ = torch.ops.rnnkit.layer_forward(cell, backend, *o, *t, train)
    has_c_n, has_c_all = states_of(cell, o)
    return LayerOutputs(y, h_n, c_n if has_c_n else None, c_all if has_c_all else None)


How = tuple[str, Backend, LayerOptions, bool | None]
"""Cell, backend, options; whether a `single` is batch first, None for any other layer."""


class _Layer(torch.autograd.Function):
    """A backend's forward and backward as one node of torch's graph. Takes `LayerInputs`, without trailing Nones."""

    @staticmethod
    def forward(ctx: Any, how: How, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        cell, backend, o, batch_first = how
        graph = None
        if batch_first is None:
            outputs, saved, graph = backend.forward(cell, LayerInputs(*tensors), o, train=True, graph=True)  # type: ignore[arg-type]
            given = outputs[: 2 if outputs.c_n is None else 3 if outputs.c_all is None else 4]
        else:
            given, saved = _run_single(how, tensors)
        ctx.how, ctx.graph, ctx.watched, ctx.side = how, graph, None, streams.here()
        y: Tensor = given[0]  # type: ignore[assignment]
        if graph is not None:
            ctx.save_for_backward(*tensors)
        elif len(given) > 2:
            ctx.save_for_backward(*tensors, y, *saved)
        else:  # torch's RNN and GRU let a program change y in place before the backward
            ctx.save_for_backward(*tensors, y.data, *saved)
            counter = y.detach()  # counts the changes of y,
            counter.data = _NOTHING  # but does not keep its memory
            ctx.watched = counter, counter._version
        ctx.set_materialize_grads(False)
        return given  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.side is None:
            return _Layer._gradients(ctx, *grads)
        try:
            return _Layer._gradients(ctx, *grads)
        finally:
            ctx.side.join()  # before autograd lets go of what was saved

    @staticmethod
    def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell, backend, o, batch_first = ctx.how
        saved = ctx.saved_tensors  # once: hooks such as checkpoint's unpack at each access
        needs = ctx.needs_input_grad[1:]
        count = len(needs)
        inputs, kept = saved[:count], saved[count:]
        changed = ctx.watched is not None and ctx.watched[0]._version != ctx.watched[1]
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
