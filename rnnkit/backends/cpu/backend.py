"""Backend `cpu`: the C++ engine of csrc/, every cell and dtype, on one processor.

Unlike the other kernel backends it brings whole layers, projection and weight gradients included: a layer of a small
model takes a few microseconds, as many as one operator called from Python. The operators check what they are given
and raise RuntimeError for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...cells import CELLS
from ..base import Backend, Gradient, no_kernel
from ..spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec, Result, StackOptions
from . import extension

CELL_IDS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3, "gru_reset_before": 4}
"""The cells as csrc/cpu/scan.h numbers them."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_modes = torch._C._len_torch_dispatch_stack
_watching = torch._C._len_torch_function_stack
_transforming = torch._C._are_functorch_transforms_active
LENGTHS, RESET = LayerInputs._fields.index("lengths"), LayerInputs._fields.index("reset")


@functools.cache
def grad_mask(needs: tuple[bool, ...]) -> int:
    """Which gradients the operator shall give: a bit for each of `LayerInputs`, without lengths and reset."""
    wanted = [need for k, need in enumerate(needs) if k not in (LENGTHS, RESET)]
    return sum(1 << k for k, need in enumerate(wanted) if need)


class CPU(Backend):
    name = "cpu"
    takes_none_states = True

    def __init__(self) -> None:
        if extension.available():
            ops, found = torch.ops.rnnkit, extension.native
            self._operators = ops.cpu_layer_forward.default, ops.cpu_layer_backward.default
            self._direct = self._operators
            if found is not None:
                self.stacks = True
                self._direct = found.layer_forward, found.layer_backward
                self._stack = found.stack_forward, found.stack_backward

    def _functions(self) -> tuple[Callable[..., Any], ...]:
        """A layer's forward and backward; as operators, where a mode of torch wants to see them."""
        return self._operators if _modes() or _transforming() or _watching() else self._direct

    def available(self) -> str | None:
        return extension.reason() or extension.refusal or None

    def unsupported(self, spec: LayerSpec) -> list[str]:
        reasons = []
        if not extension.available():  # an engine that refuses its variant is chosen, and raises: `auto` hides no error
            reasons.append(extension.reason())
        if spec.device != "cpu":
            reasons.append(f"runs on the device cpu, got {spec.device}")
        if spec.cell not in CELL_IDS:
            reasons.append(no_kernel(spec.cell))
        if spec.dtype not in DTYPES:
            reasons.append(f"computes in float32, float64, bfloat16 and float16, got {spec.dtype}")
        return reasons

    def forward(self, cell: str, t: LayerInputs, o: LayerOptions, *, train: bool, graph: bool = False) -> Result:
        keeps_c = train and o.recompute  # an LSTM's: the backward makes the gates again, range by range
        y, h_n, *more = self._functions()[0](
            CELL_IDS[cell], *t, o.reverse, o.all_states or keeps_c, train and not o.recompute, 0
        )
        if cell != "lstm":
            return Result(LayerOutputs(y, h_n, None, None), tuple(more))
        c_n, *more = more
        c_all = more.pop(0) if o.all_states or keeps_c else None
        saved = (c_all,) if keeps_c else tuple(more)
        return Result(LayerOutputs(y, h_n, c_n, c_all if o.all_states else None), saved)

    def stack_forward(self, o: StackOptions, needs: bytes, tensors: Any, masks: Any) -> list[Tensor]:
        return self._stack[0](CELL_IDS[o.cell], *o[1:], needs, tensors, masks)

    def saved_bytes(self, spec: LayerSpec) -> int:
        kind, narrow = CELLS[spec.cell], spec.dtype.itemsize
        blocks = kind.has_c * narrow if spec.recompute else (kind.saved + kind.has_c) * max(4, narrow)
        return spec.steps * spec.batch * spec.hidden_size * (narrow + blocks)

    def stack_backward(self, o: StackOptions, needs: bytes, saved: Any, grads: Any) -> list[Gradient]:
        return self._stack[1](CELL_IDS[o.cell], *o[1:], needs, saved, grads)

    def backward(
        self,
        cell: str,
        t: LayerInputs,
        o: LayerOptions,
        y: Tensor,
        result: Result | None,
        grads: LayerOutputs,
        needs: list[bool],
    ) -> list[Gradient]:
        kind = CELLS[cell]
        saved = self.kept(cell, t, o, result)
        gates = saved[0] if kind.saved and not o.recompute else None
        c = saved[-1] if kind.has_c else None
        found = iter(self._functions()[1](CELL_IDS[cell], *t, o.reverse, y, gates, c, *grads, grad_mask(tuple(needs))))
        return [next(found) if need else None for need in needs]
