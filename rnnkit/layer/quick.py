"""The quick way: a backend whose operators check all that they are given gets the tensors as they are.

What it refuses, by a RuntimeError, goes the ordinary way over `checks`, which says what is wrong or makes it right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import Backend, LayerInputs, LayerOptions, LayerOutputs, cached_backend, describe, select_backend
from . import override
from .autograd import LayerFunction, any_requires_grad, direct

_plain_eager, _function_modes = checks.is_plain_eager, checks.function_modes
_grad = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled  # for any type of device
_FORWARD, _REVERSE = LayerOptions(), LayerOptions(reverse=True)


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
    four = _four(weights) if override.active is None else None
    if four is None or type(x) is not Tensor or x.dim() != 3 or not _plain_eager() or _autocast() or _function_modes():
        return None
    try:
        steps, rows, features = x.shape
        if batch_first:
            steps, rows = rows, steps
        if steps == 0:  # torch's layers refuse it
            return None
        train = _grad() and any_requires_grad((*four, x, h_0, c_0))
        facts = (cell, "cpu", x.dtype, steps, rows, features, four[1].shape[1], 0, four[2] is not None)
        known = cached_backend(backend, (*facts, False, False, False, *_FORWARD, train, None))
        if known is None:  # a call goes the same way whether there was one like it: a checkpoint runs it twice
            known = _chosen_for_single(cell, x, h_0, c_0, weights, batch_first, backend, train)
        if known is None or not known.singles:
            return None
        if train:
            return LayerFunction.apply((cell, known, _FORWARD, batch_first), x, h_0, c_0, *four)
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


def quick_step(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], backend: str
) -> tuple[Tensor, Tensor | None] | None:
    """`step` without gradients the quick way; None where there is none."""
    four = _four(weights)
    if four is None or type(x) is not Tensor or x.dim() != 2 or not _plain_eager() or _autocast() or _function_modes():
        return None
    if c is not None and cell != "lstm":
        return None
    try:
        if _grad() and any_requires_grad((x, h, c, *four)):
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


def quick_layer(
    cell: str, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Sequence[Tensor], reverse: bool, backend: str
) -> LayerOutputs | None:
    """`layer` without lengths, resets and options the quick way; None where there is none."""
    o = _REVERSE if reverse is True else _FORWARD
    found = _quick(cell, x, h_0, c_0, weights, o, backend) if o.reverse is reverse else None
    if found is None or not found[0].validates_inputs:
        return None
    known, train, four = found
    try:
        return direct(cell, known, LayerInputs(x, h_0, c_0, *four), o, train)  # type: ignore[arg-type]
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
    if type(x) is not Tensor or x.dim() != 3 or not _plain_eager(h, c, *weights) or not x.is_cpu or _autocast():
        return None
    w_hh = weights[1]
    if w_hh.dim() != 2 or (c is not None and cell != "lstm"):
        return None
    train = _grad() and any_requires_grad((x, h, c, *weights))
    known = cached_backend(
        backend,  # and what `LayerSpec` holds
        (cell, "cpu", x.dtype, *x.shape, w_hh.shape[1], 0, four is weights, False, False, False, *o, train, None),
    )
    return None if known is None else (known, train, four)
