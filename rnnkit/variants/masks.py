"""Cells regularised by random masks: zoneout, and dropout within the recurrence in its two forms.

Masks are inputs of each step. What a call does not give is drawn for each layer and direction from torch's generator,
so a seed repeats them, whatever backend runs. σ is `recurrent_activation`, φ is `activation`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..custom.declare import option, per_step, weight
from .base import Activation, Masked, dropout_mask, zoneout_mask


class ZoneoutLSTM(Masked):
    """An LSTM in which some units keep their old h, and some their old c, drawn anew at each step.

        i, f, o = σ(a_i), σ(a_f), σ(a_o)
        c~ = f c + i φ(a_g)
        h' = k_h h + (1 - k_h) o φ(c~)          k_h in {0, 1}, 1 with probability zoneout_h; in eval k_h = zoneout_h
        c' = k_c c + (1 - k_c) c~               k_c likewise

    `layer(x, keep_h=..., keep_c=...)` gives masks [T, B, H] of one's own.

    Args:
        zoneout_h, zoneout_c: probability that a unit keeps its h, its c.
        activation: φ.
        recurrent_activation: σ.

    Source: D. Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR 2017, arXiv
    1606.01305; the defaults are its character-level ones.
    """

    gates, states = 4, ("h", "c")
    keep_h = keep_c = per_step("unit", grad=False)
    zoneout_h, zoneout_c = option(0.05), option(0.5)
    probabilities = ("zoneout_h", "zoneout_c")

    def draw(self, training: bool, steps: int, rows: int, hidden: int, like: Tensor) -> dict[str, Tensor]:
        shape = (steps, rows, hidden)
        return {
            "keep_h": zoneout_mask(like, *shape, p=self.zoneout_h, training=training),
            "keep_c": zoneout_mask(like, *shape, p=self.zoneout_c, training=training),
        }

    @staticmethod
    def step(
        a: Tensor,
        h: Tensor,
        c: Tensor,
        keep_h: Tensor,
        keep_c: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
    ) -> tuple[Tensor, Tensor]:
        i, f, g, o = a.chunk(4, -1)
        i, f, o = recurrent_activation(i), recurrent_activation(f), recurrent_activation(o)
        new = f * c + i * activation(g)
        return keep_h * h + (1 - keep_h) * (o * activation(new)), keep_c * c + (1 - keep_c) * new


class ZoneoutGRU(Masked):
    """A GRU, reset after the product, in which some units keep their old h, drawn anew at each step.

        n = φ(x_n + r h_n)                      r, z as in the GRU
        h' = k h + (1 - k) ((1 - z) n + z h)    k in {0, 1}, 1 with probability zoneout_h; in eval k = zoneout_h

    `layer(x, keep_h=...)` gives masks [T, B, H] of one's own.

    Args:
        zoneout_h: probability that a unit keeps its h.
        activation: φ.
        recurrent_activation: σ.

    Source: D. Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR 2017, arXiv
    1606.01305.
    """

    gates, states = 3, ("h",)
    keep_h = per_step("unit", grad=False)
    zoneout_h = option(0.05)
    probabilities = ("zoneout_h",)

    def draw(self, training: bool, steps: int, rows: int, hidden: int, like: Tensor) -> dict[str, Tensor]:
        return {"keep_h": zoneout_mask(like, steps, rows, hidden, p=self.zoneout_h, training=training)}

    @staticmethod
    def step(
        gx: Tensor, gh: Tensor, h: Tensor, keep_h: Tensor, activation: Activation, recurrent_activation: Activation
    ) -> Tensor:
        x_r, x_z, x_n = gx.chunk(3, -1)
        h_r, h_z, h_n = gh.chunk(3, -1)
        r, z = recurrent_activation(x_r + h_r), recurrent_activation(x_z + h_z)
        n = activation(x_n + r * h_n)
        return keep_h * h + (1 - keep_h) * ((1 - z) * n + z * h)


class _Variational(Masked):
    """Gal's masks: for each row one for the inputs and one for the state, the same at every step."""

    dropout_x, dropout_h = option(0.25), option(0.25)
    probabilities = ("dropout_x", "dropout_h")

    def enter(self, x: Tensor, training: bool) -> Tensor:
        if not training or not self.dropout_x:
            return x
        return x * dropout_mask(x, 1, *x.shape[1:], p=self.dropout_x, training=training)

    def draw(self, training: bool, steps: int, rows: int, hidden: int, like: Tensor) -> dict[str, Tensor]:
        return {"drop_h": dropout_mask(like, 1, rows, hidden, p=self.dropout_h, training=training)}


class RecurrentDropoutLSTM(_Variational):
    """An LSTM with variational dropout: one mask a sequence on the inputs, one on the state that enters the product.

        a = W_ih (x d_x) + b_ih + W_h (h d_h)   d in {0, 1 / (1 - p)}, the same at every step and for every gate
        c' = σ(a_f) c + σ(a_i) φ(a_g)
        h' = σ(a_o) φ(c')

    In eval nothing is dropped. `layer(x, drop_h=...)` gives a mask [1, B, H] or [T, B, H] of one's own. For dropout of
    the candidate see `CandidateDropoutLSTM`.

    Args:
        dropout_x, dropout_h: probability that an input, a unit of the state, is dropped.
        activation: φ.
        recurrent_activation: σ.

    Source: Y. Gal, Z. Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NIPS
    2016, arXiv 1512.05287, equation 7 (tied weights).
    """

    gates, states = 4, ("h", "c")
    w_h = weight(4)
    drop_h = per_step("unit", grad=False)

    @staticmethod
    def step(
        gx: Tensor,
        h: Tensor,
        c: Tensor,
        w_h: Tensor,
        drop_h: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
    ) -> tuple[Tensor, Tensor]:
        i, f, g, o = (gx + F.linear(h * drop_h, w_h)).chunk(4, -1)
        i, f, o = recurrent_activation(i), recurrent_activation(f), recurrent_activation(o)
        c = f * c + i * activation(g)
        return o * activation(c), c


class RecurrentDropoutGRU(_Variational):
    """A GRU with variational dropout: one mask a sequence on the inputs, one on the state that enters the product.

        r, z = σ(x_r + W_r (h d_h)), σ(x_z + W_z (h d_h))       x_· = W_ih (x d_x) + b_ih
        n = φ(x_n + r W_n (h d_h))
        h' = (1 - z) n + z h

    d in {0, 1 / (1 - p)}, the same at every step and for every gate. In eval nothing is dropped. `w_h` holds W_r, W_z
    and W_n. `layer(x, drop_h=...)` gives a mask [1, B, H] or [T, B, H] of one's own.

    Args:
        dropout_x, dropout_h: probability that an input, a unit of the state, is dropped.
        activation: φ.
        recurrent_activation: σ.

    Source: Y. Gal, Z. Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NIPS
    2016, arXiv 1512.05287.
    """

    gates, states = 3, ("h",)
    w_h = weight(3)
    drop_h = per_step("unit", grad=False)

    @staticmethod
    def step(
        gx: Tensor,
        h: Tensor,
        w_h: Tensor,
        drop_h: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
    ) -> Tensor:
        x_r, x_z, x_n = gx.chunk(3, -1)
        h_r, h_z, h_n = F.linear(h * drop_h, w_h).chunk(3, -1)
        r, z = recurrent_activation(x_r + h_r), recurrent_activation(x_z + h_z)
        n = activation(x_n + r * h_n)
        return (1 - z) * n + z * h


class _CandidateDropout(Masked):
    """Semeniuta's mask: for the candidate, drawn anew at each step or once a sequence."""

    dropout_n = option(0.25)
    per_sequence = option(False)
    probabilities = ("dropout_n",)

    def draw(self, training: bool, steps: int, rows: int, hidden: int, like: Tensor) -> dict[str, Tensor]:
        steps = 1 if self.per_sequence or not training else steps
        return {"drop_n": dropout_mask(like, steps, rows, hidden, p=self.dropout_n, training=training)}


class CandidateDropoutLSTM(_CandidateDropout):
    """An LSTM with dropout of the candidate alone: what is remembered is never dropped.

        c' = σ(a_f) c + σ(a_i) d φ(a_g)         d in {0, 1 / (1 - p)}; in eval 1
        h' = σ(a_o) φ(c')

    `layer(x, drop_n=...)` gives a mask [T, B, H] or [1, B, H] of one's own.

    Args:
        dropout_n: probability that a unit of the candidate is dropped.
        per_sequence: one mask a sequence, instead of one a step.
        activation: φ.
        recurrent_activation: σ.

    Source: S. Semeniuta, A. Severyn, E. Barth, "Recurrent dropout without memory loss", COLING 2016, arXiv 1603.05118.
    """

    gates, states = 4, ("h", "c")
    drop_n = per_step("unit", grad=False)

    @staticmethod
    def step(
        a: Tensor, c: Tensor, drop_n: Tensor, activation: Activation, recurrent_activation: Activation
    ) -> tuple[Tensor, Tensor]:
        i, f, g, o = a.chunk(4, -1)
        i, f, o = recurrent_activation(i), recurrent_activation(f), recurrent_activation(o)
        c = f * c + i * (drop_n * activation(g))
        return o * activation(c), c


class CandidateDropoutGRU(_CandidateDropout):
    """A GRU, reset after the product, with dropout of the candidate alone.

        n = d φ(x_n + r h_n)                    d in {0, 1 / (1 - p)}; in eval 1; r, z as in the GRU
        h' = (1 - z) n + z h

    `layer(x, drop_n=...)` gives a mask [T, B, H] or [1, B, H] of one's own.

    Args:
        dropout_n: probability that a unit of the candidate is dropped.
        per_sequence: one mask a sequence, instead of one a step.
        activation: φ.
        recurrent_activation: σ.

    Source: S. Semeniuta, A. Severyn, E. Barth, "Recurrent dropout without memory loss", COLING 2016, arXiv 1603.05118;
    z as in torch, which the paper calls 1 - z.
    """

    gates, states = 3, ("h",)
    drop_n = per_step("unit", grad=False)

    @staticmethod
    def step(
        gx: Tensor, gh: Tensor, h: Tensor, drop_n: Tensor, activation: Activation, recurrent_activation: Activation
    ) -> Tensor:
        x_r, x_z, x_n = gx.chunk(3, -1)
        h_r, h_z, h_n = gh.chunk(3, -1)
        r, z = recurrent_activation(x_r + h_r), recurrent_activation(x_z + h_z)
        n = drop_n * activation(x_n + r * h_n)
        return (1 - z) * n + z * h
