"""Every kernel, forward and backward, in both regimes, against the oracle of sequences.py and against torch.nn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import EMULATED, F32, KINDS, Case, check, ours
from support import CELLS, Config, by_lengths, by_reset, in_two, parity, some
from test_nan import assert_unseen, everything, unseen_places
from torch import Tensor

import rnnkit
from rnnkit.backends import chunks
from rnnkit.backends.triton import backend as triton
from rnnkit.backends.triton import configs as triton_configs

kinds = pytest.mark.parametrize("kind", KINDS)
TILE = 16  # rows


@kinds
def test_everything_at_once(kind: str, regime: str) -> None:
    check(Case(kind, **EMULATED), "triton", F32)


@kinds
@pytest.mark.parametrize(
    "sizes",
    [
        {"steps": 1, "rows": 1, "hidden": 5},
        {"steps": 2, "rows": TILE + 3, "hidden": 19, "bidirectional": True},
        {"steps": 3, "rows": 2, "hidden": 45, "resets": ((1, 0), (2, 1))},
        {"steps": 3, "rows": 2, "hidden": 33, "lengths": (1, 3), "bias": False, "hx": False},
        {
            "steps": 3,
            "rows": 5,
            "hidden": 48,
            "lengths": (1, 3, 2, 0, 3),
            "resets": ((1, 1),),
        },  # whose products are others
    ],
    ids=lambda sizes: f"B{sizes['rows']}H{sizes['hidden']}",
)
def test_odd_sizes(kind: str, sizes: dict[str, Any], regime: str) -> None:
    check(Case(kind, **sizes), "triton", F32)


@kinds
@pytest.mark.parametrize(
    ("rows", "tile"), [(17, 32), *(pytest.param(*v, marks=pytest.mark.long) for v in ((33, 64), (100, 128)))]
)
def test_tall_tiles(kind: str, rows: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of many rows by many units, here at few units; with a projection to 3, which is not aligned, 32 rows."""
    monkeypatch.setattr(triton.regimes, "only", "step")
    monkeypatch.setattr(triton_configs, "PROGRAMS", 1)
    assert triton_configs.step_tile("gru", "forward", 16, 0, rows).rows == tile
    lengths = tuple(1 + b % 3 for b in range(rows))
    check(
        Case(kind, bidirectional=True, steps=3, rows=rows, hidden=16, lengths=lengths, resets=((1, 0), (2, rows - 1))),
        "triton",
        F32,
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm_proj"])
def test_one_unit(kind: str, regime: str) -> None:
    check(Case(kind, hidden=1, steps=3, rows=2), "triton", F32)


def test_more_units_than_any_chip_holds() -> None:
    """Step by step by itself, over more than one tile of units."""
    layer = rnnkit.GRU(3, 257, backend="triton")
    x = torch.randn(2, 1, 3)
    detail = rnnkit.explain(layer, x).to_dict()["layers"][0]["detail"]
    assert detail.startswith("step: no kernel keeps the recurrent weights of H=257 on chip")
    check(Case("gru", hidden=257, steps=2, rows=2, resets=((1, 1),)), "triton", F32)


@pytest.mark.parametrize("dtype", some([torch.bfloat16, torch.float32, torch.float16]), ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_each_dtype_within_the_budget(cell: str, dtype: torch.dtype, regime: str) -> None:
    """Through the public layers; lengths against packing, resets against two calls."""
    config = Config(cell, 1, True, dtype=dtype, size=(5, 3, 4, 19))
    assert parity(config, ["triton"]) == []
    if dtype != torch.float16:  # the masks are the same in every dtype
        assert parity(replace(config, layout="packed_unsorted"), ["triton"], how=by_lengths) == []
    one = replace(config, bidirectional=False, proj=cell == "lstm")
    assert parity(one, ["triton"], how=by_reset, torch_how=in_two) == []


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@kinds
def test_what_a_row_does_not_see(kind: str, poison: float, regime: str) -> None:
    """Padding, what lies before a reset, and the initial state that a reset at the first step replaces."""
    case = Case(kind, steps=4, rows=3, lengths=(3, 0, 4), resets=((0, 0), (2, 2)), reset_state=True)

    assert_unseen(case, "triton", F32, unseen_places(case), everything, poison)

    def before(leaves: dict[str, Tensor], value: float) -> None:
        leaves["x"][:2, 2] = value

    assert_unseen(case, "triton", F32, before, lambda results: {"y": results["y"][2:, 2]}, poison)


@kinds
def test_recompute_and_again_give_the_same_bits(kind: str, regime: str) -> None:
    case = Case(kind, **{**EMULATED, "bidirectional": False})
    first = ours(case, "triton", F32)
    for again in (ours(case, "triton", F32), ours(replace(case, recompute=True), "triton", F32)):
        assert all(torch.equal(again[name], v) for name, v in first.items())


@kinds
def test_recompute_in_ranges(kind: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two steps, both ways: a reset and an end at their borders and within them."""
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunks, "MOST_CHUNKS", 3)
    resets = ((0, 0), (2, 0), (3, 0), (4, 2), (1, 2))
    check(Case(kind, recompute=True, **{**EMULATED, "steps": 5, "lengths": (5, 2, 4), "resets": resets}), "triton", F32)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["y", "h_n", "c_n"])
def test_gradients_of_one_result_expanded(part: int, regime: str) -> None:
    """A sum's gradient has no memory of its own, and the other results' are None."""
    layer = rnnkit.LSTM(3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)

    def gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        with rnnkit.use_backend(backend):
            y, states = layer.to(dtype)(x.to(dtype))
        return list(torch.autograd.grad((y, *states)[part].sum(), [x, *layer.parameters()]))

    budgets = gradients("reference", F32), gradients("reference", torch.float64)
    for got, rounded, exact in zip(gradients("triton", F32), *budgets, strict=True):
        off = [float((v.double() - exact).abs().max()) for v in (got, rounded)]
        assert off[0] <= 2 * off[1] + 4 * torch.finfo(F32).eps * float(exact.abs().max())


def test_float64_and_other_devices_are_refused() -> None:
    layer = rnnkit.GRU(3, 4, backend="triton").double()
    with pytest.raises(NotImplementedError, match=r"computes in float32, bfloat16 and float16, got torch\.float64"):
        layer(torch.zeros(2, 1, 3).double())
    problem = rnnkit.explain(rnnkit.GRU(3, 4), torch.zeros(2, 1, 3)).choices[0].problem
    assert triton.Triton().unsupported(problem._replace(device="cuda")) == [
        "in Triton's interpreter runs on the device cpu, got cuda"
    ]


def test_auto_leaves_the_interpreter_alone() -> None:
    found = rnnkit.explain(rnnkit.GRU(3, 4), torch.zeros(2, 1, 3)).to_dict()["layers"][0]
    assert found["backend"] != "triton" and "interpreter" in found["reasons"]["triton"][0]
    named = rnnkit.explain(rnnkit.GRU(3, 4, backend="triton"), torch.zeros(2, 1, 3))
    assert named.choices[0].detail == "persistent: the recurrent weights stay on chip for the whole sequence"
    assert "→ triton" in str(named) and "persistent: " in str(named)
