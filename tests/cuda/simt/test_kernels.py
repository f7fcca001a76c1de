"""Both regimes of the CUDA kernels in corners, for every cell, in float32 against float64, executed on the CPU from
their own sources: one unit, no step, many, odd sizes, ranges, poison. test_rows.py has every row of the table and every
kind of operands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import EMULATED, F32, F64, KINDS, Case, build, check, compare, ours
from simt import run as simt
from test_nan import assert_unseen, everything, unseen_places
from torch import Tensor

import rnnkit
from rnnkit import ops
from rnnkit.backends import chunks
from rnnkit.backends.cuda import backend as cuda

kinds = pytest.mark.parametrize("kind", KINDS)

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(params=["cta", "step"])
def regime(request: pytest.FixtureRequest) -> Iterator[str]:
    with cuda.regimes.alone("step") if request.param == "step" else contextlib.nullcontext():
        yield request.param


@kinds
@pytest.mark.parametrize("rows", [3, 9])
def test_float64_step_by_step(kind: str, rows: int) -> None:
    check(Case(kind, **{**EMULATED, "rows": rows, "lengths": (4, 0, 3) * (rows // 3)}), "cuda", F64)


@kinds
def test_everything_at_once(kind: str, regime: str) -> None:
    check(Case(kind, **EMULATED), "cuda", F32)


@kinds
@pytest.mark.parametrize(
    "sizes",
    [
        {"steps": 1, "rows": 1, "hidden": 5},
        {"steps": 2, "rows": 19, "hidden": 18, "bidirectional": True},
        {"steps": 3, "rows": 2, "hidden": 45, "resets": ((1, 0), (2, 1))},
        {"steps": 3, "rows": 2, "hidden": 32, "lengths": (1, 3), "bias": False, "hx": False},
    ],
    ids=lambda sizes: f"B{sizes['rows']}H{sizes['hidden']}",
)
def test_odd_sizes(kind: str, sizes: dict[str, Any], regime: str) -> None:
    check(Case(kind, **sizes), "cuda", F32)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm_proj"])
def test_one_unit(kind: str, regime: str) -> None:
    check(Case(kind, hidden=1, steps=3, rows=2), "cuda", F32)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@kinds
def test_what_a_row_does_not_see(kind: str, poison: float, regime: str) -> None:
    """Padding, what lies before a reset, and the initial state that a reset at the first step replaces."""
    case = Case(kind, steps=4, rows=3, lengths=(3, 0, 4), resets=((0, 0), (2, 2)), reset_state=True)
    assert_unseen(case, "cuda", F32, unseen_places(case), everything, poison)

    def before(leaves: dict[str, Tensor], value: float) -> None:
        leaves["x"][:2, 2] = value

    assert_unseen(case, "cuda", F32, before, lambda results: {"y": results["y"][2:, 2]}, poison)


@kinds
def test_recompute_and_again_give_the_same_bits(kind: str, regime: str) -> None:
    case = Case(kind, **{**EMULATED, "bidirectional": False})
    first = ours(case, "cuda", F32)
    for again in (ours(case, "cuda", F32), ours(replace(case, recompute=True), "cuda", F32)):
        assert all(torch.equal(again[name], v) for name, v in first.items())


@kinds
def test_recompute_in_ranges(kind: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two steps, both ways: a reset and an end at their borders and within them."""
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunks, "MOST_CHUNKS", 3)
    resets = ((0, 0), (2, 0), (3, 0), (4, 2), (1, 2))
    check(Case(kind, recompute=True, **{**EMULATED, "steps": 5, "lengths": (5, 2, 4), "resets": resets}), "cuda", F32)


@kinds
@pytest.mark.parametrize("sizes", [(0, 2), (2, 0), (0, 0)], ids=lambda sizes: f"T{sizes[0]}B{sizes[1]}")
def test_no_step_and_no_row(kind: str, sizes: tuple[int, int], regime: str) -> None:
    """Without a step the state passes through, and so does its gradient; nothing else has one."""
    steps, rows = sizes
    weights = [p.detach().requires_grad_() for p in build(Case(kind)).parameters()]
    state = KINDS[kind].proj or 5
    shapes = {"x": (steps, rows, 4), "h": (rows, state), "again": (rows, state), "c": (rows, 5), "c_again": (rows, 5)}
    given = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    marks, lengths = torch.ones(steps, rows, dtype=torch.bool), torch.full((rows,), steps)
    has_c = KINDS[kind].has_c
    again = (given["again"], given["c_again"]) if has_c else given["again"]
    with rnnkit.use_backend("cuda"):
        y, h_n, c_n, _ = ops.layer(
            KINDS[kind].cell,
            given["x"],
            given["h"],
            given["c"] if has_c else None,
            weights,
            lengths=lengths,
            reset=marks,
            reset_state=again,
        )
    assert y.shape == (steps, rows, state) and h_n.shape == (rows, state)
    ends = {"h": h_n} | ({"c": c_n} if has_c else {})
    gradients = {name: torch.randn(v.shape) for name, v in ends.items()}
    loss = sum(((v * gradients[name]).sum() for name, v in ends.items()), y.sum())
    loss.backward()
    for name, v in ends.items():
        assert torch.equal(v, given[name]), name
        assert torch.equal(given[name].grad, gradients[name]), name
    for v in (given["x"], given["again"], *weights):
        assert v.grad is not None and not v.grad.any()


@pytest.mark.long
def test_more_steps_than_16_bits_count() -> None:
    """One unit, with a reset beyond the 65,536th step: against torch.nn, which gets the steps before it and those after
    it as two sequences."""
    steps, rows, cut = 70_000, 8, 66_000
    marks = torch.zeros(steps, rows, dtype=torch.bool)
    marks[cut] = True
    x, gy = torch.randn(steps, rows, 1), torch.randn(steps, rows, 1)
    layer = rnnkit.RNN(1, 1, backend="cuda")
    found = []
    for other, dtype in ((layer, F32), (torch.nn.RNN(1, 1), F32), (torch.nn.RNN(1, 1), F64)):
        other.load_state_dict(layer.state_dict())
        other.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        y = (
            layer(leaf, reset=marks)[0]
            if other is layer
            else torch.cat([other(v)[0] for v in leaf.tensor_split([cut])])
        )
        named = {"x": leaf, **dict(other.named_parameters())}
        gradients = torch.autograd.grad(y, list(named.values()), gy.to(dtype))
        found.append({"y": y.detach(), **dict(zip(named, gradients, strict=True))})
    compare(found[0], found[2], found[1])


def test_what_explain_says() -> None:
    layer = rnnkit.GRU(3, 40, backend="cuda")
    found = rnnkit.explain(layer, torch.zeros(2, 1, 3)).to_dict()["layers"][0]
    assert found["detail"].startswith("cta: the recurrent weights stay on one multiprocessor")
    large = rnnkit.explain(rnnkit.GRU(3, 400, backend="cuda"), torch.zeros(2, 1, 3)).to_dict()["layers"][0]
    assert large["detail"] == (
        "step: on one multiprocessor of sm_90 (227 KiB of shared memory a block) fit up to 112 units of gru "
        "in exact float32, got H=400 (step_gru_ieee_8)"
    )
    assert rnnkit.explain(rnnkit.GRU(3, 40), torch.zeros(2, 1, 3)).to_dict()["layers"][0]["backend"] != "cuda"


@pytest.mark.parametrize(("hidden", "size"), [(65, 65), (8, 4)], ids=["units", "projection"])
def test_a_kernel_refuses_what_it_does_not_hold(hidden: int, size: int) -> None:
    held = {"n": 1, "B": 1, "H": hidden, "N": size, "t0": 0, "total": 1, "reverse": False, "relu": False}
    fields = {"gx": torch.zeros(1, 1, 4 * hidden), "w_hh": torch.zeros(4 * hidden, size), "y": torch.zeros(1, 1, size)}
    with pytest.raises(
        RuntimeError, match=f"holds up to 64 units and no projection, got H={hidden} and a state of {size}"
    ):
        simt.run("cta_lstm_ieee_64", "forward", {**held, **fields})
