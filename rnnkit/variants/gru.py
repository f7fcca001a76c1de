"""The GRU with its reset gate in either place, and cells that change it: one gate, attention, batch norm.

σ is `recurrent_activation`, φ is `activation`; ⊙ is written as a product. Blocks stand in torch's order, r z n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..custom.declare import module, option, per_step, weight
from .base import Activated, Activation


class GRU(Activated):
    """The GRU with the reset gate after the product, `rnnkit.GRU` written as a cell.

        r, z = σ(x_r + h_r), σ(x_z + h_z)       x_· = W_ih x + b_ih, h_· = W_hh h + b_hh
        n = φ(x_n + r h_n)
        h' = (1 - z) n + z h

    Args:
        activation: φ.
        recurrent_activation: σ.

    Source: K. Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
    translation", EMNLP 2014, arXiv 1406.1078; in this form torch's and cuDNN's.
    """

    gates, states = 3, ("h",)

    @staticmethod
    def step(gx: Tensor, gh: Tensor, h: Tensor, activation: Activation, recurrent_activation: Activation) -> Tensor:
        x_r, x_z, x_n = gx.chunk(3, -1)
        h_r, h_z, h_n = gh.chunk(3, -1)
        r, z = recurrent_activation(x_r + h_r), recurrent_activation(x_z + h_z)
        n = activation(x_n + r * h_n)
        return (1 - z) * n + z * h


class GRUResetBefore(Activated):
    """The GRU with the reset gate before the product, `rnnkit.GRU(reset_after=False)` written as a cell.

        r, z = σ(x_r + W_r h), σ(x_z + W_z h)
        n = φ(x_n + W_n (r h))
        h' = (1 - z) n + z h

    `w_rz` holds W_r and W_z, `w_n` holds W_n; the one bias is b_ih.

    Args:
        activation: φ.
        recurrent_activation: σ.

    Source: K. Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
    translation", EMNLP 2014, arXiv 1406.1078, equations 5-8.
    """

    gates, states = 3, ("h",)
    w_rz, w_n = weight(2), weight(1)

    @staticmethod
    def step(
        gx: Tensor, h: Tensor, w_rz: Tensor, w_n: Tensor, activation: Activation, recurrent_activation: Activation
    ) -> Tensor:
        x_r, x_z, x_n = gx.chunk(3, -1)
        h_r, h_z = F.linear(h, w_rz).chunk(2, -1)
        r, z = recurrent_activation(x_r + h_r), recurrent_activation(x_z + h_z)
        n = activation(x_n + F.linear(r * h, w_n))
        return (1 - z) * n + z * h


class MGU(Activated):
    """The minimal gated unit: one gate forgets and lets in. Blocks f n.

        f = σ(x_f + W_f h)
        n = φ(x_n + W_n (f h))
        h' = (1 - f) h + f n

    `w_f` and `w_n` are W_f and W_n; the one bias is b_ih.

    Args:
        activation: φ.
        recurrent_activation: σ.

    Source: G.-B. Zhou, J. Wu, C.-L. Zhang, Z.-H. Zhou, "Minimal gated unit for recurrent neural networks",
    International Journal of Automation and Computing 13, 2016, arXiv 1603.09420.
    """

    gates, states = 2, ("h",)
    w_f, w_n = weight(1), weight(1)

    @staticmethod
    def step(
        gx: Tensor, h: Tensor, w_f: Tensor, w_n: Tensor, activation: Activation, recurrent_activation: Activation
    ) -> Tensor:
        x_f, x_n = gx.chunk(2, -1)
        f = recurrent_activation(x_f + F.linear(h, w_f))
        n = activation(x_n + F.linear(f * h, w_n))
        return (1 - f) * h + f * n


class AUGRU(Activated):
    """The GRU with attentional update gate: a score for each step scales how much of it is let in.

        r, u = σ(x_r + h_r), attention σ(x_u + h_u)
        n = φ(x_n + r h_n)
        h' = (1 - u) h + u n

    `layer(x, attention=scores)`, scores [T, B], with gradients. A step of attention 0 leaves the state as it is.

    Args:
        activation: φ.
        recurrent_activation: σ.

    Source: G. Zhou et al., "Deep interest evolution network for click-through rate prediction", AAAI 2019, arXiv
    1809.03672, its interest evolving layer.
    """

    gates, states = 3, ("h",)
    attention = per_step("row")

    @staticmethod
    def step(
        gx: Tensor,
        gh: Tensor,
        h: Tensor,
        attention: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
    ) -> Tensor:
        x_r, x_u, x_n = gx.chunk(3, -1)
        h_r, h_u, h_n = gh.chunk(3, -1)
        r, u = recurrent_activation(x_r + h_r), attention * recurrent_activation(x_u + h_u)
        n = activation(x_n + r * h_n)
        return (1 - u) * h + u * n


class SequenceBatchNorm(nn.BatchNorm1d):
    """Batch norm of [T, B, features] over the steps that rows have: what is padding counts for nothing."""

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            inside = torch.arange(input.shape[0], device=input.device)[:, None, None] < lengths[:, None]  # [T, B, 1]
            input = input.masked_fill(~inside, 0)
            if self.training:
                return self._over(input, inside)
        return super().forward(input.reshape(-1, input.shape[-1])).view_as(input)

    def _over(self, input: Tensor, inside: Tensor) -> Tensor:
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = inside.sum().clamp(min=1)
        mean = wide.sum((0, 1)) / count
        off = (wide - mean).masked_fill(~inside, 0)
        var = off.square().sum((0, 1)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
            unbiased = var * count / (count - 1).clamp(min=1)
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.lerp_(new.to(running.dtype), rate)  # type: ignore[union-attr]
        return (off * torch.rsqrt(var + self.eps) * self.weight + self.bias).to(input.dtype)


class LiGRU(Activated):
    """The light GRU: no reset gate, relu, and batch norm of what comes from the input. Blocks z n.

        z = σ(BN(W_z x) + U_z h)
        n = relu(BN(W_n x) + U_n h)
        h' = z h + (1 - z) n

    BN is over all steps of all rows at once, between projection and recurrence; its own parameters are
    `norm_l0.weight`, `norm_l0.bias`. What lies beyond `lengths` does not count. In eval running statistics are used.
    The paper has no other bias: `bias=False`. b_ih would be taken out again by BN, b_hh would be one more.

    Args:
        activation: relu in the paper.
        recurrent_activation: σ.

    Source: M. Ravanelli, P. Brakel, M. Omologo, Y. Bengio, "Light gated recurrent units for speech recognition", IEEE
    Transactions on Emerging Topics in Computational Intelligence 2, 2018, arXiv 1803.10225.
    """

    gates, states = 2, ("h",)
    activation = option("relu")
    norm = module(lambda gates, hidden: SequenceBatchNorm(gates * hidden))

    def project(self, gx: Tensor, lengths: Tensor | None, training: bool, **modules: Any) -> Tensor:
        return modules["norm"](gx, lengths)

    @staticmethod
    def step(a: Tensor, h: Tensor, activation: Activation, recurrent_activation: Activation) -> Tensor:
        z, n = a.chunk(2, -1)
        z = recurrent_activation(z)
        return z * h + (1 - z) * activation(n)
