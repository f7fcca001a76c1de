"""What a backend is asked to do: the tensors of one layer, the options, and the facts of both: its spec.

A layer here is one layer in one direction over all T, input projection inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class LayerInputs(NamedTuple):
    """What a layer reads, in the order of every argument list. T steps, B rows, I inputs, H hidden, P projected."""

    x: Tensor  # [T, B, I]
    h_0: Tensor  # [B, H], [B, P] with a projection; None (zeros) only where `validates_inputs`, see `with_zero_states`
    c_0: Tensor | None  # [B, H], LSTM
    w_ih: Tensor  # [G·H, I]
    w_hh: Tensor  # [G·H, H or P]
    b_ih: Tensor | None  # [G·H]
    b_hh: Tensor | None  # [G·H]
    w_hr: Tensor | None = None  # [P, H], LSTM with a projection
    lengths: Tensor | None = None  # [B] int64
    reset: Tensor | None = None  # [T, B] bool
    h_reset: Tensor | None = None  # [B, H or P]: the state at a reset, zeros where None
    c_reset: Tensor | None = None  # [B, H]

    def cast(self, dtype: torch.dtype) -> LayerInputs:
        """The same with every floating tensor in `dtype`."""
        return LayerInputs(
            *(t.to(dtype) if t is not None and t.is_floating_point() else t for t in self)  # type: ignore[arg-type]
        )

    def with_zero_states(self, has_c: bool) -> LayerInputs:
        """The same with zeros for missing initial states. `has_c`: whether the cell has a c."""
        if self.h_0 is not None and (self.c_0 is not None or not has_c):
            return self
        rows, size = self.x.shape[1], self.w_hh.shape[1]
        h_0 = self.x.new_zeros((rows, size)) if self.h_0 is None else self.h_0
        c_0 = self.c_0
        if c_0 is None and has_c:
            c_0 = self.x.new_zeros((rows, size if self.w_hr is None else self.w_hr.shape[1]))
        return self._replace(h_0=h_0, c_0=c_0)


class LayerOptions(NamedTuple):
    """How a layer runs."""

    reverse: bool = False
    all_states: bool = False
    recompute: bool = False


class LayerOutputs(NamedTuple):
    """What a layer gives."""

    y: Tensor  # [T, B, H or P]
    h_n: Tensor  # [B, H or P]
    c_n: Tensor | None  # [B, H], LSTM
    c_all: Tensor | None  # [T, B, H], LSTM with all_states


class Result(NamedTuple):
    """Outputs, and what the backward of the same backend wants kept."""

    outputs: LayerOutputs
    saved: tuple[Tensor, ...] = ()
    graph: Any = None
    """An autograd graph of torch's own that `backward` continues (backend `torch` in eager mode)."""


class LayerSpec(NamedTuple):
    """The facts by which a backend is chosen. Under torch.compile T and B may be symbolic."""

    cell: str
    device: str
    dtype: torch.dtype
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    proj_size: int
    bias: bool
    lengths: bool = False
    reset: bool = False
    reset_state: bool = False
    reverse: bool = False
    all_states: bool = False
    recompute: bool = False
    train: bool = False
    device_index: int | None = None
    """Of several GPUs the one that the tensors are on; None on a CPU."""

    @property
    def extras(self) -> list[str]:
        """What torch.nn's layers do not know."""
        asked = (
            ("lengths", self.lengths),
            ("reset", self.reset),
            ("all cell states", self.all_states and self.cell == "lstm"),
            ("the reset gate before the product", self.cell == "gru_reset_before"),
            ("recompute", self.recompute),
        )
        return [name for name, wanted in asked if wanted]


def describe(cell: str, t: LayerInputs, o: LayerOptions, *, train: bool) -> LayerSpec:
    """The spec of a layer with these tensors and options."""
    x, w_hr = t.x, t.w_hr
    steps, rows, features = x.shape
    size, hidden = (0, t.w_hh.shape[1]) if w_hr is None else w_hr.shape
    return LayerSpec(  # by place, in half the time that names take
        cell,
        "cpu" if x.is_cpu else x.device.type,
        x.dtype,
        steps,
        rows,
        features,
        hidden,
        size,
        t.b_ih is not None,
        t.lengths is not None,
        t.reset is not None,
        t.h_reset is not None,
        *o,
        train,
        None if x.is_cpu else x.device.index,
    )
