"""The benchmark as an instrument: filters, the accuracy check, Ctrl-C, targets on made-up rows, memory, the roofline.

Nothing here says how fast anything is: where a job runs, it runs for a moment, and on a machine that is made up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_rows import SHAPE, Made
from support import stoppable
from torch import nn

import rnnkit
from rnnkit.__main__ import main
from rnnkit.backends import BY_NAME
from rnnkit.benchmarks.speed import bench_cases, implementations, measure, roofline, rows, run, timing
from rnnkit.benchmarks.speed.accuracy import AccuracyCheck
from rnnkit.benchmarks.speed.bench_cases import BenchCase, BenchJob, select

HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


# What is measured.


def test_the_grid_is_the_one_that_releases_are_judged_by() -> None:
    grid = [case.name for case in bench_cases.TABLE if case.group == "grid"]
    judged = (
        "1x1x64x64 1x128x64x64 1x128x256x256 1x128x512x512 1x1024x40x128 4x100x128x128 8x64x256x256 16x128x128x128 "
        "32x100x256x256 64x50x512x512 16x64x768x768 128x64x64x256 256x32x32x512 64x24x8x16 512x10x4x32 7x33x19x45 "
        "16x100x128x128x2b 1x1x64x64x3 16x1x64x64x2 1x10x64x64x1b 4x20x64x64x2b"
    )
    assert grid == judged.split()
    stacks = {(c.batch, c.steps, c.layers, c.directions) for c in bench_cases.TABLE if c.group == "stacks"}
    assert stacks == set(itertools.product((1, 4, 16), (1, 10), (1, 2, 3), (1, 2)))
    for device in ("cpu", "cuda"):
        here = [(case.group, case.name) for case in bench_cases.TABLE if device in case.devices]
        assert len(set(here)) == len(here)


def test_filters() -> None:
    (job,) = select("cpu", [SHAPE], ["gru"], ["inference"])
    assert (job.case.batch, job.case.steps, job.case.inputs, job.case.hidden) == (7, 33, 19, 45)
    assert job.cell == "GRU" and not job.train
    assert {j.case.group for j in select("cpu", ["step", "RESETS".lower()])} == {"step", "resets"}
    assert {j.case.group for j in select("cpu", ["16x128x128x128"])} == {"grid", "resets", "lengths"}
    assert {j.mode for j in select("cpu", [], [], ["training"])} == {"training"}
    assert select("cpu", [SHAPE], ["gru", "GRU"], dtypes=["float32"] * 2) == select("cpu", [SHAPE], ["gru"])
    assert {j.cell for j in select("cpu", [], ["LSTM", "rnn"])} == {"LSTM", "RNN"}
    assert 0 < len(select("cpu", quick=True)) < len(select("cpu")) / 4
    only_cuda = {j.case for j in select("cuda")} - {j.case for j in select("cpu")}
    assert any(case.steps == 1024 and case.hidden == 768 for case in only_cuda), "FlashRNN's"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--case", "grid/7x33x19x46"], ["'grid/7x33x19x46'", "grid, stacks", "7x33x19x45"]),
        (
            ["--case", "grid,nonsense"],
            ["'nonsense'", "grid, stacks, field, sweep, scan, step, resets, lengths", "as grid/1x1x64x64"],
        ),
        (["--cell", "lstmcell"], ["'lstmcell'", "RNN, LSTM, GRU"]),
        (["--mode", "eval"], ["'eval'", "inference, training"]),
        (["--backend", "cpu,mkl"], ["'mkl'", "auto, cuda, triton, cpu, torch, reference"]),
        (["--threads", "two"], ["'two'", "at least 1"]),
        (["--threads", "0"], ["'0'", "at least 1"]),
        (["--case", "step", "--mode", "training"], ["no case in common"]),
        (["--module", "nowhere:Thing"], ["nowhere:Thing", "my.package:Class"]),
        (["--module", "torch.nn:Linear"], ["torch.nn:Linear", "my.package:Class"]),
        (["--case", SHAPE, "--cell", "lstm", "--module", "torch.nn:GRU"], ["torch.nn:GRU", "gates"]),
        (["--out", __file__], ["is not a folder"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_what_does_not_exist_is_refused(
    options: list[str], named: list[str], capsys: pytest.CaptureFixture[str], bench: Callable[..., int], tmp_path: Path
) -> None:
    assert bench(*options) == 2
    said = capsys.readouterr()
    assert said.err.startswith("rnnkit bench: ") and said.err.count("\n") == 1 and not said.out
    for words in named:
        assert words in said.err
    assert len(said.err) < 300, "a line, not the table"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--seconds", "0"], ["--seconds", "x"], ["--device", "tpu"]], ids=" ".join)
def test_bad_values(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *options])
    assert stop.value.code == 2 and "error: argument" in capsys.readouterr().err


@HERE
def test_no_device_is_3(bench: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench("--device", "cuda") == 3
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


@HERE
def test_a_backend_of_another_device_says_so_at_once(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench("--quick", "--backend", "CUDA") == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and not list(tmp_path.iterdir())
    assert said.err.startswith("rnnkit bench: backend 'cuda' has nothing to do on cpu: runs on the device cuda")


def test_a_backend_that_cannot_says_why(bench: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--case", "resets/64x64x32x128", "--cell", "rnn", "--mode", "inference", "--backend", "torch") == 2
    said = capsys.readouterr()
    assert "do not know reset" in said.out and "nothing could be measured" in said.err


# A run.


def test_a_run(bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--case", f"{SHAPE},step", "--cell", "gru", "--backend", "auto,reference", "--json") == 0
    said = capsys.readouterr()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    result = json.loads(said.out, parse_constant=refuse)
    kept = rows.read(tmp_path / "rows.csv")
    assert len(kept) == len(result["rows"]) and not result["wrong"] and not result["interrupted"]
    assert {(r.group, r.mode) for r in kept} == {("grid", "inference"), ("grid", "training"), ("step", "inference")}
    assert {r.implementation for r in kept} == {"auto", "reference"} and "torch.nn" in {r.against for r in kept}
    for found in kept:
        assert 0 < found.ratio_p20 <= found.ratio_p50 <= found.ratio_p80 and found.ms > 0 and found.share > 0
        assert found.ran == "reference" if found.implementation == "reference" else found.ran in BY_NAME
        assert found.torch == torch.__version__ and found.threads == 1 and found.commit and found.processor
    trained = [r for r in kept if r.mode == "training" and r.against == "torch.nn"]
    weights = sum(p.numel() for p in nn.GRU(19, 45).parameters()) * 4 / 2**20
    assert all(r.peak_mib and r.peak_mib > weights for r in trained), "a training step has room for the gradients"
    asked = {r.implementation for r in kept if r.recompute_mib}
    assert asked == {"auto"} and all(r.mode == "training" for r in kept if r.recompute_mib), "of what a target speaks"
    text = (tmp_path / "report.md").read_text()
    assert "## Targets" in text and "7x33x19x45" in text and timing.MEMORY["cpu"] in text
    assert "job 3/3" in said.err and "0 s left" in said.err


def test_every_row_is_held_against_the_best_look_at_the_machine(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "LOOK", 1)
    monkeypatch.setattr(Made, "measure", lambda self, _: setattr(self, "peak", self.peak * 2))
    assert bench("--case", SHAPE, "--cell", "gru", "--backend", "reference") == 0
    found = rows.read(tmp_path / "rows.csv")
    assert {r.peak_gflops for r in found} == {800.0} and {r.mode for r in found} == set(bench_cases.MODES)
    assert all(r.share == pytest.approx(r.limit_ms / r.ms, rel=2e-3) for r in found)


def test_a_module_of_ones_own(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_module.py").write_text("from torch import nn\n\n\nclass Own(nn.LSTM):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    job = ["--case", SHAPE, "--mode", "inference", "--backend", "reference", "--module", "own_module:Own"]
    assert bench(*job) == 0
    found = [r for r in rows.read(tmp_path / "rows.csv") if r.implementation == "own_module:Own"]
    assert {r.cell for r in found} == {"LSTM"} and {r.ran for r in found} == {""}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def forward(self, x):\n        raise ZeroDivisionError('by hand')", "ZeroDivisionError: by hand"),
        (
            "def __init__(self, *a, **k):\n        super().__init__(*a, bias=False, **k)",
            "RuntimeError: Error(s) in load",
        ),
    ],
    ids=["forward", "weights"],
)
def test_a_module_that_fails_costs_its_own_rows(
    body: str, said: str, bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "failing.py").write_text(f"from torch import nn\n\n\nclass Own(nn.LSTM):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    importlib.invalidate_caches()
    job = ["--case", SHAPE, "--mode", "inference", "--backend", "reference", "--module", "failing:Own"]
    assert bench(*job) == 1
    assert f"LSTM inference: failing:Own FAILED, it raised {said}" in capsys.readouterr().out
    assert {r.cell for r in rows.read(tmp_path / "rows.csv")} == set(bench_cases.CELLS)
    assert "failing:Own FAILED" in (tmp_path / "report.md").read_text()


def test_what_ends_the_run_leaves_a_report(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = implementations.setup

    def broken(job: BenchJob, *rest: Any) -> implementations.Setup:
        if job.cell == "GRU":
            raise RuntimeError("nobody thought of it")
        return setup(job, *rest)

    monkeypatch.setattr(implementations, "setup", broken)
    with pytest.raises(RuntimeError, match="nobody thought"):
        bench("--case", SHAPE, "--mode", "inference", "--backend", "reference")
    text = (tmp_path / "report.md").read_text()
    assert "LSTM" in text and "ended early, by RuntimeError: nobody thought of it" in text


def test_without_matplotlib(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "rnnkit.benchmarks.speed.plots", raising=False)
    assert bench("--case", SHAPE, "--cell", "rnn", "--mode", "inference", "--backend", "auto") == 0
    assert "pip install rnnkit[plots]" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "rows.csv"]


class WrongOutput(rnnkit.GRU):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, h = super().forward(*args, **kwargs)
        return y * 1.0001, h


class WrongState(rnnkit.GRU):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, h = super().forward(*args, **kwargs)
        return y, h * 1.0001


class WrongGradient(rnnkit.GRU):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, h = super().forward(*args, **kwargs)
        bias = self.bias_hh_l0
        return y + 1e-4 * (bias - bias.detach()).sum(), h


class NotANumber(rnnkit.GRU):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, h = super().forward(*args, **kwargs)
        return torch.where(y == y.flatten()[3], math.nan, y), h


@pytest.mark.parametrize(
    ("wrong", "modes"),
    [(WrongOutput, 2), (WrongState, 2), (WrongGradient, 1), (NotANumber, 2)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_what_is_wrong_is_not_timed(
    wrong: type, modes: int, bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(rnnkit, "GRU", wrong)
    timed: list[int] = []

    def alternate(works: list[timing.Work], *_: object) -> list[list[float]]:
        timed.append(len(works))
        return [[1.0, 1.0] for _ in works]

    monkeypatch.setattr(timing, "alternate", alternate)
    assert bench("--case", SHAPE, "--cell", "gru", "--backend", "auto,reference") == 1
    assert len(timed) == 2 - modes
    assert capsys.readouterr().out.count("is WRONG") == 2 * modes
    kept = rows.read(tmp_path / "rows.csv") if (tmp_path / "rows.csv").exists() else []
    assert {r.mode for r in kept} == ({"inference"} if modes == 1 else set())


def test_missed_targets_fail_only_where_asked(bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    job = ["--case", SHAPE, "--cell", "gru", "--mode", "training", "--backend", "auto"]
    for ours, code in ((0.5, 0), (2.0, 1)):  # a shape alone meets nothing, and below the worst allowed it misses
        monkeypatch.setattr(timing, "alternate", lambda works, *_, s=ours: [[s] * 2, *([[1.0] * 2] * (len(works) - 1))])
        assert bench(*job) == 0 and bench(*job, "--targets") == code


def test_ctrl_c_keeps_the_finished_rows(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = itertools.count(1)

    def alternate(works: list[timing.Work], *_: object) -> list[list[float]]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return [[1.0, 1.0] for _ in works]

    monkeypatch.setattr(timing, "alternate", alternate)
    handler = signal.getsignal(signal.SIGINT)
    assert bench("--case", SHAPE, "--mode", "training", "--backend", "reference") == 130
    assert [r.cell for r in rows.read(tmp_path / "rows.csv")] == ["RNN", "LSTM"]
    assert "stopped by Ctrl-C after 2 rows" in capsys.readouterr().out
    assert "LSTM" in (tmp_path / "report.md").read_text()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent to a process")
def test_ctrl_c_from_outside(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rnnkit", "bench", "--case", "grid", "--backend", "auto", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = stoppable(command, environment)
    end = time.monotonic() + 120
    while process.poll() is None and not (tmp_path / "rows.csv").exists() and time.monotonic() < end:
        time.sleep(0.01)
    out = err = ""
    for _ in range(4):  # a signal that meets a destructor is lost, as Python says of such exceptions
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=30)
            break
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopped by Ctrl-C" in out and rows.read(tmp_path / "rows.csv")


# The accuracy check and the peers.


@pytest.mark.parametrize("cell", bench_cases.CELLS)
@pytest.mark.parametrize("train", [False, True])
def test_torchs_two_ways_with_resets_agree(cell: str, train: bool) -> None:
    job = BenchJob(BenchCase("resets", 5, 13, 3, 4, resets=0.3), cell, "training" if train else "inference")
    made = implementations.setup(job, "cpu", 1, ("reference",), False, None)
    split, loop = made.peers
    x = made.x.double()
    truth, other = split.double().numbers(x, train), loop.double().numbers(x, train)
    plain = implementations.Implementation("plain", split.double().module, implementations._plain).numbers(x, train)
    assert len(truth) == len(other) == (3 if cell == "LSTM" else 2) + (5 if train else 0)
    for a, b in zip(truth, other):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(truth[0], plain[0]), "nothing was reset"
    assert AccuracyCheck(job, made).error_ratio(made.ours[0]) <= 1


@pytest.mark.parametrize("cell", bench_cases.CELLS)
def test_packing_is_the_truth_for_lengths(cell: str) -> None:
    job = BenchJob(BenchCase("lengths", 6, 9, 3, 4), cell, "training")
    made = implementations.setup(job, "cpu", 1, ("reference",), False, None)
    check = AccuracyCheck(job, made)
    assert check.error_ratio(made.ours[0]) <= 1
    assert check.error_ratio(made.plain_run["reference"]) > 1, "the same without lengths is another problem"


def test_torch_is_no_other_work_for_its_own_rounding() -> None:
    """Over many steps in a narrow dtype it leaves the band of the others, and stays what rnnkit is held to."""
    job = BenchJob(BenchCase("grid", 3, 4, 5, 6), "GRU", "training")
    made = implementations.setup(job, "cpu", 1, (), False, None)
    check = AccuracyCheck(job, made)
    check.wide = [1e-30] * len(check.wide)
    assert not list(measure._drop_peers(made, check)) and made.peers == [made.baseline]
    made.baseline.run = lambda m, x: tuple(v * float("nan") for v in implementations._plain(m, x))
    (said,) = measure._drop_peers(made, check)
    assert "computes something else" in said and not made.peers


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_of_another_pool_come_to_rest_before_a_reading(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    calls = {"unread": 0, "read": 0}
    kind = "unread"

    def block(work: timing.Work, repeats: int, _: str) -> float:
        nonlocal kind
        kind = "read"
        work()
        kind = "unread"
        return 1.0

    def work() -> None:
        calls[kind] += 1

    monkeypatch.setattr(timing, "block", block)
    timing.alternate([work, work], "cpu", 1e-4)
    assert calls["unread"] == 2 if threads == 1 else calls["unread"] > 2 + calls["read"]


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="pip install rnnkit[onnx]")
def test_onnxruntimes_threads_stop_with_its_call() -> None:
    made = implementations.setup(
        BenchJob(BenchCase("grid", 2, 3, 4, 5), "GRU", "inference"), "cpu", 2, ("reference",), False, None
    )
    (ort,) = [peer for peer in made.peers if peer.name == implementations.ORT]
    assert ort.module.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


def test_memory_is_exact() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(2**18)  # 1 MiB
        second = first + 1
        del first
        return second[:1].clone()

    assert timing.peak_mib(work, "cpu") == pytest.approx(2, abs=0.01)


def test_the_limit_of_a_row() -> None:
    inference, training = (BenchJob(BenchCase("grid", 2, 10, 32, 64), "GRU", mode) for mode in bench_cases.MODES)
    project, step, reading = 2 * 10 * 2 * 3 * 64 * 32 / 1e11, 2 * 2 * 3 * 64 * 64 / 1e11, 4 * 3 * 64 * 64 / 5e10
    assert reading > step
    forward = project + 10 * (reading + 2 * 64 * 3 * 2e-10) + 5e-6
    backward = 2 * project + 10 * (reading + step) + 3e-5
    made: Any = Made()
    assert roofline.roofline_seconds(made, inference, "cpu", 1) == pytest.approx(forward)
    assert roofline.roofline_seconds(made, training, "cpu", 1) == pytest.approx(forward + backward)
    assert roofline.roofline_seconds(made, inference, "cpu", 2) == pytest.approx((forward - 5e-6) / 2 + 5e-6)
    scan = BenchJob(BenchCase("scan", 2, 10, 1, 64), "GRU", "inference")
    assert roofline.roofline_seconds(made, scan, "cpu", 1) == pytest.approx(10 * reading)
    ragged = BenchJob(BenchCase("lengths", 2, 9, 32, 64), "GRU", "inference")
    assert ragged.flops == 2 * 5 * 2 * 3 * 64 * (32 + 64), "of 9 steps 5 on average"
    one, stack = (BenchJob(BenchCase("stacks", 1, 1, 64, 64, layers=n), "GRU", "training") for n in (1, 3))
    call = 3.5e-5
    times = [roofline.roofline_seconds(made, job, "cpu", 1) - call for job in (one, stack)]
    assert times[1] == pytest.approx(3 * times[0]), "a stack is one call"
    deep = BenchJob(BenchCase("grid", 16, 100, 128, 128, layers=2, directions=2), "RNN", "inference")
    assert deep.flops == 2 * 100 * 16 * 128 * 2 * (128 + 128 + 256 + 128)


def test_every_option_has_words() -> None:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    assert all(action.help for action in parser._actions)
    assert {field.name for field in dataclasses.fields(rows.BenchRow)} == set(rows.TYPES)
