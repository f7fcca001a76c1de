"""The variants once more, from their papers, in another form: one row, one step, one unit's head at a time, with the
statistics and the gates written out. Nothing here is shared with rnnkit.variants, and there are no masks or batches.

A step is given x [I], the states [H], the parameters p by their names without suffix, the inputs of the step e, and the
functions of the candidate (φ) and of the gates (σ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnkit import variants

Values = dict[str, Tensor]
Function = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Sequence[Tensor], Values, Values, Function, Function], Sequence[Tensor]]


def logistic(v: Tensor) -> Tensor:
    """σ by tanh: another way to the same numbers."""
    return 0.5 + 0.5 * torch.tanh(v / 2)


def block(p: Values, name: str, k: int, hidden: int) -> Tensor:
    return p[name][k * hidden : (k + 1) * hidden]


def from_x(p: Values, k: int, x: Tensor, hidden: int) -> Tensor:
    """Block k of W_ih x + b_ih."""
    out = (block(p, "weight_ih", k, hidden) * x).sum(1)
    return out + block(p, "bias_ih", k, hidden) if "bias_ih" in p else out


def times(p: Values, name: str, k: int, v: Tensor) -> Tensor:
    """Block k of a weight, [H, H/n] with n heads, times v [H]: each head sees its own units."""
    w = block(p, name, k, len(v))
    each = w.shape[1]
    return torch.cat([w[j : j + each] @ v[j : j + each] for j in range(0, len(v), each)])


def from_h(p: Values, k: int, h: Tensor) -> Tensor:
    """Block k of W_hh h + b_hh."""
    out = times(p, "weight_hh", k, h)
    return out + block(p, "bias_hh", k, len(h)) if "bias_hh" in p else out


def sums(p: Values, gates: int, x: Tensor, h: Tensor) -> list[Tensor]:
    return [from_x(p, k, x, len(h)) + from_h(p, k, h) for k in range(gates)]


def standard(v: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm without gain and shift."""
    n = len(v)
    mean = sum(v.unbind()) / n
    return (v - mean) / (sum(u * u for u in (v - mean).unbind()) / n + eps) ** 0.5


def rnn(x, s, p, e, phi, sigma):
    return [phi(sums(p, 1, x, s[0])[0])]


def indrnn(x, s, p, e, phi, sigma):
    return [torch.stack([phi(g + u * h) for g, u, h in zip(from_x(p, 0, x, len(s[0])), p["u"], s[0])])]


def lstm(x, s, p, e, phi, sigma):
    h, c = s
    i, f, g, o = sums(p, 4, x, h)
    c = c * sigma(f) + sigma(i) * phi(g)
    return [phi(c) * sigma(o), c]


def peephole(x, s, p, e, phi, sigma):
    h, c = s
    see = {k: torch.diag(p[k]) for k in ("p_i", "p_f", "p_o")}  # the paper's diagonal matrices W_ci, W_cf, W_co
    i, f, g, o = sums(p, 4, x, h)
    new = sigma(f + see["p_f"] @ c) * c + sigma(i + see["p_i"] @ c) * phi(g)
    return [sigma(o + see["p_o"] @ new) * phi(new), new]


def coupled(x, s, p, e, phi, sigma):
    h, c = s
    i, g, o = sums(p, 3, x, h)
    c = torch.lerp(c, phi(g), sigma(i))
    return [sigma(o) * phi(c), c]


def slstm(x, s, p, e, phi, sigma):
    """As xLSTM's vanilla cell computes it, whose every state is one tensor and whose gates are held below 1."""
    h, c, n, m = s
    raw_i, raw_f, raw_z, raw_o = sums(p, 4, x, h)
    held = m - F.softplus(-raw_f)
    top = raw_i if bool((n == 0).all()) else torch.max(raw_i, held)
    one = torch.ones_like(h)
    i, f = torch.minimum((raw_i - top).exp(), one), torch.minimum((held - top).exp(), one)
    c, n = f * c + i * phi(raw_z), f * n + i
    return [sigma(raw_o) * c / n, c, n, top]


def gru(x, s, p, e, phi, sigma):
    (h,) = s
    (x_r, x_z, x_n), (h_r, h_z, h_n) = ([f(p, k, *v) for k in range(3)] for f, v in both(x, h))
    new = phi(x_n + sigma(x_r + h_r) * h_n)
    return [new + sigma(x_z + h_z) * (h - new)]


def both(x: Tensor, h: Tensor) -> list[tuple[Any, tuple[Any, ...]]]:
    return [(from_x, (x, len(h))), (from_h, (h,))]


def gru_before(x, s, p, e, phi, sigma):
    (h,) = s
    n = len(h)
    r = sigma(from_x(p, 0, x, n) + times(p, "w_rz", 0, h))
    z = sigma(from_x(p, 1, x, n) + times(p, "w_rz", 1, h))
    new = phi(from_x(p, 2, x, n) + times(p, "w_n", 0, r * h))
    return [new + z * (h - new)]


def mgu(x, s, p, e, phi, sigma):
    (h,) = s
    f = sigma(from_x(p, 0, x, len(h)) + times(p, "w_f", 0, h))
    return [h + f * (phi(from_x(p, 1, x, len(h)) + times(p, "w_n", 0, f * h)) - h)]


def augru(x, s, p, e, phi, sigma):
    (h,) = s
    (x_r, x_u, x_n), (h_r, h_u, h_n) = ([f(p, k, *v) for k in range(3)] for f, v in both(x, h))
    u = sigma(x_u + h_u) * e["attention"]
    return [h - u * h + u * phi(x_n + sigma(x_r + h_r) * h_n)]


def ligru(gx, s, p, e, phi, sigma):
    (h,) = s
    x_z, x_n = gx.chunk(2)
    z = sigma(x_z + from_h(p, 0, h))
    new = phi(x_n + from_h(p, 1, h))
    return [new + z * (h - new)]


def batch_normed(x: Tensor, p: Values, lengths: Sequence[int]) -> Tensor:
    """LiGRU's input [T, B, 2H] by torch's batch norm over the steps that there are; padding is left at 0."""
    hidden = p["weight_ih"].shape[0]
    rows = [(t, b) for b, n in enumerate(lengths) for t in range(n)]
    made = torch.stack([torch.cat([from_x(p, 0, x[t, b], hidden)]) for t, b in rows])
    made = F.batch_norm(made, None, None, p["norm.weight"], p["norm.bias"], training=True)
    at = {place: k for k, place in enumerate(rows)}
    zero = x.new_zeros(hidden)
    return torch.stack([torch.stack([made[at[t, b]] if (t, b) in at else zero for b in range(x.shape[1])])
                        for t in range(x.shape[0])])  # fmt: skip


def zoneout_lstm(x, s, p, e, phi, sigma):
    new_h, new_c = lstm(x, s, p, e, phi, sigma)
    return [torch.where(e["keep_h"] == 1, s[0], new_h), torch.where(e["keep_c"] == 1, s[1], new_c)]


def zoneout_gru(x, s, p, e, phi, sigma):
    return [torch.where(e["keep_h"] == 1, s[0], gru(x, s, p, e, phi, sigma)[0])]


def gal_lstm(x, s, p, e, phi, sigma):
    h, c = s
    seen = h * e["drop_h"]
    i, f, g, o = (from_x(p, k, x, len(h)) + times(p, "w_h", k, seen) for k in range(4))
    c = sigma(f) * c + phi(g) * sigma(i)
    return [phi(c) * sigma(o), c]


def gal_gru(x, s, p, e, phi, sigma):
    (h,) = s
    seen = h * e["drop_h"]
    r, z = (sigma(from_x(p, k, x, len(h)) + times(p, "w_h", k, seen)) for k in range(2))
    new = phi(from_x(p, 2, x, len(h)) + r * times(p, "w_h", 2, seen))
    return [new + z * (h - new)]


def candidate_lstm(x, s, p, e, phi, sigma):
    h, c = s
    i, f, g, o = sums(p, 4, x, h)
    c = sigma(f) * c + e["drop_n"] * sigma(i) * phi(g)
    return [phi(c) * sigma(o), c]


def candidate_gru(x, s, p, e, phi, sigma):
    (h,) = s
    (x_r, x_z, x_n), (h_r, h_z, h_n) = ([f(p, k, *v) for k in range(3)] for f, v in both(x, h))
    z = sigma(x_z + h_z)
    return [z * h + (1 - z) * e["drop_n"] * phi(x_n + sigma(x_r + h_r) * h_n)]


def layer_norm_lstm(x, s, p, e, phi, sigma):
    """Equations 20-22 with vectors of 4H: f i o g in one."""
    h, c = s
    n = len(h)
    alpha = torch.cat([p[f"gain_{k}"] for k in "ifgo"])
    of_h = alpha * standard(torch.cat([from_h(p, k, h) for k in range(4)]))
    of_x = p["norm_x.weight"] * standard(torch.cat([from_x(p, k, x, n) for k in range(4)])) + p["norm_x.bias"]
    i, f, g, o = (of_h + of_x).chunk(4)
    c = sigma(f) * c + sigma(i) * phi(g)
    return [sigma(o) * phi(p["gain_c"] * standard(c) + p["shift_c"]), c]


def layer_norm_sum_lstm(x, s, p, e, phi, sigma):
    h, c = s
    i, f, g, o = (p[f"gain_{k}"] * standard(v) + p[f"shift_{k}"] for k, v in zip("ifgo", sums(p, 4, x, h)))
    c = sigma(f) * c + sigma(i) * phi(g)
    return [sigma(o) * phi(p["gain_c"] * standard(c) + p["shift_c"]), c]


def layer_norm_gru(x, s, p, e, phi, sigma):
    (h,) = s
    n = len(h)
    (x_r, x_z, x_n), (h_r, h_z, h_n) = ([f(p, k, *v) for k in range(3)] for f, v in both(x, h))
    of_x = p["norm_rz.weight"] * standard(torch.cat([x_r, x_z])) + p["norm_rz.bias"]
    of_h = torch.cat([p["gain_r"], p["gain_z"]]) * standard(torch.cat([h_r, h_z]))
    r, z = sigma(of_x + of_h).split(n)
    mine = p["norm_n.weight"] * standard(x_n) + p["norm_n.bias"]
    return [torch.lerp(h, phi(mine + r * (p["gain_n"] * standard(h_n) + p["shift_n"])), z)]


def layer_norm_sum_gru(x, s, p, e, phi, sigma):
    (h,) = s
    gain, shift = (torch.cat([p[f"{name}_{k}"] for k in "rnz"]) for name in ("gain", "shift"))
    reset, new, update = (gain * standard(torch.cat(sums(p, 3, x, h))) + shift).chunk(3)
    return [torch.lerp(h, phi(sigma(reset) * new), sigma(update - 1))]


def block_gru(x, s, p, e, phi, sigma):
    a = sums(p, 1, x, s[0])[0]
    return _gates(p, s[0], a / (a.square().mean() + 1e-4).sqrt() * p["gain"], phi, sigma)


def layer_norm_block_gru(x, s, p, e, phi, sigma):
    return _gates(p, s[0], standard(sums(p, 1, x, s[0])[0], 1e-4) * p["gain"] + p["shift"], phi, sigma)


def _gates(p: Values, h: Tensor, u: Tensor, phi: Function, sigma: Function) -> list[Tensor]:
    u = u * logistic(u)
    reset, new, update = (times(p, "w", k, u) + p[f"b_{gate}"] for k, gate in enumerate("rnz"))
    return [torch.lerp(h, phi(sigma(reset) * new), sigma(update - 1))]


def grud(x, s, p, e, phi, sigma):
    (h,) = s
    return [_grud(x, h * e["decay"], p, phi, sigma)]


def _grud(x: Tensor, h: Tensor, p: Values, phi: Function, sigma: Function) -> Tensor:
    n = len(h)
    r = sigma(from_x(p, 0, x, n) + times(p, "w_rz", 0, h))
    z = sigma(from_x(p, 1, x, n) + times(p, "w_rz", 1, h))
    return torch.lerp(h, phi(from_x(p, 2, x, n) + times(p, "w_n", 0, r * h)), z)


@dataclass(frozen=True)
class Oracle:
    """A cell of rnnkit.variants and what it is held against. given: inputs of each step, how they are made."""

    cell: Any
    step: Step
    given: dict[str, str] = field(default_factory=dict)
    before: Callable[[Tensor, Values, Sequence[int]], Tensor] | None = None
    phi: Function = torch.tanh


ORACLES: dict[str, Oracle] = {
    "LSTM": Oracle(variants.LSTM, lstm),
    "GRU": Oracle(variants.GRU, gru),
    "GRUResetBefore": Oracle(variants.GRUResetBefore, gru_before),
    "RNN": Oracle(variants.RNN, rnn),
    "IndRNN": Oracle(variants.IndRNN, indrnn, phi=torch.relu),
    "PeepholeLSTM": Oracle(variants.PeepholeLSTM, peephole),
    "CoupledLSTM": Oracle(variants.CoupledLSTM, coupled),
    "SLSTM": Oracle(variants.SLSTM, slstm),
    "MGU": Oracle(variants.MGU, mgu),
    "AUGRU": Oracle(variants.AUGRU, augru, {"attention": "row"}),
    "LiGRU": Oracle(variants.LiGRU, ligru, before=batch_normed, phi=torch.relu),
    "ZoneoutLSTM": Oracle(variants.ZoneoutLSTM, zoneout_lstm, {"keep_h": "keep", "keep_c": "keep"}),
    "ZoneoutGRU": Oracle(variants.ZoneoutGRU, zoneout_gru, {"keep_h": "keep"}),
    "RecurrentDropoutLSTM": Oracle(variants.RecurrentDropoutLSTM(dropout_x=0.0), gal_lstm, {"drop_h": "once"}),
    "RecurrentDropoutGRU": Oracle(variants.RecurrentDropoutGRU(dropout_x=0.0), gal_gru, {"drop_h": "once"}),
    "CandidateDropoutLSTM": Oracle(variants.CandidateDropoutLSTM, candidate_lstm, {"drop_n": "drop"}),
    "CandidateDropoutGRU": Oracle(variants.CandidateDropoutGRU, candidate_gru, {"drop_n": "drop"}),
    "LayerNormLSTM": Oracle(variants.LayerNormLSTM, layer_norm_lstm),
    "LayerNormSumLSTM": Oracle(variants.LayerNormSumLSTM, layer_norm_sum_lstm),
    "LayerNormGRU": Oracle(variants.LayerNormGRU, layer_norm_gru),
    "LayerNormSumGRU": Oracle(variants.LayerNormSumGRU, layer_norm_sum_gru),
    "BlockGRU": Oracle(variants.BlockGRU, block_gru),
    "LayerNormBlockGRU": Oracle(variants.LayerNormBlockGRU, layer_norm_block_gru),
    "GRUD": Oracle(variants.GRUD, grud, {"decay": "unit"}),
}
