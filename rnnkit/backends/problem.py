"""What a backend is asked to do: the tensors of one layer, the options, and the problem they make.

A layer here is one layer in one direction over all T, input projection inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """What a layer reads, in the order of every argument list. T steps, B rows, I inputs, H hidden, P projected."""

    x: Tensor  # [T, B, I]
    h_0: Tensor  # [B, H], [B, P] with a projection
    c_0: Tensor | None  # [B, H], LSTM
    w_ih: Tensor  # [G·H, I]
    w_hh: Tensor  # [G·H, H or P]
    b_ih: Tensor | None  # [G·H]
    b_hh: Tensor | None  # [G·H]
    w_hr: Tensor | None  # [P, H], LSTM with a projection
    lengths: Tensor | None  # [B] int64
    reset: Tensor | None  # [T, B] bool
    h_r: Tensor | None  # [B, H or P]: the state at a reset, zeros where None
    c_r: Tensor | None  # [B, H]

    def cast(self, dtype: torch.dtype) -> Tensors:
        """The same with every floating tensor in `dtype`."""
        return Tensors(
            *(t.to(dtype) if t is not None and t.is_floating_point() else t for t in self)  # type: ignore[arg-type]
        )


class Options(NamedTuple):
    """How a layer runs."""

    reverse: bool = False
    all_states: bool = False
    recompute: bool = False


class Outputs(NamedTuple):
    """What a layer gives."""

    y: Tensor  # [T, B, H or P]
    h_n: Tensor  # [B, H or P]
    c_n: Tensor | None  # [B, H], LSTM
    c_all: Tensor | None  # [T, B, H], LSTM with all_states


class Result(NamedTuple):
    """Outputs, and what the backward of the same backend wants kept."""

    outputs: Outputs
    saved: tuple[Tensor, ...] = ()
    graph: Any = None
    """An autograd graph of torch's own that `backward` continues (backend `torch` in eager mode)."""


class Problem(NamedTuple):
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
    lengths: bool
    reset: bool
    reset_state: bool
    reverse: bool
    all_states: bool
    recompute: bool
    train: bool

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


def describe(cell: str, t: Tensors, o: Options, *, train: bool) -> Problem:
    """The problem that these tensors and options make."""
    return Problem(
        cell=cell,
        device=t.x.device.type,
        dtype=t.x.dtype,
        steps=t.x.shape[0],
        batch=t.x.shape[1],
        input_size=t.x.shape[2],
        hidden_size=t.w_hr.shape[1] if t.w_hr is not None else t.w_hh.shape[1],
        proj_size=t.w_hr.shape[0] if t.w_hr is not None else 0,
        bias=t.b_ih is not None,
        lengths=t.lengths is not None,
        reset=t.reset is not None,
        reset_state=t.h_r is not None,
        reverse=o.reverse,
        all_states=o.all_states,
        recompute=o.recompute,
        train=train,
    )
