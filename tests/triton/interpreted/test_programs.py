"""Custom cells as generated Triton kernels, in the interpreter: variants and further cells within the budget of
float64, in every dtype, with lengths, resets, both directions, heads, what is not saved made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Values, complaints, pooled
from test_engine_programs import (
    CELLS,
    by_step,
    grads_of,
    layer_of,
    named,
    needs_of,
    program_of,
    replaced,
    same_bits,
)
from torch import Tensor

import rnnkit
from rnnkit import variants
from rnnkit.backends.triton import program as triton
from rnnkit.cells import compute_dtype
from rnnkit.custom import triton_source
from rnnkit.custom.declare import CellSpec, spec_of
from rnnkit.custom.inputs import CellInputs, CellOptions

SMALL = {"steps": 3, "rows": 3, "inputs": 3, "hidden": 5}
MASKED = {**SMALL, "lengths": True, "reset": True}
HOW: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "masked": MASKED,
    "reverse": {**MASKED, "reverse": True},
    "again": {**MASKED, "recompute": True},
    "again in reverse": {**MASKED, "recompute": True, "reverse": True},
    "heads": {**SMALL, "heads": 3, "hidden": 6},
    "heads in reverse": {**MASKED, "heads": 3, "hidden": 6, "reverse": True},
    "projected": {**SMALL, "project": False, "lengths": True},
}
SEEDS = {"plain": 0, "masked": 1}
"""Others have number 5."""


def by_triton(spec: CellSpec, t: CellInputs, o: CellOptions, dtype: torch.dtype) -> Values:
    program, t = program_of(spec, t.states[0].shape[1]), t.to(dtype)
    assert triton.unsupported(program, "cpu", dtype, o) == []
    outputs, saved = triton.forward(program, t, o, True)
    assert [(v.shape, v.dtype) for v in saved] == triton.saved_shapes(program, t, o)
    found = triton.backward(program, t, o, outputs.y, saved, grads_of(spec, t, dtype), needs_of(spec, t))
    return named(spec, outputs, t, found)


def compare(name: str, how: dict[str, Any], dtype: torch.dtype, seeds: int = 1) -> list[Any]:
    spec, wide = spec_of(CELLS[name]), compute_dtype(dtype)
    got, usual, truth = [], [], []
    for seed in range(seeds):
        t, o = layer_of(spec, 5 + seed, how)
        got.append(by_triton(spec, t, o, dtype))
        usual.append(by_step(spec, t, o, torch.float32 if dtype == torch.float64 else wide, dtype))
        truth.append(by_step(spec, t, o, torch.float64, torch.float64))
    return complaints(pooled(got), pooled(usual), pooled(truth), dtype)


def close(name: str, how: dict[str, Any]) -> None:
    """In float64, where right means right to the last digits."""
    spec = spec_of(CELLS[name])
    t, o = layer_of(spec, 5, how)
    found, right = by_triton(spec, t, o, torch.float64), by_step(spec, t, o, torch.float64, torch.float64)
    assert found.keys() == right.keys()
    for key, v in found.items():
        torch.testing.assert_close(v, right[key], rtol=1e-11, atol=1e-11, msg=lambda m, k=key: f"off by: {k}: {m}")


def turns() -> list[tuple[str, str]]:
    """Every cell once, in turn in each way."""
    ways = list(HOW)
    return [(name, ways[k % len(ways)]) for k, name in enumerate(CELLS)]


@pytest.mark.parametrize(("name", "how"), turns())
def test_a_cell(name: str, how: str) -> None:
    close(name, HOW[how])
