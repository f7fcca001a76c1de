"""What one layer of a custom cell takes and gives, in one direction: the tensors in a fixed order, and the options.

T steps, B rows, I input size, G gates, H hidden size, n heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .declare import CellSpec

V = TypeVar("V")


class CellOptions(NamedTuple):
    reverse: bool = False
    all_states: bool = False
    recompute: bool = False
    heads: int = 1


class CellInputs(NamedTuple):
    """The flat order, which autograd and operators use, is the order of the fields."""

    x: Tensor
    """[T, B, I], or gx [T, B, G·H] where w_ih is None."""
    states: tuple[Tensor, ...]
    """[B, H] each, before the first step; or None, which is zeros, for backends that take it (`takes_none_states`)."""
    w_ih: Tensor | None
    """[G·H, I]"""
    b_ih: Tensor | None
    b_hh: Tensor | None
    weights: tuple[Tensor, ...]
    """[blocks·H, H/n] each: w_hh first where the cell has one, then as declared."""
    units: tuple[Tensor, ...]
    """[H] each."""
    steps: tuple[Tensor, ...]
    """[T, B, H], per row [T, B]; maybe expanded."""
    lengths: Tensor | None
    """[B] of int64."""
    reset: Tensor | None
    """[T, B] of bool."""
    reset_states: tuple[Tensor, ...]
    """[B, H] each, or none for zeros."""

    def flat(self) -> tuple[Tensor | None, ...]:
        return (
            self.x,
            *self.states,
            self.w_ih,
            self.b_ih,
            self.b_hh,
            *self.weights,
            *self.units,
            *self.steps,
            self.lengths,
            self.reset,
            *self.reset_states,
        )

    def to(self, dtype: torch.dtype) -> CellInputs:
        """Every tensor of numbers in this dtype."""

        def cast(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.to(dtype)

        def each(some: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple([v.to(dtype) for v in some])

        return CellInputs(
            self.x.to(dtype),
            tuple([cast(v) for v in self.states]),  # type: ignore[misc]
            cast(self.w_ih),
            cast(self.b_ih),
            cast(self.b_hh),
            each(self.weights),
            each(self.units),
            each(self.steps),
            self.lengths,
            self.reset,
            each(self.reset_states),
        )

    def with_zero_states(self, hidden: int) -> CellInputs:
        """Where states are None, zeros instead."""
        if all(v is not None for v in self.states):
            return self
        zeros = self.x.new_zeros((self.x.shape[1], hidden))
        return self._replace(states=tuple([zeros if v is None else v for v in self.states]))


def parts(spec: CellSpec, flat: Sequence[V]) -> tuple:
    """A flat sequence, one item for each of `CellInputs.flat()`, in the fields of `CellInputs`."""
    a = 1 + len(spec.states)
    b = a + 3 + len(spec.weights)
    c = b + len(spec.units)
    d = c + len(spec.steps)
    states, weights, units, steps, again = flat[1:a], flat[a + 3 : b], flat[b:c], flat[c:d], flat[d + 2 :]
    return flat[0], states, *flat[a : a + 3], weights, units, steps, flat[d], flat[d + 1], again


def unflat(spec: CellSpec, flat: Sequence[Tensor | None]) -> CellInputs:
    """`CellInputs` of its flat order."""
    return CellInputs(*parts(spec, tuple(flat)))


class CellOutputs(NamedTuple):
    """y [T, B, H]; each state after the last step [1, B, H]; with all_states those after every step [T, B, H], of all
    but the first state, which y is. Where it stands for gradients, any may be None."""

    y: Tensor
    last: tuple[Tensor, ...]
    all: tuple[Tensor, ...]


def outputs_of(spec: CellSpec, o: CellOptions, flat: Sequence[Tensor]) -> CellOutputs:
    """y, last and all, of a flat sequence that may be longer."""
    n = len(spec.states)
    return CellOutputs(flat[0], tuple(flat[1 : 1 + n]), tuple(flat[1 + n : count_outputs(spec, o)]))


def count_outputs(spec: CellSpec, o: CellOptions) -> int:
    n = len(spec.states)
    return 1 + n + (n - 1 if o.all_states else 0)
