"""What the cells of this folder share: activations as options, and the check of a probability.

In a step `activation` acts on candidates and on what leaves the cell, `recurrent_activation` on gates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..custom.declare import Cell, option

Activation = Callable[[Tensor], Tensor]


class Activated(Cell):
    """A cell whose candidate (`activation`) and gates (`recurrent_activation`) take any function, or its name."""

    activation = option("tanh")
    recurrent_activation = option("sigmoid")


class Masked(Activated):
    """A cell with probabilities among its options, and masks drawn for each call."""

    probabilities: tuple[str, ...] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in self.probabilities:
            p = getattr(self, name)
            if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
                raise ValueError(f"{type(self).__name__}({name}=...) must be a probability, from 0 to 1, got {p!r}")


def dropout_mask(like: Tensor, *shape: int, p: float, training: bool) -> Tensor:
    """0 with probability p, else 1 / (1 - p); in eval 1."""
    return F.dropout(like.new_ones(shape), p, training)


def zoneout_mask(like: Tensor, *shape: int, p: float, training: bool) -> Tensor:
    """1 (keep the old state) with probability p, else 0; in eval the expectation p, for every step at once."""
    if not training:
        return like.new_full((1, *shape[1:]), p)
    return torch.bernoulli(like.new_full(shape, p))
