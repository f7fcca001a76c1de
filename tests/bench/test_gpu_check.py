"""`gpu-check` where there is no GPU: what it says then, all its parts on a make-believe one, and that parity can fail.

A fused backend is the reference in the place of `triton`, as it is or with a fault planted in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import CALLS, Fused, pretend, put

from rnnkit.__main__ import main
from rnnkit.backends import BY_NAME, LayerInputs, LayerOutputs
from rnnkit.backends.cpu import extension
from rnnkit.benchmarks.gpu_check import main as gpu_check
from rnnkit.benchmarks.gpu_check import parity, parity_cases, probes, sanitizer, worker_pool
from rnnkit.benchmarks.speed import rows, run
from rnnkit.benchmarks.speed.bench_cases import BenchCase, BenchJob

ROOT = Path(__file__).resolve().parents[2]
SMALL = parity_cases.Variant((4, 3, 2, 5), lengths=True, resets=True, reset_state=True)
F32 = torch.float32
NAMES = ("triton", "cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A make-believe GPU, and little to do on it."""
    pretend(monkeypatch)
    real, switches = parity.examine, (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    few = [parity_cases.ParityCase(kind, SMALL, F32) for kind in ("lstm", "gru")]
    cases = [BenchCase("field", 3, 4, 5, 6), BenchCase("resets", 3, 4, 5, 6, resets=0.2), BenchCase("grid", 3, 4, 5, 6)]
    jobs = [BenchJob(case, "GRU", "training", dtype) for dtype in ("float32", "bfloat16") for case in reversed(cases)]
    monkeypatch.setattr(parity, "examine", lambda findings, _, *rest: real(findings, "cpu", *rest))
    monkeypatch.setattr(parity_cases, "select", lambda *asked: few)
    monkeypatch.setattr(gpu_check, "select", lambda device, dtypes: jobs)
    yield
    for switch, allowed in zip(switches, before):
        switch.allow_tf32 = allowed


def check(out: Path, *options: str) -> int:
    return main(["gpu-check", "--out", str(out), "--seconds", "0.001", *options])


def test_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check(tmp_path / "out") == 3
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    for part in ("rnnkit gpu-check: ", "finds no CUDA device", "Needed: a GPU with its driver, and a torch >= 2.11"):
        assert part in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--backend", "mkl"], "'mkl'"), (["--out", __file__], "is not a folder"), (["--dtype", "int8"], "'int8'")],
)
@pytest.mark.parametrize("device", [True, False])
def test_bad_input(cuda: None, tmp_path: Path, options: list[str], named: str, capsys: pytest.CaptureFixture[str],
                   monkeypatch: pytest.MonkeyPatch, device: bool) -> None:  # fmt: skip
    """Before a device is asked for."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    assert check(tmp_path, *options) == 2
    assert named in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_all_parts(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, Fused())
    assert check(tmp_path) == 0
    said = capsys.readouterr().out
    found = rows.read(tmp_path / "rows.csv")
    first = [(r.dtype, r.group) for r in found]
    assert list(dict.fromkeys(first)) == [
        ("bfloat16", "field"), ("bfloat16", "resets"), ("bfloat16", "grid"),
        ("float32", "grid"), ("float32", "resets"), ("float32", "field"),
    ]  # fmt: skip
    assert {r.implementation for r in found} >= {"auto", "triton", "reference"}
    assert {r.launch for r in found} == {"call", "graph"} and {r.tf32 for r in found} == {"cudnn off, matmul off"}
    assert {r.processor for r in found} == {"NVIDIA Abacus"} and "capture" in CALLS
    parts = [
        "device     NVIDIA Abacus, capability 9.9",
        "driver     ",
        f"torch      {torch.__version__}",
        "triton     ",
    ]
    parts += [
        "parity: ",
        "triton     float32      2 problems, at most ",
        "cuda       left out of    2 problems: runs on the device cuda, got cpu",
        "devices    not examined: several GPUs in one process, since torch sees ",
    ]
    parts += ["benchmark", "targets", "triton by call: field, H <= 256, training, bfloat16, against torch.nn, 1 cases:"]
    parts += ["triton by graph: all, all, all, against a loop of torch operators, 6 cases", "against without, 1 cases:"]
    parts += [f"-      cuda: not judged, no target of it was measured: {BY_NAME['cuda'].available()}"]
    kept = (tmp_path / "gpu-check.txt").read_text()
    for part in parts:
        assert part in said and part in kept, part
    assert (tmp_path / "report.md").exists()
    heads = ("device ", "\nsanitizer: ", "\nparity: ", "\nprobes: ", "\nbenchmark\n", "\ntargets\n")
    places = [kept.index(head) for head in heads]
    assert places == sorted(places)
    assert (
        "sanitizer  left out: no kernel runs on this GPU" in kept and "\nleft out: no kernel runs on this GPU" in kept
    )


def test_kernels_that_are_not_built(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "cuda_missing", "the C++ extension is not built")
    assert check(tmp_path, "--backend", "cpu,cuda") == 0
    said = capsys.readouterr().out
    line = (
        "\nnot examined: backend cuda, whose kernels are not built (the C++ extension is not built). In a clone, where "
        "nvcc is, `make gpu-check` builds them first, or `RNNKIT_CUDA=1 RNNKIT_CUDA_ARCH=native python setup.py -q "
        "build_ext --inplace` does\n"
    )
    assert line in said and line in (tmp_path / "gpu-check.txt").read_text()
    assert said.index(line) < said.index("\nparity")
    monkeypatch.setattr(extension, "cuda_missing", "")
    assert gpu_check.unbuilt() is None
    monkeypatch.setattr(extension, "cuda_missing", "not built")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert gpu_check.unbuilt() is None, "nothing to build for AMD's"


@pytest.mark.long
def test_what_the_sanitizer_finds_is_not_timed(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def examine(findings: parity.Findings, seconds: float, out: Path) -> list[str]:
        asked.append(("sanitizer", seconds, out))
        findings.wrong.append("cuda: racecheck: a race")
        findings.culprits.add(("cuda", "gru", "bfloat16"))
        return ["racecheck  4 of 4 problems"]

    def probe(seconds: float, out: Path, record: bool) -> list[str]:
        asked.append(("probes", seconds, out, record))
        return ["clock 1.8 GHz"]

    monkeypatch.setattr(sanitizer, "examine", examine)
    monkeypatch.setattr(probes, "examine", probe)
    assert check(tmp_path, "--limit", "1000", "--backend", "reference,cuda") == 1
    said = capsys.readouterr().out
    for line in ("racecheck  4 of 4 problems", "WRONG cuda: racecheck: a race", "clock 1.8 GHz"):
        assert f"{line}\n" in said
    assert "not timed, since something is wrong: GRU in bfloat16 by cuda\n" in said
    shares = (gpu_check.WATCHED * 1000, gpu_check.PROBED * 1000)
    assert asked == [("sanitizer", shares[0], tmp_path), ("probes", shares[1], tmp_path, False)]
    asked.clear()
    assert check(tmp_path, "--backend", "reference") == 0 and asked == [], "of one backend alone"


@pytest.mark.long
def test_what_the_sanitizer_did_not_watch_is_not_right(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def examine(findings: parity.Findings, seconds: float, out: Path) -> list[str]:
        findings.unwatched += 1
        return ["NOT EXAMINED by racecheck"]

    monkeypatch.setattr(sanitizer, "examine", examine)
    assert check(tmp_path, "--backend", "cpu,cuda") == 1
    assert "NOT EXAMINED by racecheck\n" in (tmp_path / "gpu-check.txt").read_text()


def test_rows_go_into_the_clone(cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for module in (rows, run):
        monkeypatch.setattr(module, "RESULTS", results)
    monkeypatch.chdir(tmp_path)
    assert main(["gpu-check", "--seconds", "0.001", "--quick", "--backend", "reference,cpu"]) == 0
    recorded = rows.read(results / "cuda-nvidia-abacus.csv")
    assert {(r.group, r.dtype) for r in recorded} == {("field", "bfloat16")}, "quick: what the targets need"
    assert rows.read(tmp_path / "gpu-check-out" / "rows.csv") == recorded


def test_what_is_wrong_is_said_with_its_numbers_and_not_timed(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong in one precision is timed in another."""
    put(monkeypatch, Fused(after=lambda v: v._replace(y=v.y * 1.01) if v.y.dtype == F32 else v))
    assert check(tmp_path) == 1
    said = capsys.readouterr().out
    found = re.search(
        r"WRONG triton: y is off by (\S+), allowed (\S+), in lstm in float32 \(T 4, B 3, I 2, H 5, len", said
    )
    assert found is not None and float(found[1]) > 100 * float(found[2]) > 0
    (line,) = [line for line in said.splitlines() if line.startswith("not timed")]
    assert line == "not timed, since something is wrong: GRU in float32 by auto, triton"
    timed = {(r.implementation, r.dtype) for r in rows.read(tmp_path / "rows.csv")}
    assert {name for name, dtype in timed if dtype == "bfloat16"} >= {"auto", "triton", "reference", "torch"}
    assert {name for name, dtype in timed if dtype == "float32"} >= {"reference", "torch"}
    assert not timed & {("auto", "float32"), ("triton", "float32")}


def last_step(v: LayerOutputs) -> LayerOutputs:
    return v._replace(h_n=v.y[-1])


def unwritten(v: LayerOutputs) -> LayerOutputs:
    y = torch.empty_like(v.y)
    y[:, :-1] = v.y[:, :-1]
    return v._replace(y=y)


def no_weight_gradient(v: list[Any]) -> list[Any]:
    return [None if k == 4 and g is None else g * 1.0001 if k == 4 else g for k, g in enumerate(v)]


FAULTS = {
    "the last step for the last state": Fused(after=last_step),
    "memory that nobody wrote": Fused(after=unwritten),
    "a weight's gradient": Fused(gradients=no_weight_gradient),
    "no resets": Fused(before=lambda t: t._replace(reset=None, h_reset=None, c_reset=None)),
    "zeros for the state at a reset": Fused(before=lambda t: t._replace(h_reset=None, c_reset=None)),
    "no lengths": Fused(before=lambda t: t._replace(lengths=None)),
    "one step too many": Fused(before=lambda t: t._replace(lengths=None if t.lengths is None else t.lengths + 1)),
    "forward for reverse": Fused(options=lambda o: o._replace(reverse=False)),
    "a state that is left out": Fused(before=lambda t: t._replace(h_0=torch.zeros_like(t.h_0))),
    "sums in bfloat16": Fused(before=lambda t: t.cast(torch.bfloat16).cast(t.x.dtype)),
    "another dtype": Fused(after=lambda v: v._replace(y=v.y.double())),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, FAULTS[fault])
    findings = parity.Findings()
    every = [parity_cases.ParityCase(kind, replace(SMALL, both=True), F32) for kind in ("rnn_tanh", "gru_reset_before")]
    parity.examine(findings, "cpu", every, NAMES)
    assert findings.culprits == {("triton", case.kind, "float32") for case in every}
    assert all("triton: " in line for line in findings.wrong)
    assert any("rnn_tanh" in line for line in findings.wrong) and any("gru_res" in line for line in findings.wrong)


def test_the_problems_hold_on_this_machine() -> None:
    """What a GPU will be asked, asked of the CPU; a way to call torch that is wrong would be met here first."""
    whole, quick = parity_cases.select(), parity_cases.select(quick=True)
    for some in (whole, quick):
        assert {p.kind for p in some} == set(parity_cases.KINDS)
    assert {p.dtype for p in whole} == set(parity_cases.DTYPES)
    assert set(quick) < set(whole) and len(quick) < len(whole) / 5
    every = [p for p in whole if (p.dtype == F32 or p in quick) and not p.fused]
    findings, told = parity.Findings(), []
    parity.examine(findings, "cpu", every, tell=lambda done, what: told.append(done))
    assert findings.wrong == [] and told == list(range(1, len(every) + 1))
    assert sum(count for (name, _), count in findings.ran.items() if name == "reference") == len(every)
    assert "triton" in findings.skipped and max(share for share, _ in findings.worst.values()) <= 1


def test_what_a_backend_raises_is_a_failure(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: LayerInputs) -> LayerInputs:
        raise RuntimeError("launch failed: lstm_forward, 32 x 4\nand more")

    put(monkeypatch, Fused(before=refuse))
    assert check(tmp_path) == 1
    said = capsys.readouterr().out
    assert "WRONG triton: raised RuntimeError: launch failed: lstm_forward, 32 x 4, in lstm in float32 (T 4" in said
    assert "and more" not in said
    capsys.readouterr()
    bench = ["bench", "--device", "cuda", "--seconds", "0.001", "--out", str(tmp_path), "--case", "grid/7x33x19x45"]
    assert main([*bench, "--cell", "gru", "--mode", "training", "--backend", "triton,torch"]) == 1
    said = capsys.readouterr().out
    assert "grid 7x33x19x45 GRU training: triton FAILED, it raised RuntimeError: launch failed: lstm_forward" in said
    assert {r.implementation for r in rows.read(tmp_path / "rows.csv")} == {"torch"}


@pytest.mark.long
def test_a_device_with_too_little_memory_does_the_rest(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = run.Bench._job

    def large(self: run.Bench, job: BenchJob, *rest: Any) -> Any:
        if job.case.group == "field":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")
        return real(self, job, *rest)

    monkeypatch.setattr(run.Bench, "_job", large)
    assert check(tmp_path) == 0
    assert "field 3x4x5x6 GRU training: left out for want of memory: OutOfMemoryError: CUDA" in capsys.readouterr().out
    assert {r.group for r in rows.read(tmp_path / "rows.csv")} == {"resets", "grid"}


def test_a_device_that_fails_ends_it(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(parity, "by_pieces", broken)
    assert check(tmp_path / "torch alone") == 1
    said = capsys.readouterr().out
    assert "NOT EXAMINED, since torch itself fails: lstm in float32 (T 4" in said and "illegal memory" in said
    assert (tmp_path / "torch alone" / "rows.csv").exists(), "the device still runs"
    monkeypatch.setattr(parity, "works", lambda device: False)
    assert check(tmp_path) == 1
    said = capsys.readouterr().out
    assert "WRONG torch fails, and the examination ends, in lstm in float32" in said and "illegal memory" in said
    assert "the device failed: nothing is timed" in said and not (tmp_path / "rows.csv").exists()


def test_another_backend_than_the_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Fused())
    BY_NAME["triton"].name = "reference"  # type: ignore[misc]
    findings = parity.Findings()
    parity.examine(findings, "cpu", [parity_cases.ParityCase("gru", SMALL, F32)], ("triton",))
    assert any("was named, and reference ran" in line for line in findings.wrong)


def test_ctrl_c_keeps_what_there_is(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, done = run.Bench._job, []

    def stop(self: run.Bench, job: BenchJob, *rest: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(job)
        return real(self, job, *rest)

    monkeypatch.setattr(run.Bench, "_job", stop)
    assert check(tmp_path) == 130
    assert {r.group for r in rows.read(tmp_path / "rows.csv")} == {"field"}
    assert "targets" in (tmp_path / "gpu-check.txt").read_text()

    def early(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "by_pieces", early)
    assert check(tmp_path / "early") == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().out
    assert (tmp_path / "early" / "gpu-check.txt").exists()


def test_parity_goes_to_several_processes(cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def work(findings: parity.Findings, device: str, every: list[Any], *rest: Any) -> None:
        asked.append((device, len(every), rest[0], *rest[2:]))
        findings.left = 1

    monkeypatch.setattr(worker_pool, "work", work)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert check(tmp_path, "--backend", "reference", "--limit", "100", "--workers", "3") == 1
    assert check(tmp_path, "--backend", "reference", "--limit", "100", "--quick") == 0, "two problems are for one"
    few = parity_cases.select() * 4
    monkeypatch.setattr(parity_cases, "select", lambda *asked: few)
    assert check(tmp_path, "--backend", "reference", "--limit", "100", "--quick") == 1
    seconds = gpu_check.SHARE * 100
    assert asked == [("cuda", 2, ("reference",), seconds, 3), ("cuda", 8, ("reference",), seconds, 2)]


def test_what_there_is_no_time_for_is_said(cuda: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "--limit", "1e-6") == 1, "what was not examined is not right"
    said = capsys.readouterr().out
    assert "NOT EXAMINED for want of time: 2 problems" in said


def test_jobs_that_the_limit_leaves_out(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = iter([1e-3, 1e-3, 1e9, 1e9, 1e9, 1e9])
    monkeypatch.setattr(run.Bench, "_cost", lambda self, threads, job: next(costs))
    assert check(tmp_path) == 0
    said = capsys.readouterr().out
    assert "4 of 6 jobs were left out for want of time: grid 3x4x5x6 GRU training bfloat16, " in said
    assert {r.dtype for r in rows.read(tmp_path / "rows.csv")} == {"bfloat16"}


def test_a_clone_runs_as_it_is(tmp_path: Path) -> None:
    """Nothing installed, nothing built: rnnkit.benchmarks and rnnkit.kernels are found beside the package."""
    for name in ("rnnkit", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    said = "import rnnkit.benchmarks, rnnkit.kernels; print(rnnkit.benchmarks.__file__, rnnkit.kernels.__file__)"
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", said], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / name / "__init__.py") for name in ("benchmarks", "kernels")]
