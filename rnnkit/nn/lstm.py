"""The LSTM, as a layer and as a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .base import TORCH, RecurrentCell, RecurrentLayer, answered_by_torch


class LSTM(RecurrentLayer):
    r"""Multi-layer LSTM, a drop-in for :class:`torch.nn.LSTM`.

    .. math::
        i, f, o = \sigma(\cdot) \quad g = \tanh(\cdot) \quad
        c_t = f \odot c_{t-1} + i \odot g \quad h_t = o \odot \tanh(c_t)

    each (·) being :math:`W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}` with its own block of rows, in the order
    i, f, g, o. With a projection, :math:`h_t = W_{hr} (o \odot \tanh(c_t))`.

    T steps, B rows, I = input_size, H = hidden_size, P = proj_size, L = num_layers, D = 2 if bidirectional else 1,
    N = P with a projection, else H.

    Args:
        input_size, hidden_size: I and H.
        num_layers: L, layers stacked on one another.
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]; states are not concerned.
        dropout: probability with which each output of every layer but the last is zeroed in training.
        bidirectional: a second set of weights runs from the end.
        proj_size: P, 0 for none; less than H.
        device, dtype: of the parameters.
        backend: ``'auto'`` or a backend's name; a named one runs or raises with its reasons.
        recompute: keep y and c alone for the backward, which goes in short ranges of time and makes the gates of each
            again: least memory, for about a forward more of work.
        heads: n blocks of H/n in W_hh, which is block-diagonal; weight_hh_l* holds them alone, [4H, H/n]. 1, as
            torch has, for a full W_hh.

    Inputs: ``input, hx, *, lengths, reset, reset_state, return_all_states`` as in :func:`rnnkit.functional.lstm`.

    Outputs: ``output [T, B, D·N], (h_n [L·D, B, N], c_n [L·D, B, H])``, and with return_all_states
    ``(h_all [L·D, T, B, N], c_all [L·D, T, B, H])``.

    Errors: those of torch.nn.LSTM for its own arguments; ValueError, TypeError and NotImplementedError as in
    :func:`rnnkit.functional.lstm` for the others.

    Source: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997); Gers, Schmidhuber and
    Cummins, "Learning to forget", Neural Computation 12 (2000); projection: Sak, Senior and Beaufays (2014).
    """

    TORCH_NAME = "LSTM"

    @answered_by_torch("LSTM")
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
        backend: str = "auto",
        recompute: bool = False,
        heads: int = 1,
    ) -> None:
        self._take_heads(heads, hidden_size, proj_size, backend)
        tail = bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        super().__init__("LSTM", input_size, hidden_size, num_layers, *tail)
        self._set_up(backend, recompute)

    # torch.nn.LSTM has these beside RNNBase; they read nothing that we do not have.
    get_expected_cell_size = TORCH["LSTM"].get_expected_cell_size  # type: ignore[attr-defined]
    check_forward_args = TORCH["LSTM"].check_forward_args  # type: ignore[attr-defined]
    permute_hidden = TORCH["LSTM"].permute_hidden  # type: ignore[attr-defined]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_state: Sequence[Tensor] | None = None,
        return_all_states: bool = False,
    ) -> Any:
        """Run the sequence; see the class."""
        return self._run("lstm", input, hx, lengths, reset, reset_state, return_all_states)


class LSTMCell(RecurrentCell):
    r"""One step of an LSTM, a drop-in for :class:`torch.nn.LSTMCell`.

    .. math::
        i, f, o = \sigma(\cdot) \quad g = \tanh(\cdot) \quad
        c' = f \odot c + i \odot g \quad h' = o \odot \tanh(c')

    Args:
        input_size, hidden_size: I and H.
        bias: whether there are b_ih and b_hh.
        device, dtype: of the parameters.
        backend: ``'auto'`` or a backend's name; a named one runs or raises with its reasons.

    Inputs: input [B, I] or [I]; hx (h [B, H], c [B, H]) or without B, zeros where missing.

    Outputs: (h', c'), each [B, H] or [H].

    Errors: those of torch.nn.LSTMCell; NotImplementedError where a named backend cannot run it.

    Source: as :class:`LSTM`.
    """

    TORCH_NAME = "LSTMCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self._set_backend(backend)

    def forward(self, input: Tensor, hx: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step; see the class."""
        return self._run("lstm", input, hx)
