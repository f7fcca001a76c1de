"""The LSTM, and cells that change its gates: peepholes, coupled gates, exponential gates.

Blocks stand in torch's order, i f g o. σ is `recurrent_activation`, φ is `activation`; ⊙ is written as a product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..custom.declare import per_unit
from .base import Activated, Activation


class LSTM(Activated):
    """The LSTM with a forget gate, `rnnkit.LSTM` written as a cell.

        i, f, o = σ(a_i), σ(a_f), σ(a_o)        a = W_ih x + b_ih + W_hh h + b_hh
        c' = f c + i φ(a_g)
        h' = o φ(c')

    Args:
        activation: φ.
        recurrent_activation: σ.

    Source: F. Gers, J. Schmidhuber, F. Cummins, "Learning to forget: continual prediction with LSTM", Neural
    Computation 12, 2000.
    """

    gates, states = 4, ("h", "c")

    @staticmethod
    def step(a: Tensor, c: Tensor, activation: Activation, recurrent_activation: Activation) -> tuple[Tensor, Tensor]:
        i, f, g, o = a.chunk(4, -1)
        i, f, o = recurrent_activation(i), recurrent_activation(f), recurrent_activation(o)
        c = f * c + i * activation(g)
        return o * activation(c), c


class PeepholeLSTM(Activated):
    """An LSTM whose gates see the cell state: i and f the old one, o the new one.

        i, f = σ(a_i + p_i c), σ(a_f + p_f c)
        c' = f c + i φ(a_g)
        o = σ(a_o + p_o c')
        h' = o φ(c')

    Args:
        activation: φ.
        recurrent_activation: σ.

    Source: F. Gers, N. Schraudolph, J. Schmidhuber, "Learning precise timing with LSTM recurrent networks", JMLR 3,
    2002; in this form A. Graves, "Generating sequences with recurrent neural networks", arXiv 1308.0850, equations
    7-11.
    """

    gates, states = 4, ("h", "c")
    p_i = p_f = p_o = per_unit()

    @staticmethod
    def step(
        a: Tensor,
        c: Tensor,
        p_i: Tensor,
        p_f: Tensor,
        p_o: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
    ) -> tuple[Tensor, Tensor]:
        i, f, g, o = a.chunk(4, -1)
        i, f = recurrent_activation(i + p_i * c), recurrent_activation(f + p_f * c)
        c = f * c + i * activation(g)
        o = recurrent_activation(o + p_o * c)
        return o * activation(c), c


class CoupledLSTM(Activated):
    """Coupled input and forget gates (CIFG): what is let in is what is forgotten. Three blocks, i g o.

        i, o = σ(a_i), σ(a_o)
        c' = (1 - i) c + i φ(a_g)
        h' = o φ(c')

    Args:
        activation: φ.
        recurrent_activation: σ.

    Source: K. Greff, R. Srivastava, J. Koutník, B. Steunebrink, J. Schmidhuber, "LSTM: a search space odyssey", IEEE
    Transactions on Neural Networks and Learning Systems 28, 2017, arXiv 1503.04069, variant CIFG; without peepholes.
    """

    gates, states = 3, ("h", "c")

    @staticmethod
    def step(a: Tensor, c: Tensor, activation: Activation, recurrent_activation: Activation) -> tuple[Tensor, Tensor]:
        i, g, o = a.chunk(3, -1)
        i, o = recurrent_activation(i), recurrent_activation(o)
        c = (1 - i) * c + i * activation(g)
        return o * activation(c), c


class SLSTM(Activated):
    """The sLSTM of xLSTM: exponential input and forget gates, a normaliser n, and m that keeps the exponents small.

        m' = max(log σ(a_f) + m, a_i)           a_i where n = 0, before the first step
        i, f = exp(a_i - m'), exp(log σ(a_f) + m - m')
        c' = f c + i φ(a_z)
        n' = f n + i
        h' = σ_o(a_o) c' / n'

    Blocks i f z o. States h, c, n, m, zeros at first. `Custom(SLSTM, ..., heads=4)` makes W_hh block-diagonal, as the
    paper's heads. The numbers are those of the package's vanilla cell, which asks whether n is 0 for the whole batch
    at once; here each unit is asked, so that a reset begins as a first step does.

    Args:
        activation: φ.
        recurrent_activation: σ_o, of the output gate alone.

    Source: M. Beck, K. Pöppel et al., "xLSTM: extended long short-term memory", NeurIPS 2024, arXiv 2405.04517,
    equations 8-17; github.com/NX-AI/xlstm, xlstm/blocks/slstm/src/vanilla/slstm.py.
    """

    gates, states = 4, ("h", "c", "n", "m")

    @staticmethod
    def step(
        a: Tensor,
        c: Tensor,
        n: Tensor,
        m: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        i, f, z, o = a.chunk(4, -1)
        log_f = F.logsigmoid(f) + m
        m = torch.where(n == 0, i, torch.maximum(log_f, i))
        # where n is 0 the exponent of f may be of any size, and what f multiplies is 0: infinity would make NaN of it
        i, f = torch.exp(i - m), torch.exp((log_f - m).clamp(max=0))
        c, n = f * c + i * activation(z), f * n + i
        return recurrent_activation(o) * c / n, c, n, m
