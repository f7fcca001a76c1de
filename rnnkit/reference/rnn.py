"""The vanilla recurrent cell: h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), act being tanh or relu.

Elman, "Finding structure in time", Cognitive Science 14 (1990). `gx` is W_ih x_t + b_ih + b_hh, [B, H].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .step import Gradients, State, Step, Weights


def tanh_step(gx: Tensor, s: State, w: Weights) -> Step:
    return Step(torch.tanh(gx + s.h @ w.w_hh.T), None, None)


def tanh_step_vjp(dh: Tensor, dc: Tensor | None, s: State, new: Step, w: Weights) -> Gradients:
    da = dh * (1 - new.h * new.h)
    return Gradients(dgx=da, dgh=da, dh=da @ w.w_hh, dc=None)


def relu_step(gx: Tensor, s: State, w: Weights) -> Step:
    return Step(torch.relu(gx + s.h @ w.w_hh.T), None, None)


def relu_step_vjp(dh: Tensor, dc: Tensor | None, s: State, new: Step, w: Weights) -> Gradients:
    da = torch.where(new.h <= 0, 0, dh)  # NaN passes the gradient on, as in torch
    return Gradients(dgx=da, dgh=da, dh=da @ w.w_hh, dc=None)
