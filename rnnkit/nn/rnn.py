"""The vanilla recurrent network, as a layer and as a cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import functional
from .base import TORCH, RecurrentCell, RecurrentLayer, answered_by_torch


class RNN(RecurrentLayer):
    r"""Multi-layer vanilla RNN, a drop-in for :class:`torch.nn.RNN`.

    .. math:: h_t = \mathrm{act}(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    T steps, B rows, I = input_size, H = hidden_size, L = num_layers, D = 2 if bidirectional else 1.

    Args:
        input_size, hidden_size: I and H.
        num_layers: L, layers stacked on one another.
        nonlinearity: ``'tanh'`` or ``'relu'``.
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]; states are not concerned.
        dropout: probability with which each output of every layer but the last is zeroed in training.
        bidirectional: a second set of weights runs from the end.
        proj_size: 0; torch's layers have it in this place, and refuse it by name, as only an LSTM has a projection.
        device, dtype: of the parameters.
        backend: ``'auto'`` or a backend's name; a named one runs or raises with its reasons.
        recompute: least memory: forward and backward go in short ranges of time, and hold no gradient of
            pre-activations for more than one.
        heads: n blocks of H/n in W_hh, which is block-diagonal; weight_hh_l* holds them alone, [H, H/n]. 1, as
            torch has, for a full W_hh.

    Inputs: ``input, hx, *, lengths, reset, reset_state, return_all_states``
        as in :func:`rnnkit.functional.lstm`, with h alone for a state: hx is [L·D, B, H].

    Outputs: ``output [T, B, D·H], h_n [L·D, B, H]``, and with return_all_states ``h_all [L·D, T, B, H]``.

    Errors: those of torch.nn.RNN for its own arguments; ValueError, TypeError and NotImplementedError as in
    :func:`rnnkit.functional.lstm` for the others.

    Source: Elman, "Finding structure in time", Cognitive Science 14 (1990).
    """

    TORCH_NAME = "RNN"
    nonlinearity: str

    @answered_by_torch("RNN")
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        recompute: bool = False,
        heads: int = 1,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        mode = f"RNN_{nonlinearity.upper()}"
        self._take_heads(heads, hidden_size, proj_size, backend)
        tail = bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        super().__init__(mode, input_size, hidden_size, num_layers, *tail)
        self._set_up(backend, recompute)

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
        cell = "rnn_relu" if self.mode == "RNN_RELU" else "rnn_tanh"
        return self._run(cell, input, hx, lengths, reset, reset_state, return_all_states)


class RNNCell(RecurrentCell):
    r"""One step of a vanilla RNN, a drop-in for :class:`torch.nn.RNNCell`.

    .. math:: h' = \mathrm{act}(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Args:
        input_size, hidden_size: I and H.
        bias: whether there are b_ih and b_hh.
        nonlinearity: ``'tanh'`` or ``'relu'``.
        device, dtype: of the parameters.
        backend: ``'auto'`` or a backend's name; a named one runs or raises with its reasons.

    Inputs: input [B, I] or [I]; hx [B, H] or [H], zeros where missing.

    Outputs: h' [B, H] or [H].

    Errors: those of torch.nn.RNNCell; NotImplementedError where a named backend cannot run it.

    Source: Elman, "Finding structure in time", Cognitive Science 14 (1990).
    """

    TORCH_NAME = "RNNCell"
    __constants__ = TORCH["RNNCell"].__constants__  # type: ignore[attr-defined]
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        self._set_backend(backend)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; see the class."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._run(functional.rnn_named(self.nonlinearity), input, hx)
