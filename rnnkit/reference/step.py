"""What goes into one step of a cell and what comes out: the vocabulary that the reference's files share.

Shapes: B rows, H hidden size, G gates, P projection size (N is P with a projection, else H).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """The state that a step starts from."""

    h: Tensor  # [B, N]
    c: Tensor | None  # [B, H], LSTM


class Weights(NamedTuple):
    """What the recurrence multiplies by."""

    w_hh: Tensor  # [G·H, N]
    b_hn: Tensor | None  # [H], GRU with reset after: the bias inside the reset gate's product
    w_hr: Tensor | None  # [P, H], LSTM with a projection


class Step(NamedTuple):
    """What a step gives: the new state, and the gates that its backward needs."""

    h: Tensor  # [B, N]
    c: Tensor | None  # [B, H]
    gates: Tensor | None  # [B, S·H]


class Gradients(NamedTuple):
    """What a step's backward gives."""

    dgx: Tensor  # [B, G·H]: of the pre-activations, as the input projection made them
    dgh: Tensor  # [B, G·H]: of the recurrent product; differs from dgx where a gate multiplies that product
    dh: Tensor  # [B, N]: of the state before the step
    dc: Tensor | None  # [B, H]
