"""The cells of `rnnkit.variants` as the benchmark has them: names, how a layer of one is made, what it multiplies."""

from __future__ import annotations

from typing import Any

import rnnkit
from rnnkit import variants

BUILT_IN = ("LSTM", "GRU")
"""Cells of which rnnkit also has a layer with kernels of its own."""
NAMES = (
    *BUILT_IN,
    *(
        name
        for name in variants.__all__
        if isinstance(found := getattr(variants, name), type) and issubclass(found, rnnkit.Cell)
        if name not in (*BUILT_IN, "RNN")
    ),
)
HEADS = {"SLSTM": 4, "BlockGRU": 8, "LayerNormBlockGRU": 8}
"""As their papers have them; elsewhere 1."""
WITHOUT_BIAS = ("LayerNormLSTM", "LayerNormGRU", "LiGRU")
"""Their papers' norms leave no room for one."""


def layer(name: str, inputs: int, hidden: int, **how: Any) -> rnnkit.Custom:
    """A layer of this cell, as its paper has it."""
    heads, bias = HEADS.get(name, 1), name not in WITHOUT_BIAS
    return rnnkit.Custom(getattr(variants, name), inputs, hidden, heads=heads, bias=bias, **how)


def products(name: str) -> tuple[int, float]:
    """Blocks of H outputs of what a step multiplies: of the input, and of values of H, heads counted for their part."""
    spec = rnnkit.custom.declare.spec_of(getattr(variants, name))
    return spec.gates, sum(blocks for _, blocks in spec.weights) / HEADS.get(name, 1)
