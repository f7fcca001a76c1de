"""Both directions of a layer at once on a GPU: whether they may, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..autocast import autocasting, layer_dtypes
from ..backends import LayerInputs, LayerOptions, describe, select_backend
from ..checks import is_plain_eager
from . import override, streams
from .autograd import any_requires_grad

Ran = TypeVar("Ran")


def directions_overlap(
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
    if not streams.on_gpu(x) or override.active is not None or x.is_meta:
        return False
    if not is_plain_eager(x, *weights, *states, lengths, reset) or torch._C._autograd._top_saved_tensors_default_hooks(
        False
    ):
        return False
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
    t = LayerInputs(
        x, *states[:2], w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) % 2 else None, lengths, reset, *states[2:]
    )
    spec = describe(cell, t, options, train=torch.is_grad_enabled() and any_requires_grad(t))
    if autocasting(x.device.type):
        spec = spec._replace(dtype=layer_dtypes(cell, t, fused=True)[0])
    try:
        return select_backend(backend, spec, report=False).concurrent_directions
    except (NotImplementedError, ValueError):
        return False


def at_once(run: Callable[[int, Tensor], Ran], x: Tensor, side: streams.SideStream) -> tuple[Ran, Ran]:
    """Both directions of a layer of x: the reverse one on the side's stream, the forward one on the current.

    The reverse one first: autograd begins with the node that was made last, so that its backward, which the current
    stream waits for, comes last there too. It sees x as a view where x is a leaf, or the gradient of x would be summed
    on the side stream.
    """
    if x.is_leaf and x.requires_grad and torch.is_grad_enabled():
        x = x.view_as(x)
    try:
        with side.work():
            reverse = run(1, x)
        return run(0, x), reverse
    finally:
        side.join()
