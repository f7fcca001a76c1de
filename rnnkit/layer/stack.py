"""A whole call as one: every layer, both directions, dropout between them, in the caller's layout.

What a call is (cell, layers, sizes, dtype, options, whether a gradient is wanted, which backend is asked for) is worked
out once and remembered. Where one backend that has `stacks` runs every layer, the call is one native function, and one
node of torch's graph when a gradient is wanted. It checks every tensor at every call; what it refuses by `Unfit`, and
every call that is not plain, `functional` runs layer by layer, over checks that say what is wrong or make it right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import checks
from ..autocast import autocasting
from ..backends import Backend, LayerSpec, choice_facts, select_backend
from ..backends.cpu.extension import Unfit
from ..cells import CELLS
from . import override
from .autograd import is_differentiated, save_for_backward, was_changed
from .profiler import as_row, named, recording

TIME_MAJOR, BATCH_FIRST, UNBATCHED, STEP = range(4)
"""Layouts of x: [T, B, I], [B, T, I], [T, I], and one step [B, I]. As csrc/layer/stack.h numbers them."""

How = tuple[str, int, int, int, int, bool, bool, float]
"""Cell, layers, directions, P (0: no projection), layout, all_states, recompute, probability of dropout."""
Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""x, h_0, c_0, lengths, reset, and the states at a reset h_r, c_r; as the caller holds them."""
LayerByLayer = Callable[[How, str, Tensors, Sequence[Tensor], Callable[[Tensor, int], Tensor]], list[Tensor]]
"""`functional.layer_by_layer`: the same call and the same results over `ops.layer`."""

NODE_BYTES = 4 << 20
"""One node holds what all its layers saved until the last gradient is there. Where the weights, and so their gradients,
take more than this, a node a layer lets go of it in turn, and what a call costs does not matter."""
CACHE_SIZE = 1024  # plans; T and B are part of one. A program that meets more starts over
_plans: dict[tuple, Backend | None] = {}
_plain_eager, _function_modes = checks.is_plain_eager, checks.function_modes
_grad = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled  # for any type of device


def run(
    how: How, backend: str, tensors: Tensors, weights: Sequence[Tensor], layers: LayerByLayer
) -> Sequence[Tensor] | None:
    """y (not of a step), h_n, for an LSTM c_n, with all_states h_all and for an LSTM c_all, in the caller's layout.

    None where the call is not plain, is not for one backend that has `stacks`, or something does not fit.
    """
    x = tensors[0]
    if override.active is not None or type(x) is not Tensor or not _plain_eager() or _function_modes():
        return None
    if type(weights) is not list and type(weights) is not tuple:
        return None
    train = False
    for v in (*tensors, *weights):
        if type(v) is Parameter or type(v) is Tensor:
            train = train or v.requires_grad
        elif v is not None:
            return None
    train = train and _grad()
    if not x.is_cpu or x.is_nested or (_autocast() and autocasting("cpu")) or len(weights) < 2 or weights[1] is None:
        return None
    facts = choice_facts(backend)
    _, _, _, lengths, reset, h_r, _ = tensors
    given = lengths is None, reset is None, h_r is None
    key = (how, facts, train, x.dtype, x.shape, len(weights), weights[1].shape, given)
    chosen = _plans.get(key, _plans) if facts is not None else _plan(how, backend, tensors, weights, train, report=True)  # type: ignore[call-overload]
    if chosen is _plans:
        chosen = _plan(how, backend, tensors, weights, train, report=False)
        if len(_plans) >= CACHE_SIZE:
            _plans.clear()
        _plans[key] = chosen
    if chosen is None:
        return None
    try:
        if train:
            return named(StackFunction, how[0]).apply((how, chosen, backend, layers), *tensors, *weights)
        if recording():
            call = functools.partial(chosen.stack_forward, how, b"", tensors, weights, ())
            return as_row(how[0], call, (*tensors, *weights))
        return chosen.stack_forward(how, b"", tensors, weights, ())
    except Unfit:
        return None


def _plan(
    how: How, backend: str, tensors: Tensors, weights: Sequence[Tensor], train: bool, *, report: bool
) -> Backend | None:
    """The backend that runs every layer at once, if there is one."""
    x, w_hh = tensors[0], weights[1]
    if x.dim() != (2 if how[4] in (UNBATCHED, STEP) else 3) or w_hh.dim() != 2:
        return None
    specs = list(_specs(how, tensors, len(weights), w_hh.shape, train))
    try:
        chosen = {select_backend(backend, spec, report=False) for spec in specs}
    except (NotImplementedError, ValueError):  # the first layer in turn says why
        return None
    only = chosen.pop()
    gates = CELLS[how[0]].gates
    elements = sum(gates * spec.hidden_size * (spec.input_size + spec.hidden_size) for spec in specs)
    node = len(specs) == 1 or not train or elements * x.element_size() <= NODE_BYTES
    if chosen or not only.stacks or not node:
        return None
    if report:
        for spec in specs:
            select_backend(backend, spec)
    return only


def _specs(how: How, tensors: Tensors, count: int, w_hh: torch.Size, train: bool) -> Iterator[LayerSpec]:
    """Each layer and direction, by the facts that a backend is chosen by."""
    cell, layers, directions, proj_size, layout, all_states, recompute, _ = how
    x, _, _, lengths, reset, h_r, _ = tensors
    *leading, features = x.shape
    steps, rows = (leading[0], 1) if layout == UNBATCHED else (1, leading[0]) if layout == STEP else leading
    if layout == BATCH_FIRST:
        steps, rows = rows, steps
    hidden, bias = w_hh[0] // CELLS[cell].gates, count // (layers * directions) > 3
    masked = lengths is not None, reset is not None, h_r is not None
    for k in range(layers):
        for d in range(directions):
            width = directions * w_hh[1] if k else features
            sizes = (steps, rows, width, hidden, proj_size, bias)
            yield LayerSpec(cell, "cpu", x.dtype, *sizes, *masked, d == 1, all_states, recompute, train)


class StackFunction(torch.autograd.Function):
    """A whole call as one node of torch's graph. Takes `Tensors`, then the weights."""

    @staticmethod
    def forward(ctx: Any, what: tuple[How, Backend, str, LayerByLayer], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        how, backend, *_ = what
        ctx.what, ctx.needs = what, bytes(ctx.needs_input_grad[1:])
        found = backend.stack_forward(how, ctx.needs, tensors[:7], tensors[7:], ())  # type: ignore[arg-type]
        outputs = _outputs(how)
        given, kept = tuple(found[:outputs]), found[outputs:]
        if _reads_output(how):
            save_for_backward(ctx, tensors, given[0], kept, has_c=CELLS[how[0]].has_c)
        else:
            ctx.version_guard = None
            ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return given

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of `what` (none) and of the tensors, from those of the outputs."""
        how, backend, name, layers = ctx.what
        saved = ctx.saved_tensors  # once: hooks such as checkpoint's unpack at each access
        count = len(ctx.needs)
        tensors, weights, kept = saved[:7], saved[7:count], saved[count:]
        if all(g is None for g in grads):
            return (None,) * (1 + count)
        y, kept = (kept[0], kept[1:]) if _reads_output(how) else (None, kept)
        masks = kept[: how[1] - 1] if how[7] > 0 else ()
        if not is_differentiated(grads) and not checks.dispatch_modes():
            try:
                if was_changed(ctx):
                    y, *rest = backend.stack_forward(how, ctx.needs, tensors, weights, masks)
                    kept = rest[_outputs(how) - 1 :]
                given = _by_output(how, grads)
                found = iter(backend.stack_backward(how, ctx.needs, tensors, weights, y, kept, given))
                return (None, *(next(found) if need else None for need in ctx.needs))
            except Unfit:  # a gradient whose memory does not hold its values
                pass
        return (None, *_again(layers, how, name, saved[:count], ctx.needs, masks, grads))


def _again(
    layers: LayerByLayer,
    how: How,
    backend: str,
    given: Sequence[Tensor | None],
    needs: bytes,
    masks: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients by the layers' own nodes, which torch can differentiate again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: what is asked for is the gradient of each alone, also where one of them was made of another
        live = [v.view_as(v) if v is not None and need else v for v, need in zip(given, needs, strict=True)]
        results = layers(how, backend, tuple(live[:7]), live[7:], lambda y, k: y * masks[k])  # type: ignore[arg-type]
        pairs = [(v, g) for v, g in zip(results, grads, strict=True) if g is not None]
        wanted = [v for v, need in zip(live, needs, strict=True) if need]
        outputs, received = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, received, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _reads_output(how: How) -> bool:
    """Whether the backward reads the y that the caller has, so that it is not kept beside."""
    return how[2] == 1 and how[4] != STEP


def _outputs(how: How) -> int:
    states = 2 if CELLS[how[0]].has_c else 1
    return (how[4] != STEP) + states * (2 if how[5] else 1)


def _by_output(how: How, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of y, h_n, c_n, h_all, c_all, None for those that are no outputs."""
    has_c, all_states, left = CELLS[how[0]].has_c, how[5], iter(grads)
    there = (how[4] != STEP, True, has_c, all_states, all_states and has_c)
    return [next(left) if v else None for v in there]
