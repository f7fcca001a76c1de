"""The LSTM cell with forget gate, blocks i, f, g, o, and its projection.

    i = σ(a_i)   f = σ(a_f)   g = tanh(a_g)   o = σ(a_o)          a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    c_t = f ⊙ c_{t-1} + i ⊙ g
    h_t = o ⊙ tanh(c_t)         with a projection: h_t = W_hr (o ⊙ tanh(c_t))

Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997); forget gate: Gers, Schmidhuber
and Cummins (2000); projection: Sak, Senior and Beaufays (2014). `gx` is W_ih x_t + b_ih + b_hh, [B, 4H].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .step import Gradients, State, Step, Weights


def step(gx: Tensor, s: State, w: Weights) -> Step:
    assert s.c is not None  # the table of cells: an LSTM has a cell state
    i, f, g, o = (gx + s.h @ w.w_hh.T).chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * s.c + i * g
    h = o * torch.tanh(c)
    return Step(h if w.w_hr is None else h @ w.w_hr.T, c, torch.cat([i, f, g, o], -1))


def step_vjp(dh: Tensor, dc: Tensor | None, s: State, new: Step, w: Weights) -> Gradients:
    assert s.c is not None and new.c is not None and new.gates is not None and dc is not None
    i, f, g, o = new.gates.chunk(4, -1)
    if w.w_hr is not None:
        dh = dh @ w.w_hr
    tc = torch.tanh(new.c)
    dc = dc + dh * o * (1 - tc * tc)
    da = torch.cat(
        [
            dc * g * i * (1 - i),
            dc * s.c * f * (1 - f),
            dc * i * (1 - g * g),
            dh * tc * o * (1 - o),
        ],
        -1,
    )
    return Gradients(dgx=da, dgh=da, dh=da @ w.w_hh, dc=dc * f)


def before_projection(gates: Tensor, c: Tensor) -> Tensor:
    """o ⊙ tanh(c), what W_hr multiplies; `gates` [..., 4H], `c` [..., H]."""
    return gates.chunk(4, -1)[3] * torch.tanh(c)
