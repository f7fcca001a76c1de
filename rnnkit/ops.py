"""`layer`: one layer, one direction, all T, input projection inside. The autograd boundary of the package.

What happens, in order: checks; the choice of a backend; autocast, as torch.nn does it on that device; the
reference's formulas where a transform asks for a function it can differentiate (vmap, torch.func, forward mode) or
for a graph of torch's own operators (tracing, ONNX); one opaque operator under compile and export; else the backend
itself, below an autograd function when a gradient is wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .autocast import autocasting, layer_dtypes, no_autocast
from .backends import REFERENCE, LayerInputs, LayerOptions, LayerOutputs, describe, select_backend
from .cells import CELLS
from .layer import override
from .layer.autograd import any_requires_grad, direct
from .layer.custom_ops import states_of
from .layer.override import override_layer
from .layer.profiler import annotated

__all__ = ["computed_by", "layer", "override_layer", "step"]

_plain_eager, _transforming = checks.is_plain_eager, checks.transforming
_autocast = torch._C._is_any_autocast_enabled  # for any type of device
computed_by = override_layer  # its first name


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
        ValueError: sizes, ranks, values.
        TypeError: types, dtypes.
        NotImplementedError: a named backend that cannot run this layer, with its reasons.
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
    cell: str, t: LayerInputs, o: LayerOptions, backend: str, *, fused: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    device = t.x.device.type
    plain = _plain_eager(*t) and not t.x.is_meta
    if override.active is not None or not plain or _autocast():
        t = t.with_zero_states(CELLS[cell].has_c)
    if override.active is not None:
        return annotated(cell, functools.partial(override.active, cell, t, o), t)
    dtypes = layer_dtypes(cell, t, fused=fused) if autocasting(device) else None
    if dtypes is not None:
        t = t.cast(dtypes[0])
    train = torch.is_grad_enabled() and any_requires_grad(t)
    chosen = select_backend(backend, describe(cell, t, o, train=train), cache=plain)
    if plain:
        with no_autocast(device):
            found = direct(cell, chosen, t, o, train)
    else:
        found = _traced(cell, chosen.name, t, o, train)
    if dtypes is None:
        return found
    y, h_n, c_n, c_all = found
    return y.to(dtypes[1]), h_n.to(dtypes[1]), c_n, c_all


def _traced(cell: str, backend: str, t: LayerInputs, o: LayerOptions, train: bool) -> LayerOutputs:
    """Where torch, or somebody, looks at what is called."""
    compiling = torch.compiler.is_compiling()
    opaque = compiling and not torch.onnx.is_in_onnx_export() and not _compiling_a_transform()
    if not opaque:
        with no_autocast(t.x.device.type):
            if compiling or torch.jit.is_tracing() or _transforming() or forward_ad._current_level >= 0:
                return annotated(cell, lambda: REFERENCE.forward(cell, t, o, train=False).outputs, t)
    y, h_n, c_n, c_all, _, _ = torch.ops.rnnkit.layer_forward(cell, backend, *o, *t, train)
    has_c_n, has_c_all = states_of(cell, o)
    return LayerOutputs(y, h_n, c_n if has_c_n else None, c_all if has_c_all else None)


def _compiling_a_transform() -> bool:
    """Whether torch.compile traces this call inside of a transform of torch.func, which needs formulas that it can
    differentiate: of the opaque operator it would take the derivative for zero. Dynamo guards on the transforms, so the
    answer holds as long as the compiled code does."""
    return torch._C._functorch.maybe_current_level() is not None


# As torch.compiler.assume_constant_result does, which would import the compiler with the package.
_compiling_a_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
