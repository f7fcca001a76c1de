"""The gated recurrent unit, blocks r, z, n, in its two forms.

    r = σ(W_ir x + b_ir + W_hr h + b_hr)     z = σ(W_iz x + b_iz + W_hz h + b_hz)     h_t = (1 − z) ⊙ n + z ⊙ h

    reset after:   n = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))       torch.nn.GRU, cuDNN
    reset before:  n = tanh(W_in x + b_in + W_hn (r ⊙ h) + b_hn)       the original

Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014. `gx` is W_ih x + b_ih with
b_hr and b_hz added, and b_hn too where the reset acts before; [B, 3H].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .step import Gradients, State, Step, Weights


def after_step(gx: Tensor, s: State, w: Weights) -> Step:
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz, hn = (s.h @ w.w_hh.T).chunk(3, -1)
    if w.b_hn is not None:
        hn = hn + w.b_hn
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return Step((1 - z) * n + z * s.h, None, torch.cat([r, z, n, hn], -1))


def after_step_vjp(dh: Tensor, dc: Tensor | None, s: State, new: Step, w: Weights) -> Gradients:
    assert new.gates is not None
    r, z, n, hn = new.gates.chunk(4, -1)
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (s.h - n) * z * (1 - z)
    dr = dn * hn * r * (1 - r)
    dgh = torch.cat([dr, dz, dn * r], -1)
    return Gradients(dgx=torch.cat([dr, dz, dn], -1), dgh=dgh, dh=dh * z + dgh @ w.w_hh, dc=None)


def before_step(gx: Tensor, s: State, w: Weights) -> Step:
    xrz, xn = gx.split([gx.shape[-1] // 3 * 2, gx.shape[-1] // 3], -1)
    w_rz, w_n = w.w_hh.split([xrz.shape[-1], xn.shape[-1]])
    r, z = torch.sigmoid(xrz + s.h @ w_rz.T).chunk(2, -1)
    n = torch.tanh(xn + (r * s.h) @ w_n.T)
    return Step((1 - z) * n + z * s.h, None, torch.cat([r, z, n], -1))


def before_step_vjp(dh: Tensor, dc: Tensor | None, s: State, new: Step, w: Weights) -> Gradients:
    assert new.gates is not None
    r, z, n = new.gates.chunk(3, -1)
    w_rz, w_n = w.w_hh.split([2 * r.shape[-1], r.shape[-1]])
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (s.h - n) * z * (1 - z)
    drh = dn @ w_n
    dr = drh * s.h * r * (1 - r)
    drz = torch.cat([dr, dz], -1)
    da = torch.cat([drz, dn], -1)
    return Gradients(dgx=da, dgh=da, dh=dh * z + drh * r + drz @ w_rz, dc=None)
