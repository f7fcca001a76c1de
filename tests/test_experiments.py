"""What the experiments must show, with margins and from several seeds; what they write; what they say to bad input."""

from __future__ import annotations

import builtins
import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnkit.__main__ import main
from rnnkit.diagnostics import Adding
from rnnkit.experiments import EXPERIMENTS, common, gates, gradient_flow, gru_vs_lstm, memory, models

SEEDS = (0, 1, 2)


# The claims.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cell", ["RNN tanh", "RNN relu"])
def test_a_vanilla_rnns_gradient_vanishes_at_a_small_scale(cell: str, seed: int) -> None:
    flow = gradient_flow.measure(cell, gradient_flow.SCALES["small"], 32, seed)
    assert gradient_flow.orders(flow) < -20 and flow.decay["l0"] < 0.7
    logs = flow.norms["l0"].log10()
    straight = torch.linspace(float(logs[0]), float(logs[-1]), len(logs), dtype=logs.dtype)
    assert float((logs - straight).abs().max()) < 0.15 * float(logs[-1] - logs[0]), (
        "exponentially: a line in logarithms"
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_relu_rnns_gradient_explodes_at_a_large_scale(seed: int) -> None:
    flow = gradient_flow.measure("RNN relu", gradient_flow.SCALES["large"], 32, seed)
    assert gradient_flow.orders(flow) > 5 and flow.decay["l0"] > 1.1


@pytest.mark.parametrize("seed", SEEDS)
def test_an_lstm_keeps_its_gradient_where_the_rnn_has_lost_ten_orders(seed: int) -> None:
    small = gradient_flow.SCALES["small"]
    assert abs(gradient_flow.orders(gradient_flow.measure("LSTM", small, 32, seed))) < 2
    assert gradient_flow.orders(gradient_flow.measure("RNN tanh", small, 32, seed)) < -10


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_gated_cells_solve_the_adding_problem_where_the_tanh_rnn_does_not(seed: int) -> None:
    errors = {cell: memory.train(cell, 100, 1500, seed)[0] for cell in memory.CELLS}
    assert errors["LSTM"] < memory.TENTH and errors["GRU"] < memory.TENTH, errors
    assert errors["RNN tanh"] > 3 * memory.TENTH, errors


# Every experiment, as a user runs it.


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "memory"])
def test_a_quick_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "models":
        pytest.importorskip("statsmodels", reason="the sunspots come with statsmodels: pip install rnnkit[data]")
    assert main(["experiments", name, "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    sentences = (tmp_path / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert len(sentences) == 3 and all(f"  {sentence}" in said.out for sentence in sentences)
    assert "nan" not in " ".join(sentences) and f"{name}" in said.err
    assert len(rows_of(tmp_path / f"{name}.csv")) > 2
    check = CHECKS.get(name)
    if check is not None:
        check(rows_of(tmp_path / f"{name}.csv"))


def check_gates(rows: list[dict[str, str]]) -> None:
    changed = [float(row["changed_by_reset"]) for row in rows if row["changed_by_reset"]]
    assert changed[: gates.CUT] == [0.0] * gates.CUT and changed[gates.CUT] > 0.1, "a reset acts from its step on"
    assert changed[-1] < changed[gates.CUT]
    assert all(0 < float(row[gate]) < 1 for row in rows for gate in ("forget", "input", "output"))


def check_cells(rows: list[dict[str, str]]) -> None:
    lstm, equal, same = (int(row["layer_parameters"]) for row in rows)
    assert equal / lstm == pytest.approx(0.75) and same / lstm == pytest.approx(1, abs=0.02)
    bits = [float(row["held_out_bits"]) for row in rows]
    assert max(bits) < 4.5 and max(bits) - min(bits) < 0.6


def check_models(rows: list[dict[str, str]]) -> None:
    nats = {(row["data"], row["model"]): float(row["nats"]) for row in rows if row["nats"]}
    base = {row["data"]: float(row["baseline"]) for row in rows if row["baseline"]}
    for name in ("order 9", "latent GRU"):
        assert nats["sunspots", name] > base["sunspots"]
    assert nats["sunspots", "order 9"] > nats["sunspots", "Markov"] + 0.1
    assert all(nats["text", name] > base["text"] + 0.5 for name in ("naive", "Markov", "order 3", "latent GRU"))
    assert nats["text", "order 3"] > nats["text", "Markov"]
    grows = [int(row["parameters"]) for row in rows if row["model"] == "naive" and row["parameters"]]
    assert grows == sorted(set(grows)) and len(grows) == models.YEARS


CHECKS: dict[str, Any] = {"gates": check_gates, "gru-vs-lstm": check_cells, "models": check_models}


def test_sentences_follow_the_numbers() -> None:
    """Made-up rows give other words: nothing in them is fixed."""

    def row(cell: str, steps: int, error: float) -> dict[str, Any]:
        return {"cell": cell, "T": steps, "error": error, "solved": 0.5, "budget": 7, "baseline": Adding.baseline()}

    usual = memory.sentences([row("RNN tanh", 50, 0.17), row("LSTM", 50, 0.001), row("GRU", 50, 0.001)])
    assert "LSTM and GRU came below" in usual[0] and "RNN tanh did not" in usual[0] and "RNN tanh none" in usual[1]
    other = memory.sentences([row("RNN tanh", 9, 0.001), row("LSTM", 9, 0.2), row("GRU", 9, 0.3)])
    assert "RNN tanh came below" in other[0] and "LSTM and GRU did not" in other[0] and "RNN tanh 9" in other[1]
    none = memory.sentences([row(cell, 9, 0.2) for cell in memory.CELLS])
    assert "no cell came below" in none[0]


def test_equal_parameters() -> None:
    assert gru_vs_lstm.width_of_gru(96) in range(108, 116)


# Bad input.


def test_unknown_experiments_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiments", "memroy"]) == 2
    said = capsys.readouterr().err
    assert "there is no experiment memroy; there are gradient-flow, memory, gates, gru-vs-lstm, models" in said
    file = tmp_path / "file"
    file.write_text("")
    assert main(["experiments", "gradient-flow", "--out", str(file / "below")]) == 2
    assert str(file) in capsys.readouterr().err


def test_without_statsmodels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("statsmodels"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["experiments", "models", "--quick", "--out", str(tmp_path)]) == 2
    assert "pip install rnnkit[data]" in capsys.readouterr().err
    with pytest.raises(common.MissingPackage):
        models.sunspots()
