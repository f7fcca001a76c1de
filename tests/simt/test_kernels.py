"""Every CUDA kernel, forward and backward, executed on the CPU from its own source, against float64.

Each row of the table runs once with everything on: lengths, resets, states at a reset, both directions, a batch that is
no multiple of the tile. Then what goes wrong in corners: one step, one row, one unit, odd sizes, ranges, poison.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import F32, F64, KINDS, Case, check, ours
from simt import run as simt
from test_nan import assert_unseen, everything, unseen_places
from torch import Tensor

import rnnkit
from rnnkit.backends import cuda, cuda_table, ranges
from rnnkit.benchmarks import parity, problems
from rnnkit.benchmarks.problems import BF16, F16, Problem, Variant

kinds = pytest.mark.parametrize("kind", KINDS)
ALL = {
    "bidirectional": True,
    "steps": 4,
    "rows": 3,
    "lengths": (4, 0, 3),
    "resets": ((0, 0), (2, 0), (1, 2), (3, 2)),
    "reset_state": True,
    "states": True,
}
RESIDENT = list(problems.resident(cuda_table.ROWS))
STEPS = [row for row in cuda_table.ROWS if row.regime == "step"]


pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(params=["cta", "step"])
def regime(request: pytest.FixtureRequest) -> Iterator[str]:
    with cuda.stepwise() if request.param == "step" else contextlib.nullcontext():
        yield request.param


def found(*every: Problem) -> None:
    findings = parity.Findings()
    parity.examine(findings, "cpu", every, ("cuda",))
    assert findings.wrong == findings.failing == [] and sum(findings.ran.values()) == len(every)


@pytest.mark.parametrize("problem", RESIDENT, ids=[f"{p.kind}-{p.precision}-{p.variant.size[3]}" for p in RESIDENT])
def test_every_row_that_keeps_its_weights(problem: Problem) -> None:
    found(problem)


@pytest.mark.parametrize("row", [row for row in STEPS if row.kind != "f64"], ids=lambda row: row.name)
def test_every_row_of_any_size(row: cuda_table.Row) -> None:
    dtype = {"bf16": BF16, "fp16": F16}.get(row.kind, F32)
    names = {"rnn": "rnn_relu", "lstm": "lstm_proj", "gru": "gru", "gru_before": "gru_reset_before"}
    by = Variant(
        (3, row.rows + 3, 3, 19 if row.rows == 8 else 40), both=True, all_states=True, proj=9, **problems.MASKED
    )
    tf32 = row.kind == "tf32"
    batch = replace(by, size=(3, row.rows - 1, *by.size[2:])) if row.rows == 8 else by
    found(Problem(names[row.kernel], batch, dtype, tf32=tf32, stepwise=True, fused=True))


@kinds
@pytest.mark.parametrize("rows", [3, 9])
def test_float64_step_by_step(kind: str, rows: int) -> None:
    check(Case(kind, **{**ALL, "rows": rows, "lengths": (4, 0, 3) * (rows // 3)}), "cuda", F64)


@kinds
def test_everything_at_once(kind: str, regime: str) -> None:
    check(Case(kind, **ALL), "cuda", F32)


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
    case = Case(kind, **{**ALL, "bidirectional": False})
    first = ours(case, "cuda", F32)
    for again in (ours(case, "cuda", F32), ours(replace(case, recompute=True), "cuda", F32)):
        assert all(torch.equal(again[name], v) for name, v in first.items())


@kinds
def test_recompute_in_ranges(kind: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two steps, both ways: a reset and an end at their borders and within them."""
    monkeypatch.setattr(ranges, "ROWS", 1)
    monkeypatch.setattr(ranges, "RANGES", 3)
    resets = ((0, 0), (2, 0), (3, 0), (4, 2), (1, 2))
    check(Case(kind, recompute=True, **{**ALL, "steps": 5, "lengths": (5, 2, 4), "resets": resets}), "cuda", F32)


@kinds
def test_twenty_schedules(kind: str, regime: str) -> None:
    """The same bits whatever the order of threads and blocks."""
    case = Case(kind, **{**ALL, "steps": 3, "lengths": (3, 0, 2), "resets": ((0, 0), (2, 0), (1, 2))}, hidden=19)
    with simt.scheduled(seed=0):
        first = ours(case, "cuda", F32)
    for seed in range(1, 20):
        with simt.scheduled(seed=seed):
            again = ours(case, "cuda", F32)
        assert all(torch.equal(again[name], v) for name, v in first.items()), seed


def test_no_step_and_no_row(regime: str) -> None:
    layer = rnnkit.LSTM(3, 5, backend="cuda")
    y, (h, c) = layer(torch.zeros(2, 0, 3))
    assert y.shape == (2, 0, 5) and h.shape == c.shape == (1, 0, 5)
    h_0 = torch.randn(1, 2, 5)
    with rnnkit.use_backend("cuda"):
        from rnnkit import ops

        y, h, c, _ = ops.layer("gru", torch.zeros(0, 2, 3), h_0[0], None, list(rnnkit.GRU(3, 5).parameters()))
    assert y.shape == (0, 2, 5) and torch.equal(h, h_0[0])


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
