"""What torch cannot do on this processor: the benchmark asks by trying, leaves it out, and names it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_rows import SHAPE

from rnnkit.__main__ import main
from rnnkit.benchmarks.speed import implementations, roofline, rows
from rnnkit.benchmarks.speed.accuracy import AccuracyCheck
from rnnkit.benchmarks.speed.bench_cases import BenchCase, BenchJob
from rnnkit.benchmarks.speed.implementations import ORT, TORCH, Implementation

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
NONE = "could not create a primitive"


def raising(*_: Any) -> Any:
    raise RuntimeError(f"{NONE}\nand more")


def products(*able: str) -> Callable[[str], Iterator[tuple[str, Callable[..., object]]]]:
    """Two ways to multiply, of which those that are named run."""

    def some(_: str) -> Iterator[tuple[str, Callable[..., object]]]:
        for name in ("linear", "oneDNN"):
            yield name, torch.nn.functional.linear if name in able else raising

    return some


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A peer of this name raises whenever it is run in the job's dtype; in float64 it runs."""
    run = Implementation.numbers

    def numbers(self: Implementation, x: torch.Tensor, train: bool) -> list[torch.Tensor]:
        return raising() if self.name == name and x.dtype != torch.float64 else run(self, x, train)

    monkeypatch.setattr(Implementation, "numbers", numbers)


def test_a_product_that_the_processor_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "CACHE", {"cpu": (256,)})
    monkeypatch.setattr(roofline, "_products", products("linear"))
    found = roofline.Machine("cpu", 0.001, torch.bfloat16)
    assert found.peak > 0 and found.unable == [f"oneDNN in bfloat16: {NONE}"]
    monkeypatch.setattr(roofline, "_products", products())
    with pytest.raises(roofline.NoProduct, match=rf"torch has no product here: linear in float32: {NONE}; oneDNN in"):
        roofline.Machine("cpu", 0.001)


def test_a_dtype_without_a_product_is_left_out(
    bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = roofline.Machine

    def machine(device: str, seconds: float, dtype: torch.dtype) -> Any:
        if dtype == torch.float16:
            raise roofline.NoProduct(NONE)
        return made(device, seconds, dtype)

    monkeypatch.setattr(roofline, "Machine", machine)
    job = ["--case", SHAPE, "--cell", "gru", "--mode", "inference", "--backend", "reference"]
    assert bench(*job, "--dtype", "float16,float32") == 0
    assert f"float16 is left out: {NONE}\n" in capsys.readouterr().out
    assert {r.dtype for r in rows.read(tmp_path / "rows.csv")} == {"float32"}
    assert bench(*job, "--dtype", "float16") == 2
    assert "nothing could be measured, for the reasons above" in capsys.readouterr().err


def test_a_peer_that_cannot_run_is_named(
    bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(monkeypatch, implementations.CELLS)
    assert bench("--case", "resets/64x64x32x128", "--cell", "gru", "--mode", "inference", "--backend", "reference") == 0
    line = f"resets 64x64x32x128 GRU inference: {implementations.CELLS} cannot run here and is left out: RuntimeError: "
    assert f"{line}{NONE}\n" in capsys.readouterr().out and line in (tmp_path / "report.md").read_text()
    assert {r.against for r in rows.read(tmp_path / "rows.csv")} == {implementations.SPLIT, "without"}


def test_without_torch_the_reference_sets_the_budget(
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(monkeypatch, TORCH)
    job = BenchJob(BenchCase("grid", 3, 4, 5, 6), "GRU", "training", "bfloat16")
    made = implementations.setup(job, "cpu", 1, ("auto", "reference"), False, None)
    check = AccuracyCheck(job, made)
    assert all(check.error_ratio(ours) <= 1 for ours in made.ours) and len(made.ours) == 2
    assert made.unable == [f"torch.nn's error is unknown, the reference's counts: RuntimeError: {NONE}"]
    assert bench("--case", SHAPE, "--cell", "gru", "--mode", "training", "--backend", "reference") == 2
    said = capsys.readouterr()
    assert "torch.nn cannot run here and is left out" in said.out and "for the reasons above" in said.err


def test_an_onnxruntime_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(implementations, "_onnxruntime", raising)
    job = BenchJob(BenchCase("grid", 2, 3, 4, 5), "GRU", "inference")
    made = implementations.setup(job, "cpu", 1, ("reference",), False, None)
    assert made.unable == [f"{ORT} cannot run here and is left out: RuntimeError: {NONE}"]


def torch_runs(dtype: torch.dtype) -> bool:
    """Whether torch.nn's LSTM runs and trains in this dtype on this processor."""
    try:
        torch.nn.LSTM(19, 45).to(dtype)(torch.zeros(3, 7, 19, dtype=dtype))[0].sum().backward()
    except RuntimeError:
        return False
    return True


def test_the_benchmark_measures_each_dtype_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = ["bench", "--out", str(tmp_path), "--seconds", "0.001", "--backend", "reference", "--quick"]
    monkeypatch.setattr(roofline, "CACHE", {"cpu": (256,)})
    assert main([*bench, "--case", "grid/7x33x19x45", "--cell", "lstm", "--dtype", "bfloat16,float32"]) == 0
    found = [r for r in rows.read(tmp_path / "rows.csv") if r.against == "torch.nn"]
    able = [dtype for dtype in ("bfloat16", "float32") if torch_runs(getattr(torch, dtype))]
    assert [(r.mode, r.dtype) for r in found] == [(mode, dtype) for dtype in able for mode in ("inference", "training")]
    assert len({r.peak_gflops for r in found}) == len(able), "each dtype has a peak of its own"
    report = (tmp_path / "report.md").read_text()
    assert ", ".join(able) in report and ("torch.nn cannot run here" in report) is (len(able) < 2)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is x86's")
def test_narrow_dtypes_on_a_processor_without_avx512(tmp_path: Path) -> None:
    words = ["--case", "grid/7x33x19x45", "--cell", "lstm", "--mode", "inference", "--seconds", "0.001", "--quick"]
    words += ["--dtype", "bfloat16,float16", "--backend", "auto,reference", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "rnnkit", "bench", *words],
        env={**os.environ, **AVX2, "RNNKIT_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    said = done.stdout
    for dtype in ("bfloat16", "float16"):
        left_out = f"{dtype}: torch.nn cannot run here" in said or f"{dtype} is left out" in said
        measured = done.returncode == 0 and dtype in {r.dtype for r in rows.read(tmp_path / "rows.csv")}
        assert measured or left_out, said
