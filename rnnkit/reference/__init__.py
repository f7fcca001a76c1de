"""The specification, executable: every cell's mathematics in torch operators, any dtype and device.

One file per cell, a step and its vector-Jacobian product side by side; `scan` runs them over time with lengths
and resets. Everything is differentiable by torch's own autograd, so vmap, torch.func and forward mode run it.
"""

from . import gru, lstm, rnn, scan
from .step import Gradients, State, Step, Weights

STEPS = {
    "rnn_tanh": (rnn.tanh_step, rnn.tanh_step_vjp),
    "rnn_relu": (rnn.relu_step, rnn.relu_step_vjp),
    "lstm": (lstm.step, lstm.step_vjp),
    "gru": (gru.after_step, gru.after_step_vjp),
    "gru_reset_before": (gru.before_step, gru.before_step_vjp),
}

__all__ = ["STEPS", "Gradients", "State", "Step", "Weights", "gru", "lstm", "rnn", "scan"]
