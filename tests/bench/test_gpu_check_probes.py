"""The probes of a GPU, where there is none: that table and source name the same ones, that they compile for every chip,
what becomes of readings, refusals, a device that fails and a process that does not end.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fake_cuda import pretend
from test_cuda_build import HOME, SOURCES, needs_nvcc, nvcc

from rnnkit.backends.cpu import extension
from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.benchmarks.gpu_check import main as gpu_check
from rnnkit.benchmarks.gpu_check import probes, timed_process
from rnnkit.benchmarks.speed import machine, rows, timing
from rnnkit.benchmarks.usage import kernel_usage

SOURCE, WGMMA = ((SOURCES / name).read_text() for name in ("probes.cu", "wgmma.cuh"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "machine", cuda.machine._replace(capability=lambda index: 90))
    monkeypatch.setattr(extension, "cuda_built", ("13.7", "sm_90a"))
    monkeypatch.setattr(probes, "works", lambda device: True)


def numbered(name: str, size: int) -> float:
    return float(len(name) + size)


def rows_of(found: Sequence[probes.ProbeReading | str]) -> list[probes.ProbeReading]:
    return [row for row in found if isinstance(row, probes.ProbeReading)]


def test_the_source_has_what_the_table_names() -> None:
    known = set(re.findall(r'name == "(\w+)"', SOURCE))
    asked = {probe.name for probe in probes.TABLE if not probe.name.startswith("launch")}
    assert known == asked | {"empty"}
    assert len({probe.name for probe in probes.TABLE}) == len(probes.TABLE)
    guarded = {probe.name for probe in probes.TABLE if probe.oldest == 90}
    assert guarded == {name for name in asked if name.startswith(("cluster", "async", "wgmma"))}
    alone = {probe.name for probe in probes.TABLE if probe.latest < 999}
    assert alone == {name for name in asked if name.startswith("wgmma")}, "later chips have another"


@needs_nvcc
@pytest.mark.parametrize("chip", cuda_configs.CHIPS)
def test_they_compile_without_a_spill(chip: str, tmp_path: Path) -> None:
    command = [HOME / "bin" / "nvcc", *nvcc.FLAGS, "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra,-Werror", nvcc.gencode(chip)]
    done = subprocess.run([*command, "-c", SOURCES / "probes.cu", "-o", tmp_path / "o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    blocks = done.stderr.split("Compiling entry function ")[1:]
    spills = [kernel_usage.number(r"(\d+) bytes spill stores", block) for block in blocks]
    assert len(blocks) == (SOURCE + WGMMA).count("__global__") + 6 and not any(spills), "six are there twice"
    products = [block for block in blocks if "wgmma" in block.partition(" for ")[0]]
    used = [kernel_usage.number(r"Used (\d+) registers", block) > 16 for block in products]
    assert used == [chip == "sm_90a"] * 2, "elsewhere they are empty"


def test_every_probe_is_read(device: None) -> None:
    found = list(probes.measured(90, numbered))
    assert [(row.probe, row.size) for row in rows_of(found)] == [(p.name, n) for p in probes.TABLE for n in p.sizes]
    row = next(row for row in rows_of(found) if row.probe == "cluster_read" and row.size == 16)
    assert (row.p20, row.p50, row.p80, row.readings) == (28.0, 28.0, 28.0, probes.REPEATS)
    assert (row.device, row.capability, row.toolkit, row.torch) == ("NVIDIA Abacus", "9.0", "13.7", torch.__version__)
    assert row.line() == (
        "cluster_read 16                   28 bytes/clock (28 to 28): into a block from the others of a cluster of so "
        "many"
    )
    old = {row.probe for row in rows_of(list(probes.measured(80, numbered)))}
    assert old == {probe.name for probe in probes.TABLE if probe.oldest == 80}, "clusters came with 9.0"
    late = {row.probe for row in rows_of(list(probes.measured(100, numbered)))}
    assert late == {probe.name for probe in probes.TABLE if not probe.name.startswith("wgmma")}


def test_launches_are_timed_by_events(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(timing, "block", lambda work, repeats, device: [work() for _ in range(repeats)] and 0.5)
    monkeypatch.setattr(timing, "graph", lambda work: lambda: asked.append(("graph", 0)))

    def ask(name: str, size: int) -> float:
        asked.append((name, size))
        return 0.0

    readings = {}
    for name in ("launch_call", "launch_stream", "launch_graph"):
        asked.clear()
        readings[name] = probes._reader(name, 1 if name == "launch_call" else 1000, ask)()
        kinds = set(asked)
        assert kinds == {("graph", 0)} if name == "launch_graph" else {("empty", 1 if name == "launch_call" else 1000)}
    assert readings == {"launch_call": 5e5, "launch_stream": 500.0, "launch_graph": 500.0}, "microseconds a launch"


def test_what_a_device_cannot_do_is_left_out(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: str, size: int) -> float:
        if name == "cluster_read" and size == 16:
            raise RuntimeError("rnnkit: probe cluster_read: no cluster of this size fits\nand more")
        return 1.0

    found = list(probes.measured(90, ask))
    said = [row for row in found if isinstance(row, str)]
    assert said == ["cluster_read 16 left out: RuntimeError: rnnkit: probe cluster_read: no cluster of this size fits"]
    assert ("cluster_read", 8) in {(row.probe, row.size) for row in rows_of(found)}
    monkeypatch.setattr(probes, "works", lambda device: False)
    found = list(probes.measured(90, ask))
    assert found[-1] == "the device fails, and the probes end" and len(rows_of(found)) == 1 + len(probes.CLUSTERS)
    (line,) = probes.measured(90, ask, -1.0)
    assert isinstance(line, str) and line.startswith("left out for want of time: ")


def test_the_record_is_read_back_and_is_no_rows(device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "no_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    real = rows_of(list(probes.measured(90, numbered)))
    monkeypatch.setattr(probes, "measured", lambda *rest: iter([*real[:3], "a word"]))
    monkeypatch.setattr(torch.ops.rnnkit, "cuda_probe", numbered, raising=False)
    path = tmp_path / probes.file_name()
    assert path.name == "cuda-nvidia-abacus-probes.csv"
    assert probes.main(["--to", str(path)]) == 0
    assert probes.read(path) == real[:3]
    assert rows.recorded(tmp_path) == []


def test_without_a_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probes.main([]) == 3 and "finds no CUDA device" in capsys.readouterr().err


class Made(timed_process.Child):
    """A process that is a shell's."""

    script = "exit 0"

    def __init__(self, module: str, arguments: Sequence[str], said: Path) -> None:
        self.said, out = said, arguments[arguments.index("--to") + 1]
        with said.open("wb") as file:
            self._process = subprocess.Popen(["sh", "-c", self.script, "sh", out], stdout=file, start_new_session=True)


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        ("echo clock 1.8; echo rows > $1", ["clock 1.8"]),
        ("echo rows > $1; exit 5", ["they ended with 5: what there is stands in {out}/probes.csv"]),
        ("exit 5", ["they ended with 5, see {out}/probes.txt"]),
        ("sleep 100", ["they did not end in time, see {out}/probes.txt"]),
    ],
)  # fmt: skip
def test_a_process_of_its_own(
    script: str, lines: list[str], device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir(), results.mkdir()
    monkeypatch.setattr(Made, "script", script)
    monkeypatch.setattr(probes, "Child", Made)
    monkeypatch.setattr(probes, "RESULTS", results)
    monkeypatch.setattr(probes, "LEAST", 0.0)
    begin = time.monotonic()
    assert probes.examine(1.0, out, True) == [line.format(out=out) for line in lines]
    assert time.monotonic() - begin < 50
    assert [path.name for path in results.iterdir()] == ["cuda-nvidia-abacus-probes.csv"] * ("rows" in script)


def test_why_they_are_left_out(device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = gpu_check.PROBED * gpu_check.QUICK
    assert probes.examine(seconds, tmp_path, False) == [
        "left out: 6 s are too few, they take 20; a larger --limit takes them in"
    ]
    monkeypatch.setattr(cuda, "missing", lambda: "it is not built")
    assert probes.examine(100.0, tmp_path, False) == ["left out: it is not built"]
    assert gpu_check.PROBED * gpu_check.LIMIT > probes.LEAST and gpu_check.WATCHED * gpu_check.LIMIT > 40
