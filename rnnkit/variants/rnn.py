"""Cells of one gate: the plain RNN, and IndRNN, whose units see each other only through the layer above."""

from __future__ import annotations

import torch
from torch import Tensor

from ..custom.declare import Cell, option, per_unit
from .base import Activation


class RNN(Cell):
    """The vanilla RNN, `rnnkit.RNN` written as a cell.

        h' = φ(W_ih x + b_ih + W_hh h + b_hh)

    Args:
        activation: φ.

    Source: J. L. Elman, "Finding structure in time", Cognitive Science 14, 1990.
    """

    gates, states = 1, ("h",)
    activation = option("tanh")

    @staticmethod
    def step(a: Tensor, activation: Activation) -> Tensor:
        return activation(a)


class IndRNN(Cell):
    """The independently recurrent network: each unit remembers itself alone, there is no W_hh.

        h' = φ(W_ih x + b + u ⊙ h)

    u is drawn from U(0, 1). The paper keeps u within ±2^(1/T), T being the longest sequence: clamp it after a step of
    the optimiser. Layers are stacked, so that units meet.

    Args:
        activation: φ, relu in the paper.

    Source: S. Li, W. Li, C. Cook, C. Zhu, Y. Gao, "Independently recurrent neural network (IndRNN): building a longer
    and deeper RNN", CVPR 2018, arXiv 1803.04831.
    """

    gates, states = 1, ("h",)
    u = per_unit(torch.nn.init.uniform_)
    activation = option("relu")

    @staticmethod
    def step(gx: Tensor, h: Tensor, u: Tensor, activation: Activation) -> Tensor:
        return activation(gx + u * h)
