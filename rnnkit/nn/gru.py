"""The gated recurrent unit, as a layer and as a cell, with the reset gate after the product or before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import checks, functional
from .base import RecurrentCell, RecurrentLayer, answered_by_torch


class GRU(RecurrentLayer):
    r"""Multi-layer GRU, a drop-in for :class:`torch.nn.GRU`.

    .. math::
        r = \sigma(\cdot) \quad z = \sigma(\cdot) \quad h_t = (1 - z) \odot n + z \odot h_{t-1}

    with :math:`n = \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h_{t-1} + b_{hn}))` as in torch and cuDNN
    (``reset_after=True``), or :math:`n = \tanh(W_{in} x_t + b_{in} + W_{hn} (r \odot h_{t-1}) + b_{hn})` as in the
    original (``reset_after=False``; Keras calls it the same, ONNX ``linear_before_reset=0``). Textbooks that write
    :math:`h_t = (1 - z) h_{t-1} + z \tilde h` have the z block's weights and biases negated.

    T steps, B rows, I = input_size, H = hidden_size, L = num_layers, D = 2 if bidirectional else 1.

    Args:
        input_size, hidden_size: I and H.
        num_layers: L, layers stacked on one another.
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]; states are not concerned.
        dropout: probability with which each output of every layer but the last is zeroed in training.
        bidirectional: a second set of weights runs from the end.
        proj_size: 0; torch's layers have it in this place, and refuse it by name, as only an LSTM has a projection.
        device, dtype: of the parameters.
        reset_after: where the reset gate acts, see above.
        backend: ``'auto'`` or a backend's name; a named one runs or raises with its reasons.
        recompute: keep y alone for the backward, which goes in short ranges of time and makes the gates of each
            again: least memory, for about a forward more of work.
        heads: n blocks of H/n in W_hh, which is block-diagonal; weight_hh_l* holds them alone, [3H, H/n]. 1, as
            torch has, for a full W_hh.

    Inputs: ``input, hx, *, lengths, reset, reset_state, return_all_states``
        as in :func:`rnnkit.functional.lstm`, with h alone for a state: hx is [L·D, B, H].

    Outputs: ``output [T, B, D·H], h_n [L·D, B, H]``, and with return_all_states ``h_all [L·D, T, B, H]``.

    Errors: those of torch.nn.GRU for its own arguments; ValueError, TypeError and NotImplementedError as in
    :func:`rnnkit.functional.lstm` for the others.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
    translation", EMNLP 2014.
    """

    TORCH_NAME = "GRU"

    @answered_by_torch("GRU")
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        backend: str = "auto",
        recompute: bool = False,
        heads: int = 1,
    ) -> None:
        self._take_heads(heads, hidden_size, proj_size, backend)
        tail = bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        super().__init__("GRU", input_size, hidden_size, num_layers, *tail)
        self._set_up(backend, recompute)
        checks.expect_bool(reset_after, "reset_after")
        if not reset_after:
            self.reset_after = False

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
    ) -> Any:
        """Run the sequence; see the class."""
        cell = functional.gru_named(self.reset_after)
        return self._run(cell, input, hx, lengths, reset, reset_state, return_all_states)


class GRUCell(RecurrentCell):
    r"""One step of a GRU, a drop-in for :class:`torch.nn.GRUCell`.

    .. math:: h' = (1 - z) \odot n + z \odot h

    with n as in :class:`GRU` for the same ``reset_after``.

    Args:
        input_size, hidden_size: I and H.
        bias: whether there are b_ih and b_hh.
        device, dtype: of the parameters.
        reset_after: where the reset gate acts, see :class:`GRU`.
        backend: ``'auto'`` or a backend's name; a named one runs or raises with its reasons.

    Inputs: input [B, I] or [I]; hx [B, H] or [H], zeros where missing.

    Outputs: h' [B, H] or [H].

    Errors: those of torch.nn.GRUCell; NotImplementedError where a named backend cannot run it.

    Source: as :class:`GRU`.
    """

    TORCH_NAME = "GRUCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        self._set_backend(backend)
        checks.expect_bool(reset_after, "reset_after")
        if not reset_after:
            self.reset_after = False

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; see the class."""
        return self._run(functional.gru_named(self.reset_after), input, hx)
