"""The order in which `auto` asks the backends: read from recorded rows, nearest shape first, never under compile.

How the rows come about is in tests/bench/test_speed_report.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkit
from rnnkit.backends import BACKENDS, BY_NAME, LayerSpec, dispatch_times, preference, select

PLAIN = LayerSpec(
    "gru", "cpu", torch.float32, 100, 32, 256, 256, 0, True, False, False, False, False, False, False, True
)


def test_the_fastest_first_and_the_tables_order_in_a_tie() -> None:
    assert dispatch_times.fastest_first({"cpu": 3.0, "torch": 2.0, "reference": 1.0}) == ("reference", "torch", "cpu")
    assert dispatch_times.fastest_first({"cpu": 1.02, "torch": 1.0, "reference": 9.0}) == ("cpu", "torch", "reference")
    assert dispatch_times.fastest_first({"cpu": 1.04, "torch": 1.0, "reference": 9.0}) == ("torch", "cpu", "reference")
    assert dispatch_times.fastest_first({"cpu": 1.005, "torch": 1.0}) == ("cpu", "torch")


def test_no_backend_passes_another_for_less_than_the_noise() -> None:
    for cost in itertools.product((1.0, 1.005, 1.02, 1.029, 1.031, 1.05, 2.0), repeat=3):
        given = dict(zip(("cpu", "torch", "reference"), cost, strict=True))
        order = dispatch_times.fastest_first(given)
        assert sorted(order) == sorted(given)
        for earlier, later in itertools.combinations(given, 2):
            if order.index(later) < order.index(earlier):
                assert given[earlier] > 1.03 * given[later], f"{given}: {later} is not more than 3 % faster"


def test_what_is_recorded_moves_a_backend_only_where_it_is_faster_than_the_noise() -> None:
    for kind, rows in dispatch_times.ROWS.items():
        for row in rows:
            order = list(row.ms)
            first = dispatch_times.fastest_first(row.ms)[0]
            passed = order[: order.index(first)]
            assert all(row.ms[name] > 1.03 * row.ms[first] for name in passed), (kind, str(row))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two recorded shapes of a GRU: torch wins the small one, cpu the large one, and cpu on the whole."""
    lines = [
        ",".join([*dispatch_times.FACTS, *BY_NAME]),
        "cpu,gru,1,1,1,64,64,x,,,2,1,4",
        "cpu,gru,1,64,64,64,64,x,,,1,9,4",
    ]
    (tmp_path / "dispatch_times.csv").write_text("\n".join(lines) + "\n")
    found = dispatch_times.read(tmp_path / "dispatch_times.csv")
    monkeypatch.setattr(dispatch_times, "ROWS", found)
    monkeypatch.setattr(select, "_orders", {})
    monkeypatch.setattr(select, "_TYPICAL", {k: select._order(dispatch_times.typical(v)) for k, v in found.items()})


def names(problem: LayerSpec) -> list[str]:
    return [backend.name for backend in preference(problem)]


def test_the_nearest_recorded_shape_decides(table: None) -> None:
    small, large = ["cuda", "triton", "torch", "cpu", "reference"], ["cuda", "triton", "cpu", "reference", "torch"]
    for _ in range(2):  # looked up, and remembered
        assert names(PLAIN._replace(batch=1, steps=1)) == small
        assert names(PLAIN) == large
        assert names(PLAIN._replace(batch=7, steps=7)) == small, "7 is nearer to 1 than to 64, by factors"
        assert names(PLAIN._replace(batch=9, steps=9)) == large
        assert names(PLAIN._replace(batch=0, steps=0)) == small
        assert names(PLAIN._replace(cell="gru_reset_before")) == large
    for other in ({"cell": "lstm"}, {"train": False}, {"device": "cuda"}):
        assert preference(PLAIN._replace(**other)) == BACKENDS, "nothing is recorded"
    row = rnnkit.backends.recorded(PLAIN)
    assert str(row) == "B=64 T=64 I=64 H=64 on x: cpu 1 ms, reference 4 ms, torch 9 ms"


def test_orders_are_remembered_but_not_without_end(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = select._orders
    monkeypatch.setattr(select, "ORDER_CACHE_SIZE", 3)
    for steps in range(1, 9):
        preference(PLAIN._replace(steps=steps))
        assert 0 < len(kept) <= 3
    monkeypatch.setattr(dispatch_times, "nearest", None)
    assert names(PLAIN._replace(steps=8))[2] == "cpu"


def test_what_was_not_measured_keeps_its_place() -> None:
    order = select._order
    assert [b.name for b in order(("reference", "torch"))] == ["cuda", "triton", "cpu", "reference", "torch"]
    assert [b.name for b in order(("torch", "cpu"))] == ["cuda", "triton", "torch", "cpu", "reference"]


def test_compiled_code_does_not_look_at_sizes(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch_times, "nearest", None)
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(rnnkit.GRU(8, 8), backend=count, dynamic=True, fullgraph=True)
    for batch, steps in ((2, 3), (3, 70), (64, 5), (70, 70)):
        compiled(torch.randn(steps, batch, 8))
    assert len(graphs) == 1


def test_a_symbolic_size_is_not_looked_up(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    symbol = env.create_symbol(5, ConstantSource("s"), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size: Any = env.create_symintnode(symbol, hint=5)
    monkeypatch.setattr(dispatch_times, "nearest", None)
    assert names(PLAIN._replace(steps=size)) == names(PLAIN._replace(batch=size)) == [
        *("cuda", "triton", "cpu", "torch", "reference")
    ]  # fmt: skip
    assert not env.guards


def test_explain_shows_the_row_that_decided(table: None) -> None:
    found = rnnkit.explain(rnnkit.GRU(64, 64), torch.randn(1, 1, 64))
    assert "in the order measured at B=1 T=1 I=64 H=64 on x: torch 1 ms, cpu 2 ms, reference 4 ms" in str(found)
    assert found.to_dict()["layers"][0]["measured"].startswith("B=1 T=1")
    assert found.to_dict()["layers"][0]["backend"] == "torch"
    assert "nothing is recorded" in str(rnnkit.explain(rnnkit.LSTM(64, 64), torch.randn(1, 1, 64)))
    named = str(rnnkit.explain(rnnkit.GRU(64, 64, backend="torch"), torch.randn(1, 1, 64)))
    assert "measured at" not in named


def test_every_problem_gets_every_backend() -> None:
    for cell, train in itertools.product(rnnkit.cells.CELLS, (False, True)):
        order = preference(PLAIN._replace(cell=cell, train=train))
        assert sorted(b.name for b in order) == sorted(BY_NAME)


@pytest.mark.parametrize("native", [True, False])
def test_times_of_onednns_lstm_hold_only_where_onednn_runs_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX-512 torch's LSTM in bfloat16 is a chain of small operators, and so is every float16 and float64 one:
    a row on which oneDNN beat the engine in float32 says nothing of them."""
    monkeypatch.setattr(select, "_onednn_has_bfloat16", lambda: native)
    fast = [(kind, row) for kind, rows in dispatch_times.ROWS.items() for row in rows if kind[1] == "lstm"]
    (_, _, train), row = next(
        v for v in fast if v[0][0] == "cpu" and dispatch_times.fastest_first(v[1].ms)[0] == "torch"
    )
    spec = PLAIN._replace(
        cell="lstm",
        train=train,
        batch=row.batch,
        steps=row.steps,
        input_size=row.input_size,
        hidden_size=row.hidden_size,
    )

    def first(dtype: torch.dtype) -> str:
        return preference(spec._replace(dtype=dtype))[2].name  # behind the two for GPUs

    assert first(torch.float32) == "torch" and select.recorded(spec) == row
    assert first(torch.bfloat16) == ("torch" if native else "cpu")
    assert first(torch.float16) == first(torch.float64) == "cpu"
    assert select.recorded(spec._replace(dtype=torch.float64)) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert first(torch.float32) == "cpu"
