"""What a backend is asked to do: the tensors of one layer, the options, and the facts of both: its spec.

A layer here is one layer in one direction over all T, input projection inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LayerInputs(NamedTuple):
    """What a layer reads, in the order of every argument list. T steps, B rows, I inputs, H hidden, P projected."""

    x: Tensor  # [T, B, I]
    h_0: Tensor  # [B, H], [B, P] with a projection; None (zeros) only where `takes_none_states`, see `with_zero_states`
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


TORCH_CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
"""The cells that torch.nn has layers of; its operators in torch._VF bear the same names."""


TIME_MAJOR, BATCH_FIRST, UNBATCHED, STEP = range(4)
"""Layouts of a whole call's x: [T, B, I], [B, T, I], [T, I], one step [B, I]; as csrc/layer/stack.h numbers them."""


class StackOptions(NamedTuple):
    """What a whole call is, all layers and both directions, beside its tensors."""

    cell: str
    layers: int = 1
    directions: int = 1
    proj_size: int = 0
    layout: int = TIME_MAJOR
    all_states: bool = False
    recompute: bool = False
    dropout: float = 0.0
    """The probability between layers; 0 in evaluation."""

    @property
    def dims(self) -> int:
        """Those of x."""
        return 2 if self.layout in (UNBATCHED, STEP) else 3

    @property
    def outputs(self) -> tuple[bool, ...]:
        """Whether there are y, h_n, c_n, h_all, c_all."""
        has_c = self.cell == "lstm"
        return self.layout != STEP, True, has_c, self.all_states, self.all_states and has_c

    @property
    def reads_output(self) -> bool:
        """Whether the backward reads the y that the caller has, so that it is not kept beside. A step has none."""
        return self.layout != STEP


class StackInputs(NamedTuple):
    """The tensors of a whole call beside its weights, as the caller holds them; missing states are zeros.

    Sizes are of TIME_MAJOR; L layers, D directions, N is P with a projection, else H."""

    x: Tensor  # [T, B, I]
    h_0: Tensor | None = None  # [L·D, B, N]
    c_0: Tensor | None = None  # [L·D, B, H], LSTM
    lengths: Tensor | None = None  # [B]
    reset: Tensor | None = None  # [T, B]
    h_reset: Tensor | None = None  # as h_0: the states at a reset
    c_reset: Tensor | None = None


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
            (f"the cell {self.cell!r}", self.cell not in TORCH_CELLS),
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


def describe_stack(o: StackOptions, t: StackInputs, weights: Sequence[Tensor], *, train: bool) -> list[LayerSpec]:
    """The spec of each layer and direction of a whole call on the CPU."""
    *leading, features = t.x.shape
    steps, rows = (leading[0], 1) if o.layout == UNBATCHED else (1, leading[0]) if o.layout == STEP else leading
    if o.layout == BATCH_FIRST:
        steps, rows = rows, steps
    size, count = weights[1].shape[1], len(weights) // (o.layers * o.directions)
    hidden = weights[count - 1].shape[1] if o.proj_size else size
    masked = t.lengths is not None, t.reset is not None, t.h_reset is not None
    found = []
    for k in range(o.layers):
        sizes = (steps, rows, o.directions * size if k else features, hidden, o.proj_size, count > 3)
        for d in range(o.directions):
            how = (d == 1, o.all_states, o.recompute, train)
            found.append(LayerSpec(o.cell, "cpu", t.x.dtype, *sizes, *masked, *how))
    return found
