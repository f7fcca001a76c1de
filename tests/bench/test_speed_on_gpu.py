"""The benchmark's way through a GPU, where there is none: on a make-believe CUDA.

What is checked is that each job is timed by call and by graph replay, that what cannot be captured is said and left
out, and that the TF32 setting stands in the row.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_cuda import CALLS, GENERATOR, pretend
from made_rows import SHAPE

from rnnkit.__main__ import main
from rnnkit.benchmarks.speed import implementations, rows, timing


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def measure(folder: Path, *options: str) -> list[rows.BenchRow]:
    plain = ["bench", "--device", "cuda", "--seconds", "0.001", "--cell", "gru", "--backend", "auto"]
    assert main([*plain, "--out", str(folder), "--case", SHAPE, *options]) == 0
    return rows.read(folder / "rows.csv")


@pytest.mark.parametrize("setting", ["on", "off"])
def test_each_job_by_call_and_by_graph(cuda: None, tmp_path: Path, setting: str) -> None:
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    try:
        found = [r for r in measure(tmp_path, "--tf32", setting) if r.against == "torch.nn"]
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert [(r.mode, r.launch) for r in found] == [
        ("inference", "call"), ("inference", "graph"), ("training", "call"), ("training", "graph"),
    ]  # fmt: skip
    for r in found:
        assert (r.device, r.processor, r.peak_mib) == ("cuda", "NVIDIA Abacus", 2.0)
        assert r.tf32 == f"cudnn {setting}, matmul {setting}"
    assert CALLS.count("capture") >= 4 and CALLS.count("replay") > 40 and "synchronize" in CALLS


def test_what_cannot_be_captured_is_said(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: timing.Work) -> timing.Work:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(timing, "graph", refuse)
    assert {r.launch for r in measure(tmp_path, "--mode", "training")} == {"call"}
    said = capsys.readouterr().out
    assert "auto cannot be captured in a CUDA graph: operation not permitted when stream is capturing\n" in said


def test_a_capture_that_fails_leaves_the_stream_and_the_generator_as_they_were(cuda: None) -> None:
    before = torch.cuda.current_stream()

    def work() -> None:
        if "capture" in CALLS:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        timing.graph(work)
    assert torch.cuda.current_stream() is before and not GENERATOR.capturing


@pytest.mark.parametrize(("group", "waits"), [("resets", implementations.SPLIT), ("lengths", implementations.PACKED)])
def test_what_waits_for_the_device_is_not_captured(
    group: str, waits: str, cuda: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure(tmp_path, "--case", f"{group}/64x64x32x128", "--mode", "inference", "--quick")
    assert {r.launch for r in found if r.group == group and r.against == waits} == {"call"}
    assert "graph" in {r.launch for r in found if r.group == group}
    assert f"{waits} is not captured in a CUDA graph, since it waits for the device\n" in capsys.readouterr().out
