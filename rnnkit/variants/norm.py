"""Cells with layer norm or RMS norm within the recurrence: LSTM and GRU in both common forms, DreamerV3's block GRU.

The two forms: what comes from the input and from the state are normalised apart (Ba et al.), or their sum is.
σ is `recurrent_activation`, φ is `activation`; ⊙ is written as a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..custom.declare import module, option, per_unit, weight
from .base import Activated, Activation


class LayerNormLSTM(Activated):
    """An LSTM with layer norm of W_x x, of W_h h, each over all four gates, and of the cell state that goes out.

        i, f, g, o = LN(W_h h; α1) + LN(W_x x; α2, β)
        c' = σ(f) c + σ(i) φ(g)
        h' = σ(o) φ(LN(c'; α3, β3))

    α1 is `gain_i` ... `gain_o`, α2 and β are norm_x_l0.weight and `.bias` (the paper's β1 + β2 + b, which cannot be
    told apart), α3 and β3 are `gain_c` and `shift_c`. The paper has no bias within LN: `bias=False`; else b_ih and b_hh
    are added before it. For the other form see `LayerNormSumLSTM`.

    Args:
        activation: φ.
        recurrent_activation: σ.
        eps: added to the variance.

    Source: J. L. Ba, J. R. Kiros, G. Hinton, "Layer normalization", arXiv 1607.06450, 2016, equations 20-22.
    """

    gates, states = 4, ("h", "c")
    gain_i = gain_f = gain_g = gain_o = gain_c = per_unit(1.0)
    shift_c = per_unit(0.0)
    norm_x = module(lambda gates, hidden: nn.LayerNorm(gates * hidden))
    eps = option(1e-5)

    def project(self, gx: Tensor, lengths: Tensor | None, training: bool, **modules: Any) -> Tensor:
        norm = modules["norm_x"]
        return F.layer_norm(gx, gx.shape[-1:], norm.weight, norm.bias, self.eps)

    @staticmethod
    def step(
        gx: Tensor,
        gh: Tensor,
        c: Tensor,
        gain_i: Tensor,
        gain_f: Tensor,
        gain_g: Tensor,
        gain_o: Tensor,
        gain_c: Tensor,
        shift_c: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x_i, x_f, x_g, x_o = gx.chunk(4, -1)
        h_i, h_f, h_g, h_o = F.layer_norm(gh, gh.shape[-1:], eps=eps).chunk(4, -1)
        i, f = recurrent_activation(x_i + gain_i * h_i), recurrent_activation(x_f + gain_f * h_f)
        g, o = activation(x_g + gain_g * h_g), recurrent_activation(x_o + gain_o * h_o)
        c = f * c + i * g
        return o * activation(F.layer_norm(c, c.shape[-1:], gain_c, shift_c, eps)), c


class LayerNormSumLSTM(Activated):
    """An LSTM with layer norm of each gate's sum and of the cell state that goes out.

        i, f, g, o = LN(a_i; α_i, β_i), ..., LN(a_o; α_o, β_o)      a = W_ih x + b_ih + W_hh h + b_hh
        c' = σ(f) c + σ(i) φ(g)
        h' = σ(o) φ(LN(c'; α_c, β_c))

    Args:
        activation: φ.
        recurrent_activation: σ.
        eps: added to the variance.

    Source: TensorFlow's contrib.rnn.LayerNormBasicLSTMCell, after Ba et al., arXiv 1607.06450; it adds 1 to f, which
    here is `shift_f`'s to learn, and keeps the normalised c as its state, where this keeps c.
    """

    gates, states = 4, ("h", "c")
    gain_i = gain_f = gain_g = gain_o = gain_c = per_unit(1.0)
    shift_i = shift_f = shift_g = shift_o = shift_c = per_unit(0.0)
    eps = option(1e-5)

    @staticmethod
    def step(
        a: Tensor,
        c: Tensor,
        gain_i: Tensor,
        gain_f: Tensor,
        gain_g: Tensor,
        gain_o: Tensor,
        gain_c: Tensor,
        shift_i: Tensor,
        shift_f: Tensor,
        shift_g: Tensor,
        shift_o: Tensor,
        shift_c: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        i, f, g, o = a.chunk(4, -1)
        i = recurrent_activation(F.layer_norm(i, i.shape[-1:], gain_i, shift_i, eps))
        f = recurrent_activation(F.layer_norm(f, f.shape[-1:], gain_f, shift_f, eps))
        g = activation(F.layer_norm(g, g.shape[-1:], gain_g, shift_g, eps))
        o = recurrent_activation(F.layer_norm(o, o.shape[-1:], gain_o, shift_o, eps))
        c = f * c + i * g
        return o * activation(F.layer_norm(c, c.shape[-1:], gain_c, shift_c, eps)), c


class LayerNormGRU(Activated):
    """A GRU with layer norm of W_x x and of W_h h, the two gates together and the candidate by itself. Blocks r z n.

        r, z = LN(W_h h; α1) + LN(W_x x; α2, β)
        n = φ(LN(W_n x; α3, β3) + σ(r) LN(U_n h; α4, β4))
        h' = (1 - σ(z)) h + σ(z) n

    z lets the new in, as in the paper; in torch's GRU it keeps the old. α1 is `gain_r` and `gain_z`, α4 and β4 are
    `gain_n` and `shift_n`, the input's are norm_rz_l0 and norm_n_l0. The paper has no bias within LN: `bias=False`.
    For the other form see `LayerNormSumGRU`.

    Args:
        activation: φ.
        recurrent_activation: σ.
        eps: added to the variance.

    Source: J. L. Ba, J. R. Kiros, G. Hinton, "Layer normalization", arXiv 1607.06450, 2016, supplement, the GRU of its
    skip-thoughts experiment.
    """

    gates, states = 3, ("h",)
    gain_r = gain_z = gain_n = per_unit(1.0)
    shift_n = per_unit(0.0)
    norm_rz = module(lambda gates, hidden: nn.LayerNorm(2 * hidden))
    norm_n = module(lambda gates, hidden: nn.LayerNorm(hidden))
    eps = option(1e-5)

    def project(self, gx: Tensor, lengths: Tensor | None, training: bool, **modules: Any) -> Tensor:
        norm_rz, norm_n, hidden = modules["norm_rz"], modules["norm_n"], gx.shape[-1] // 3
        rz, n = gx.split([2 * hidden, hidden], -1)
        rz = F.layer_norm(rz, rz.shape[-1:], norm_rz.weight, norm_rz.bias, self.eps)
        return torch.cat([rz, F.layer_norm(n, n.shape[-1:], norm_n.weight, norm_n.bias, self.eps)], -1)

    @staticmethod
    def step(
        gx: Tensor,
        gh: Tensor,
        h: Tensor,
        gain_r: Tensor,
        gain_z: Tensor,
        gain_n: Tensor,
        shift_n: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
        eps: float,
    ) -> Tensor:
        x_r, x_z, x_n = gx.chunk(3, -1)
        h_rz, h_n = gh.split([2 * h.shape[-1], h.shape[-1]], -1)
        h_r, h_z = F.layer_norm(h_rz, h_rz.shape[-1:], eps=eps).chunk(2, -1)
        r, z = recurrent_activation(x_r + gain_r * h_r), recurrent_activation(x_z + gain_z * h_z)
        n = activation(x_n + r * F.layer_norm(h_n, h_n.shape[-1:], gain_n, shift_n, eps))
        return (1 - z) * h + z * n


class LayerNormSumGRU(Activated):
    """A GRU with one layer norm of the sum, over all three blocks r n z, as DreamerV2 has it.

        r, n, z = LN(W_ih x + b_ih + W_hh h + b_hh; α, β)
        n = φ(σ(r) n)
        z = σ(z + update_bias)
        h' = z n + (1 - z) h

    The reset gate acts on the whole candidate, the input's part too. z lets the new in.

    Args:
        activation: φ.
        recurrent_activation: σ.
        update_bias: at -1 little is let in at first.
        eps: added to the variance.

    Source: D. Hafner, T. Lillicrap, M. Norouzi, J. Ba, "Mastering Atari with discrete world models", ICLR 2021, arXiv
    2010.02193; github.com/danijar/dreamerv2, GRUCell with norm.
    """

    gates, states = 3, ("h",)
    gain_r = gain_n = gain_z = per_unit(1.0)
    shift_r = shift_n = shift_z = per_unit(0.0)
    update_bias = option(-1.0)
    eps = option(1e-5)

    @staticmethod
    def step(
        a: Tensor,
        h: Tensor,
        gain_r: Tensor,
        gain_n: Tensor,
        gain_z: Tensor,
        shift_r: Tensor,
        shift_n: Tensor,
        shift_z: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
        update_bias: float,
        eps: float,
    ) -> Tensor:
        r, n, z = F.layer_norm(a, a.shape[-1:], eps=eps).chunk(3, -1)
        n = activation(recurrent_activation(gain_r * r + shift_r) * (gain_n * n + shift_n))
        z = recurrent_activation(gain_z * z + shift_z + update_bias)
        return z * n + (1 - z) * h


class BlockGRU(Activated):
    """DreamerV3's block-diagonal GRU: a hidden layer with RMS norm, then the gates. One block is projected.

        u = silu(RMS(W_ih x + b_ih + W_hh h + b_hh) α)                  its dynhid0 and dynhid0norm
        r, n, z = W_r u + b_r, W_n u + b_n, W_z u + b_z                 its dyngru
        n = φ(σ(r) n)
        z = σ(z + update_bias)
        h' = z n + (1 - z) h

    `Custom(BlockGRU, ..., heads=8)` makes W_hh and `w` (W_r, W_n, W_z) block-diagonal, each head seeing all of x.
    x is what the code joins to the state: embeddings of the sampled latent and of the action. The code joins an
    embedding of all of h too, by a dense product, so that blocks mix; that product is left out here, and blocks mix
    through what the model feeds back in x. z lets the new in.

    Args:
        activation: φ.
        recurrent_activation: σ.
        hidden_activation: silu.
        update_bias: at -1 little is let in at first.
        eps: added to the mean square.

    Source: D. Hafner, J. Pasukonis, J. Ba, T. Lillicrap, "Mastering diverse domains through world models", arXiv
    2301.04104 (version 2), 2023; github.com/danijar/dreamerv3, dreamerv3/rssm.py, RSSM._core at commit e3f0224.
    """

    gates, states = 1, ("h",)
    w = weight(3)
    b_r = b_n = b_z = per_unit(0.0)
    gain = per_unit(1.0)
    hidden_activation = option("silu")
    update_bias = option(-1.0)
    eps = option(1e-4)

    @staticmethod
    def step(
        a: Tensor,
        h: Tensor,
        w: Tensor,
        b_r: Tensor,
        b_n: Tensor,
        b_z: Tensor,
        gain: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
        hidden_activation: Activation,
        update_bias: float,
        eps: float,
    ) -> Tensor:
        u = hidden_activation(F.rms_norm(a, a.shape[-1:], gain, eps))
        r, n, z = F.linear(u, w).chunk(3, -1)
        n = activation(recurrent_activation(r + b_r) * (n + b_n))
        z = recurrent_activation(z + b_z + update_bias)
        return z * n + (1 - z) * h


class LayerNormBlockGRU(BlockGRU):
    """The block GRU with layer norm in the place of RMS norm, the code's `norm: layer`.

        u = silu(LN(W_ih x + b_ih + W_hh h + b_hh; α, β))

    and on as in `BlockGRU`, whose options and source it has.
    """

    shift = per_unit(0.0)

    @staticmethod
    def step(  # type: ignore[override]
        a: Tensor,
        h: Tensor,
        w: Tensor,
        b_r: Tensor,
        b_n: Tensor,
        b_z: Tensor,
        gain: Tensor,
        shift: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
        hidden_activation: Activation,
        update_bias: float,
        eps: float,
    ) -> Tensor:
        u = hidden_activation(F.layer_norm(a, a.shape[-1:], gain, shift, eps))
        r, n, z = F.linear(u, w).chunk(3, -1)
        n = activation(recurrent_activation(r + b_r) * (n + b_n))
        z = recurrent_activation(z + b_z + update_bias)
        return z * n + (1 - z) * h
