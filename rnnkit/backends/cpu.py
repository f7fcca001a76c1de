"""Backend `cpu`: the C++ scans of csrc/cpu, so far for the vanilla RNN in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Cell
from ..reference.scan import ScanGradients
from . import extension
from .problem import Options, Outputs, Problem, Tensors
from .products import KernelBackend


class CPU(KernelBackend):
    name = "cpu"

    def available(self) -> str | None:
        return None if extension.available() else extension.reason()

    def unsupported(self, problem: Problem) -> list[str]:
        reasons = []
        missing = self.available()
        if missing is not None:
            reasons.append(missing)
        if problem.device != "cpu":
            reasons.append(f"runs on the device cpu, got {problem.device}")
        if not problem.cell.startswith("rnn_"):
            reasons.append(f"has kernels for rnn_tanh and rnn_relu so far, got {problem.cell}")
        if problem.dtype != torch.float32:
            reasons.append(f"computes in float32 so far, got {problem.dtype}")
        return reasons

    def scan_forward(
        self, cell: Cell, gx: Tensor, h: Tensor, c: Tensor | None, t: Tensors, *, t0: int, reverse: bool, save: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        y, h_n = torch.ops.rnnkit.rnn_scan_forward(
            gx, t.w_hh, h, t.lengths, t.reset, t.h_r, t0, cell.name == "rnn_relu", reverse
        )
        return y, h_n, None, None, None

    def scan_backward(
        self, cell: Cell, grads: Outputs, y: Tensor, c_all: Tensor | None, gates: Tensor | None, t: Tensors, o: Options
    ) -> ScanGradients:
        gy = torch.zeros_like(y) if grads.y is None else grads.y
        gh_n = torch.zeros_like(t.h_0) if grads.h_n is None else grads.h_n
        dg, dh_0, dh_r = torch.ops.rnnkit.rnn_scan_backward(
            gy, gh_n, y, t.w_hh, t.lengths, t.reset, cell.name == "rnn_relu", o.reverse
        )
        return ScanGradients(dg, dg, dh_0, None, dh_r, None, None)
