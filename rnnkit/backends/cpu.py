"""Backend `cpu`: the C++ engine of csrc/, every cell and dtype, on one processor.

Unlike the other kernel backends it brings whole layers, projection and weight gradients included: a layer of a small
model takes a few microseconds, as many as one operator called from Python. The operators check what they are given
and raise RuntimeError for it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..cells import CELLS
from . import extension
from .problem import Options, Outputs, Problem, Result, Tensors
from .products import Backend, Gradient

NUMBERS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3, "gru_reset_before": 4}
"""The cells as csrc/cpu/scan.h numbers them."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS, RESET = Tensors._fields.index("lengths"), Tensors._fields.index("reset")


@functools.cache
def asked(needs: tuple[bool, ...]) -> int:
    """Which gradients the operator shall give: a bit for each of `Tensors`, without lengths and reset."""
    wanted = [need for k, need in enumerate(needs) if k not in (LENGTHS, RESET)]
    return sum(1 << k for k, need in enumerate(wanted) if need)


class CPU(Backend):
    name = "cpu"
    takes_none_states = True

    def __init__(self) -> None:
        if extension.available():
            ops = torch.ops.rnnkit
            self._forward, self._backward = ops.cpu_layer_forward.default, ops.cpu_layer_backward.default
            self._step, self._lstm_step = ops.cpu_step.default, ops.cpu_lstm_step.default

    def available(self) -> str | None:
        return None if extension.available() else extension.reason()

    def unsupported(self, problem: Problem) -> list[str]:
        reasons = []
        missing = self.available()
        if missing is not None:
            reasons.append(missing)
        if problem.device != "cpu":
            reasons.append(f"runs on the device cpu, got {problem.device}")
        if problem.dtype not in DTYPES:
            reasons.append(f"computes in float32, float64, bfloat16 and float16, got {problem.dtype}")
        return reasons

    def forward(self, cell: str, t: Tensors, o: Options, *, train: bool, graph: bool = False) -> Result:
        save = train and not o.recompute
        y, h_n, *more = self._forward(NUMBERS[cell], *t, o.reverse, o.all_states, save, 0)
        if cell != "lstm":
            return Result(Outputs(y, h_n, None, None), tuple(more))
        c_all = more.pop(1) if o.all_states else None
        return Result(Outputs(y, h_n, more[0], c_all), tuple(more[1:]))

    def step(
        self,
        cell: str,
        x: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """One step without gradients: x [B, I] -> h and, for an LSTM, c [B, H]. h and c may be None for zeros."""
        if cell == "lstm":
            return self._lstm_step(x, h, c, w_ih, w_hh, b_ih, b_hh)
        return self._step(NUMBERS[cell], x, h, w_ih, w_hh, b_ih, b_hh), None

    def backward(
        self, cell: str, t: Tensors, o: Options, y: Tensor, result: Result | None, grads: Outputs, needs: list[bool]
    ) -> list[Gradient]:
        kind = CELLS[cell]
        saved = () if result is None else result.saved
        if kind.saved and not saved:
            saved = self.forward(cell, t, o._replace(recompute=False, all_states=False), train=True).saved
        gates = saved[0] if kind.saved else None
        c = saved[1] if kind.has_c else None
        found = iter(self._backward(NUMBERS[cell], *t, o.reverse, y, gates, c, *grads, asked(tuple(needs))))
        return [next(found) if need else None for need in needs]
