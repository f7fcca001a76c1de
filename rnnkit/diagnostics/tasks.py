"""Memory tasks: inputs that can only be answered by remembering, and the exact loss of whoever remembers nothing.

The adding problem and the copy task: S. Hochreiter, J. Schmidhuber, "Long short-term memory", Neural Computation 9
(1997), in the forms of Q. Le, N. Jaitly, G. Hinton, "A simple way to initialize recurrent networks of rectified linear
units" (2015), and M. Arjovsky, A. Shah, Y. Bengio, "Unitary evolution recurrent neural networks", ICML 2016.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Adding(NamedTuple):
    """Sequences of numbers, two of which are marked; to tell is their sum."""

    x: Tensor  # [B, T, 2]: a number from 0 to 1, and the mark
    target: Tensor  # [B]

    @staticmethod
    def baseline() -> float:
        """The mean squared error of the best answer that does not look: 1, the mean. Two uniform numbers: 2/12."""
        return 1 / 6


def adding_problem(rows: int, steps: int, *, generator: torch.Generator | None = None) -> Adding:
    """One mark in the first half of the steps, one in the second.

    Args:
        rows: B, 1 or more.
        steps: T, 2 or more.
    """
    _least("rows", rows, 1)
    _least("steps", steps, 2)
    numbers = torch.rand(rows, steps, generator=generator)
    half = steps // 2
    first = torch.randint(half, (rows,), generator=generator)
    second = half + torch.randint(steps - half, (rows,), generator=generator)
    marks = torch.zeros(rows, steps)
    row = torch.arange(rows)
    marks[row, first] = marks[row, second] = 1
    return Adding(torch.stack([numbers, marks], -1), numbers[row, first] + numbers[row, second])


class Copying(NamedTuple):
    """Symbols, a pause, a signal; to tell are the symbols again, in order. 0 is the blank, symbols + 1 the signal."""

    x: Tensor  # [B, T] int64, T = pause + 2 length
    target: Tensor  # [B, T] int64: blank until the last `length` steps
    symbols: int
    length: int

    def baseline(self) -> float:
        """The cross-entropy of a step, in nats, of whoever knows when to answer but not what."""
        return self.length * math.log(self.symbols) / self.x.shape[1]


def copy_task(
    rows: int, pause: int, *, length: int = 10, symbols: int = 8, generator: torch.Generator | None = None
) -> Copying:
    """`length` of `symbols` symbols, then blanks, the signal after `pause` - 1 of them, and `length` blanks to answer.

    Args:
        rows, pause, length: 1 or more.
        symbols: 2 or more.
    """
    for name, value, least in (("rows", rows, 1), ("pause", pause, 1), ("length", length, 1), ("symbols", symbols, 2)):
        _least(name, value, least)
    shown = torch.randint(1, symbols + 1, (rows, length), generator=generator)
    x = torch.zeros(rows, pause + 2 * length, dtype=torch.int64)
    x[:, :length] = shown
    x[:, length + pause - 1] = symbols + 1
    target = torch.zeros_like(x)
    target[:, -length:] = shown
    return Copying(x, target, symbols, length)


def _least(name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be {least} or more, got {value!r}")
