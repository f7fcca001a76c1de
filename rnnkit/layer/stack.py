"""A whole call as one: every layer, both directions, dropout between them, in the caller's layout.

What a call is (options, sizes, dtype, whether a gradient is wanted, which backend is asked for) is worked out once and
remembered. Where one backend that has `stacks` runs every layer, the call is one native function, and one node of
torch's graph when a gradient is wanted. It checks every tensor at every call; what it refuses by `Unfit`, and every
call that is not plain, `functional` runs layer by layer, over checks that say what is wrong or make it right.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import checks
from ..autocast import autocasting, no_autocast
from ..backends import Backend, StackInputs, StackOptions, choice_facts, describe_stack, select_backend
from ..backends.cpu.extension import NotPlain, Unfit
from . import override
from .autograd import direct_layer, is_differentiated, save_for_backward, was_changed
from .profiler import as_row, named, recording

Dropout = Callable[[Tensor, int], Tensor]  # of the output of layer k
LayerByLayer = Callable[..., list[Tensor]]  # functional.layer_by_layer
NODE_BYTES = 1 << 20
"""One node holds what all its layers saved until the last gradient is there. Where what is saved and the gradients both
take more than this, a node a layer lets go of it in turn, and costs little beside the layer's work."""
CACHE_SIZE = 1024  # plans; T and B are part of one. A program that meets more starts over
_plans: dict[tuple, tuple[Backend, list[Any]] | None] = {}
_plain_eager, _function_modes = checks.is_plain_eager, checks.function_modes
_autocast = torch._C._is_any_autocast_enabled  # for any type of device
_PLAIN, _SEQUENCES = (Parameter, Tensor), (list, tuple)


def run(
    o: StackOptions, backend: str, t: StackInputs, weights: Sequence[Tensor], layers: LayerByLayer
) -> Sequence[Tensor] | None:
    """The results that `o.outputs` names, in the caller's layout.

    None where the call is not plain, is not for one backend that has `stacks`, or something does not fit.
    layers: `functional.layer_by_layer`, the same call over `ops.layer`, for derivatives beyond the first.
    """
    x = t.x
    if type(x) is not Tensor or not x.is_cpu or x.is_nested or override.active is not None or not _plain_eager():
        return None
    if (_function_modes() and not checks.only_default_devices()) or (_autocast() and autocasting("cpu")):
        return None
    if type(weights) not in _SEQUENCES or len(weights) < 2 or type(weights[1]) not in _PLAIN:
        return None
    tensors = (*t, *weights)
    train = False
    for v in tensors if torch.is_grad_enabled() else ():
        if v is not None:
            if type(v) not in _PLAIN:
                return None
            train = train or v.requires_grad
    facts = choice_facts(backend)
    masked = t.lengths is None, t.reset is None, t.h_reset is None
    key = (o, facts, train, x.dtype, x.shape, len(weights), weights[1].shape, masked)
    plan = _plans.get(key, ...) if facts is not None else ...
    if plan is ...:
        plan = _plan(o, backend, t, weights, train)
        if len(_plans) >= CACHE_SIZE:
            _plans.clear()
        if facts is not None:  # nobody records the choices
            _plans[key] = plan
    if plan is None:
        return None
    chosen, specs = plan
    try:
        if train:
            found = named(StackFunction, o.cell).apply((o, chosen, layers), *tensors)
        elif recording():
            found = as_row(o.cell, functools.partial(chosen.stack_forward, o, b"", tensors, ()), tensors)
        else:
            found = chosen.stack_forward(o, b"", tensors, ())
    except Unfit:
        return None
    for spec in specs if facts is None else ():
        select_backend(backend, spec)
    return found


def _plan(
    o: StackOptions, backend: str, t: StackInputs, weights: Sequence[Tensor], train: bool
) -> tuple[Backend, list[Any]] | None:
    """The backend that runs every layer at once, if there is one, and what each layer is to it."""
    each = len(weights) // (o.layers * o.directions)
    if t.x.dim() != o.dims or each < 2:
        return None
    if any(w is None or w.dim() != 2 for w in (*weights[:2], *(weights[each - 1 : each] if o.proj_size else ()))):
        return None
    specs = describe_stack(o, t, weights, train=train)
    try:
        only, *others = {select_backend(backend, spec, report=False) for spec in specs}
    except NotImplementedError:  # the first layer in turn says why
        return None
    if others or not only.stacks:
        return None
    gradients = sum(w.numel() * w.element_size() for w in weights if w is not None)
    if train and o.layers > 1 and gradients > NODE_BYTES and sum(map(only.saved_bytes, specs)) > NODE_BYTES:
        return None
    return only, specs


class StackFunction(torch.autograd.Function):
    """A whole call as one node of torch's graph. Takes `StackInputs`, then the weights; gives the results there are."""

    @staticmethod
    def forward(
        ctx: Any, what: tuple[StackOptions, Backend, LayerByLayer], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        o, backend, _ = what
        ctx.what, ctx.needs, ctx.version_guard = what, bytes(ctx.needs_input_grad[1:]), None
        found = backend.stack_forward(o, ctx.needs, tensors, ())
        results = sum(o.outputs)
        given, kept = tuple(found[:results]), found[results:]
        if o.reads_output:
            save_for_backward(ctx, tensors, given[0], kept, guard=o.cell != "lstm" or o.directions == 2)
        else:
            ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return given

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of `what` (none) and of the tensors, from those of the results."""
        o, backend, _ = ctx.what
        saved = ctx.saved_tensors  # once: hooks such as checkpoint's unpack at each access
        count = len(ctx.needs)
        masks = saved[count + o.reads_output :][: o.layers - 1] if o.dropout > 0 else ()  # y, masks, what else is kept
        if all(g is None for g in grads):
            return (None,) * (1 + count)
        if not is_differentiated(grads) and not checks.dispatch_modes():
            with contextlib.suppress(NotPlain):  # a gradient whose memory does not hold its values
                if was_changed(ctx):
                    y, *again = backend.stack_forward(o, ctx.needs, saved[:count], masks)
                    saved = (*saved[:count], y, *again[sum(o.outputs) - 1 :])
                return (None, *backend.stack_backward(o, ctx.needs, saved, grads))
        return (None, *_layer_by_layer(ctx, saved[:count], masks, grads))


def _layer_by_layer(
    ctx: Any, tensors: Sequence[Tensor | None], masks: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Iterator[Tensor | None]:
    """The same by the layers' own nodes, which torch can differentiate again; nothing is chosen or cast anew."""
    o, backend, layers = ctx.what
    again = torch.is_grad_enabled()
    with no_autocast("cpu"), torch.enable_grad():
        # views: what is asked for is the gradient of each alone, also where one of them was made of another
        live: Any = [v.view_as(v) if v is not None and v.requires_grad else v for v in tensors]
        run = functools.partial(direct_layer, backend)
        results = layers(o, run, StackInputs(*live[:7]), live[7:], lambda y, k: y * masks[k])
        used = [k for k, g in enumerate(grads) if g is not None]
        wanted = [v for v, need in zip(live, ctx.needs, strict=True) if need]
        received = [grads[k] for k in used]
        found = torch.autograd.grad([results[k] for k in used], wanted, received, create_graph=again, allow_unused=True)
    left = iter(found)
    return (next(left) if need else None for need in ctx.needs)
