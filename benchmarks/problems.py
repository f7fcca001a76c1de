"""What parity is examined on: every kind of layer, in sizes and with extras that each can go wrong on, in every dtype.

The numbers are drawn in float64 such that the dtype holds them exactly: what differs later was made by computing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rnnkit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Values = dict[str, Tensor]
POOLED, SAMPLES = 96, 16  # numbers that a state has at least, in so many runs at most: the largest of a few is luck


@dataclass(frozen=True)
class Kind:
    """A kind of layer: its class, what the class takes, and the cell's name in `ops.layer`."""

    layer: str
    cell: str
    options: dict[str, Any] = field(default_factory=dict)
    known: bool = True
    """Whether torch.nn has it."""

    @property
    def states(self) -> tuple[str, ...]:
        """The names of its states."""
        return ("h", "c") if self.cell == "lstm" else ("h",)


KINDS = {
    "rnn_tanh": Kind("RNN", "rnn_tanh"),
    "rnn_relu": Kind("RNN", "rnn_relu", {"nonlinearity": "relu"}),
    "lstm": Kind("LSTM", "lstm"),
    "lstm_proj": Kind("LSTM", "lstm", {"proj_size": 3}),
    "gru": Kind("GRU", "gru"),
    "gru_reset_before": Kind("GRU", "gru_reset_before", {"reset_after": False}, known=False),
}


@dataclass(frozen=True)
class Variant:
    """Sizes (T, B, I, H), and what a layer is called with."""

    size: tuple[int, int, int, int] = (6, 4, 5, 9)
    layers: int = 1
    both: bool = False
    """Both directions."""
    bias: bool = True
    hx: bool = True
    lengths: bool = False
    resets: bool = False
    reset_state: bool = False
    all_states: bool = False
    recompute: bool = False
    quick: bool = False

    def __str__(self) -> str:
        words = [f"{name} {n}" for name, n in zip("TBIH", self.size, strict=True)]
        words += [f"{self.layers} layers"] * (self.layers > 1) + ["both directions"] * self.both
        for name in ("lengths", "resets", "reset_state", "all_states", "recompute"):
            words += [name] * getattr(self, name)
        return ", ".join(words + [f"no {name}" for name in ("bias", "hx") if not getattr(self, name)])


EVERYTHING = Variant((7, 5, 4, 8), 2, True, lengths=True, resets=True, reset_state=True, quick=True)
VARIANTS = (
    Variant(quick=True),
    Variant((1, 4, 5, 7), quick=True),
    Variant((1, 1, 1, 4)),
    Variant((17, 2, 19, 33)),
    Variant((3, 17, 33, 65), quick=True),
    Variant((5, 16, 32, 128), both=True),
    Variant((2, 3, 7, 257)),
    Variant(hx=False, bias=False),
    Variant(layers=2, both=True),
    Variant(lengths=True),
    Variant(lengths=True, both=True, hx=False),
    Variant(resets=True),
    Variant(resets=True, reset_state=True, both=True),
    Variant((9, 5, 3, 16), lengths=True, resets=True, reset_state=True, all_states=True, quick=True),
    Variant(lengths=True, resets=True, recompute=True, quick=True),
    EVERYTHING,
)


@dataclass(frozen=True)
class Problem:
    """A kind of layer in one variant and dtype."""

    kind: str
    variant: Variant
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.kind} in {str(self.dtype)[6:]} ({self.variant})"

    @property
    def output_size(self) -> int:
        """H, or P with a projection."""
        return KINDS[self.kind].options.get("proj_size") or self.variant.size[3]

    @property
    def samples(self) -> int:
        """Runs to pool."""
        return min(SAMPLES, -(-POOLED // (self.variant.size[1] * self.output_size)))

    @property
    def known(self) -> bool:
        """Whether torch.nn can be brought to do it."""
        return KINDS[self.kind].known and not self.variant.all_states


def select(quick: bool = False) -> list[Problem]:
    """What is examined, in the order in which it matters where time is short.

    quick: a few variants in bfloat16, and the one with everything in float32.
    """
    variants = sorted(VARIANTS, key=lambda variant: (variant is not EVERYTHING, not variant.quick))
    every = [Problem(kind, variant, dtype) for variant, dtype, kind in itertools.product(variants, DTYPES, KINDS)]
    if quick:
        every = [
            p
            for p in every
            if p.variant.quick and (p.dtype == torch.bfloat16 or (p.variant is EVERYTHING and p.dtype == torch.float32))
        ]
    return [p for p in every if p.kind != "rnn_relu" or p.variant.bias]  # see `_relu`


# What a problem is given: values in float64 that its dtype holds exactly.


@dataclass
class Given:
    """x [T, B, I]; h_0, c_0 and h_r, c_r [L·D, B, ·]; weights under torch's names; lengths [B], resets [T, B]."""

    leaves: Values
    weights: Values
    lengths: Tensor | None
    resets: Tensor | None

    @property
    def valid(self) -> list[int]:
        """How many steps each row has."""
        steps, rows = self.leaves["x"].shape[:2]
        return [steps] * rows if self.lengths is None else self.lengths.tolist()

    def to(self, dtype: torch.dtype, device: str) -> tuple[Values, Values]:
        """Leaves and weights, each to be differentiated by."""
        every = (self.leaves, self.weights)
        first, second = ({n: v.to(device, dtype).requires_grad_() for n, v in some.items()} for some in every)
        return first, second


def draw(problem: Problem, seed: int) -> Given:
    """Random numbers. Row 0 has all its steps, the last row none where there are several."""
    variant, kind, g = problem.variant, KINDS[problem.kind], torch.Generator().manual_seed(seed)
    steps, rows, features, hidden = variant.size

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=g) * 2 - 1).to(problem.dtype).double()

    count = variant.layers * (2 if variant.both else 1)
    leaves = {"x": uniform(steps, rows, features)}
    for suffix in ["0"] * variant.hx + ["r"] * variant.reset_state:
        for name, size in zip(kind.states, (problem.output_size, hidden), strict=False):
            leaves[f"{name}_{suffix}"] = uniform(count, rows, size)
    weights = {}
    for name, p in build(problem, rnnkit).named_parameters():
        scale = _relu(name, p.shape) if problem.kind == "rnn_relu" else hidden**-0.5
        v = uniform(*p.shape)
        if problem.kind == "rnn_relu" and name.startswith("bias"):
            sign = torch.ones(hidden)
            sign[::3] = -1
            v = (1.75 + v / 8) * sign
        weights[name] = (v * scale).to(problem.dtype).double()
    lengths = resets = None
    if variant.lengths:
        lengths = torch.randint(1, steps + 1, (rows,), generator=g)
        lengths[0] = steps
        if rows > 1:
            lengths[-1] = 0
    if variant.resets:
        resets = torch.rand(steps, rows, generator=g) < 0.3
    return Given(leaves, weights, lengths, resets)


def _relu(name: str, shape: torch.Size) -> float:
    """How large a weight of an RNN with relu may be, so that no rounding takes a sum over the kink.

    There the derivative is that of another function, and no budget says how far it is off. Both biases together are
    between 3.2 and 3.8 in size; |W_ih x| stays below 0.5 and |W_hh h|, with h below 6.7, below 2.4.
    """
    if name.startswith("bias"):
        return 1.0
    most = 0.35 if name.startswith("weight_hh") else 0.5 if "l0" in name else 0.07
    return most / shape[1]


def build(problem: Problem, library: Any, **more: Any) -> nn.Module:
    """The layer, of rnnkit or of torch.nn."""
    variant, kind = problem.variant, KINDS[problem.kind]
    _, _, features, hidden = variant.size
    how = dict(num_layers=variant.layers, bias=variant.bias, bidirectional=variant.both, **kind.options)
    return getattr(library, kind.layer)(features, hidden, **how, **more)
