"""`python -m rnnkit tune` and the recording of the package's own times: what is measured is checked first, written
whole or not at all, and labelled by the instruction set that ran."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnkit import tune
from rnnkit.backends import dispatch_times, measured_order, select, user_times
from rnnkit.backends.cpu import extension
from rnnkit.backends.dispatch_times import Kind, RecordedShape
from rnnkit.benchmarks.dispatch import record
from rnnkit.benchmarks.speed import timing
from rnnkit.benchmarks.speed.accuracy import AccuracyCheck
from rnnkit.cli import main as cli
from rnnkit.tune import measure

BUILT = pytest.mark.skipif(not extension.available(), reason=extension.reason())


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table is written; two tiny shapes are measured."""
    monkeypatch.delenv("RNNKIT_TUNED")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "SHAPES", ((1, 1, 4, 4), (2, 3, 5, 6)))
    monkeypatch.setattr(measure, "LONGEST", 0.01)
    select.forget()
    yield tmp_path / "rnnkit" / "dispatch_times.csv"
    monkeypatch.undo()
    select.forget()


@BUILT
def test_it_measures_writes_and_says_what_changes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--seconds", "60"]) == 0
    out, err = capsys.readouterr()
    rows = user_times.read(path)
    assert len(rows) == 2 * 3 * 2 * 2 and {tuple(row.ms) for row in rows} == {("cpu", "torch")}
    assert {(row.kind.dtype, row.threads) for row in rows} == {("float32", 1), ("bfloat16", 1)}
    assert {row.kind.isa.removesuffix("_bf16") for row in rows} == {extension.variants[0].removesuffix("_bf16")}
    assert "24 rows measured, each a layer (B×T×I×H) in one mode. Against rnnkit's own times, auto changes for" in out
    assert out.endswith(f"written: {path}\n") and "tune     layer 12/12" in err
    assert user_times.load().rows and user_times.load().reason is None, "used from now on"


@BUILT
def test_a_file_of_ones_own_choosing(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.csv"
    assert cli.main(["tune", "--seconds", "60", "--dtype", "float32", "--out", str(other)]) == 0
    assert {row.kind.dtype for row in user_times.read(other)} == {"float32"} and not path.exists()
    capsys.readouterr()


@BUILT
def test_what_is_wrong_is_not_timed(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = AccuracyCheck.error_ratio

    def off(self: AccuracyCheck, one: Any, peer: bool = False) -> float:
        wrong = one.name == "cpu" and self.job.cell == "GRU" and self.job.train
        return 2.5 if wrong else right(self, one, peer)

    monkeypatch.setattr(AccuracyCheck, "error_ratio", off)
    assert cli.main(["tune", "--seconds", "60", "--dtype", "float32"]) == 1
    assert "grid 2x3x5x6 GRU training: cpu is off by 2.50 times what is allowed, and is not" in capsys.readouterr().err
    for row in user_times.read(path):
        assert tuple(row.ms) == (("torch",) if (row.kind.cell, row.kind.train) == ("gru", True) else ("cpu", "torch"))


def test_no_layer_begins_after_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(measure.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(measure.implementations, "setup", lambda *_: type("Made", (), {"failed": []}))
    begun: list[str] = []
    monkeypatch.setattr(measure, "_add", lambda found, job, made, seconds: begun.append(job.name))
    shown: list[int] = []
    found = measure.measure_layers(["float32"], 3.5, lambda done, what: shown.append(done))
    total = 3 * len(measure.SHAPES)
    assert len(begun) == 2 * 3 and found.left == 2 * (total - 3) and shown == [1, 2, 3]


@pytest.mark.parametrize(
    ("costs", "seconds", "rounds"),
    [((1.0, 1.1), 0.0, 3), ((1.0, 9.0), 0.0, 0), ((1.0, 9.0), 30.0, 2), ((0.01, 0.09), 0.0, 3)],
    ids=["close", "decided", "decided, with time", "short"],
)
def test_both_sides_take_turns_and_the_best_round_counts(
    costs: tuple[float, float], seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, order = [0.0], []

    def block(work: Callable[[], object], repeats: int, device: str) -> float:
        order.append(work)
        seen = order.count(work)
        cost = costs[0 if work is one else 1] * (1.5 if seen == 2 else 1.0)
        clock[0] += cost
        return cost

    def one() -> None: ...
    def other() -> None: ...

    monkeypatch.setattr(timing, "block", block)
    monkeypatch.setattr(measure.time, "monotonic", lambda: clock[0])
    assert measure.least([one, other], seconds) == list(costs)
    assert order == [one, other] * (1 + rounds)


def test_what_changes_is_said_against_the_packages_own_rows(path: Path) -> None:
    kind = Kind("cpu", "avx512", "float32", "gru", True)
    facts = dict(cell="gru", train=True)
    spec = select.LayerSpec("gru", "cpu", torch.float32, 10, 4, 64, 64, 0, True, train=bool(facts["train"]))
    before = next(name for name in measured_order(spec, tuned=False) if name in ("cpu", "torch"))
    after = "torch" if before == "cpu" else "cpu"
    row = RecordedShape(4, 10, 64, 64, kind, 1, "x", {"cpu": 1.0, "torch": 1.0} | {before: 2.0})
    said = f"GRU  training  float32  4×10×64×64     {before} → {after}: 2 ms → 1 ms, 2.00 times as fast"
    assert tune.change(row) == said
    assert tune.change(row._replace(ms={before: 1.0, after: 2.0})) is None
    assert tune.change(row._replace(ms={after: 2.0})) is None


def test_without_the_engine_there_is_nothing_to_measure(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "_reason", "it is not built: build it")
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err == "rnnkit tune: there is nothing to choose between: it is not built: build it\n"
    assert not path.parent.exists()


@BUILT
def test_nothing_measured_is_nothing_written(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--seconds", "1e-9"]) == 1
    assert "nothing was measured, and nothing is written" in capsys.readouterr().err and not path.exists()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_a_time_is_a_number_above_0(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", f"--seconds={value}"])
    assert stop.value.code == 2 and value in capsys.readouterr().err


def child(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "XDG_DATA_HOME": str(folder), "OMP_NUM_THREADS": "1", **more}


@BUILT
def test_interrupted_it_leaves_everything_as_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rnnkit", "tune"]
    with subprocess.Popen(
        command, env=child(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None and run.stdout is not None
        begun = next(line for line in run.stderr if line.startswith("tune "))
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        said, out = run.stderr.read(), run.stdout.read()
    # Where the signal meets code that exec() made of a string, Python ends by it in the end: 130 for a shell too.
    assert run.returncode in (130, -signal.SIGINT) and begun
    assert said.splitlines()[-1] == "rnnkit tune: stopped; nothing is written" and "Traceback" not in said
    assert out == "" and not list((tmp_path / "rnnkit").iterdir())


@BUILT
def test_on_a_full_disk_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "from rnnkit.cli.main import main; sys.exit(main(['tune']))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=child(tmp_path), capture_output=True, text=True)
    file = tmp_path / "rnnkit" / "dispatch_times.csv"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rnnkit tune: cannot write {file}: File too large\n", "before anything is measured"
    assert not list(file.parent.iterdir())


@BUILT
def test_rows_are_labelled_by_the_instruction_set_that_ran(tmp_path: Path) -> None:
    asked = extension.variants[-1]
    command = [sys.executable, "-m", "rnnkit", "tune", "--seconds", "1", "--dtype", "float32"]
    done = subprocess.run(command, env=child(tmp_path, RNNKIT_CPU_ISA=asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no time for" in done.stdout and "auto does not use it: RNNKIT_TUNED=0" in done.stdout
    rows = user_times.read(tmp_path / "rnnkit" / "dispatch_times.csv")
    assert {row.kind.isa for row in rows} <= {asked, "neon"} and len(rows) >= 2


# The package's own rows.


def of(isa: str, dtype: str, threads: int, ms: float) -> RecordedShape:
    return RecordedShape(1, 1, 64, 64, Kind("cpu", isa, dtype, "gru", False), threads, "x", {"cpu": ms})


def test_recorded_rows_take_the_place_of_their_group() -> None:
    gpu = RecordedShape(1, 1, 64, 64, Kind("cuda", "", "float32", "gru", False), 0, "y", {"triton": 1.0})
    old = [gpu, of("avx2", "float32", 1, 1.0), of("avx2", "float32", 2, 1.0), of("avx512", "float32", 1, 1.0)]
    new = [of("avx2", "float32", 1, 2.0)._replace(batch=7)]
    assert record.merged(old, new) == [gpu, *old[2:], *new]


def test_record_holds_each_process_to_its_instruction_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "variants", ("avx512_bf16", "avx512", "avx2"))
    ran: list[tuple[str, ...]] = []

    def run(command: list[str], env: dict[str, str], check: bool) -> None:
        assert check and env["RNNKIT_TUNED"] == "0"
        out = Path(command[command.index("--out") + 1])
        dtypes = [command[k + 1] for k, word in enumerate(command) if word == "--dtype"]
        isa, threads = env["RNNKIT_CPU_ISA"], env["OMP_NUM_THREADS"]
        ran.append((isa, env["ONEDNN_MAX_CPU_ISA"], threads, *dtypes))
        one = [of(isa, dtype, int(threads), 1.0) for dtype in dtypes]
        kinds = [(cell, train) for cell in measure.CELLS.values() for train in (False, True)]
        every = [r._replace(kind=r.kind._replace(cell=cell, train=train)) for r in one for cell, train in kinds]
        user_times.write(out, every if len(ran) < 7 else one)

    monkeypatch.setattr(record.subprocess, "run", run)
    monkeypatch.setattr(record, "SHAPES", measure.SHAPES[:1])
    to = tmp_path / "dispatch_times.csv"
    assert record.main(["--to", str(to), "--threads", "1,2"]) == 0
    assert ran == [
        ("avx512_bf16", "AVX512_CORE_AMX", "1", "bfloat16"),
        ("avx512_bf16", "AVX512_CORE_AMX", "2", "bfloat16"),
        ("avx512", "AVX512_CORE_VNNI", "1", "float32", "bfloat16"),
        ("avx512", "AVX512_CORE_VNNI", "2", "float32", "bfloat16"),
        ("avx2", "AVX2", "1", "float32", "bfloat16"),
        ("avx2", "AVX2", "2", "float32", "bfloat16"),
    ]
    assert "baseline is left out: the engine has avx512_bf16, avx512, avx2 here" in capsys.readouterr().out
    found = dispatch_times.read(to)
    assert len(found) == 6 * 10 and found == sorted(found, key=lambda row: row.key)
    assert all(row.source.startswith("cpu-") for row in found)
    assert record.main(["--to", str(to), "--isa", "avx2", "--threads", "1"]) == 1, "there was no time for all"
    assert "avx2, 1 thread: 2 of 12 rows, which are not written" in capsys.readouterr().err
    assert dispatch_times.read(to) == found
