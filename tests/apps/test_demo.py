"""The demo: both runs and what they leave behind, the check of the curves, bad input, Ctrl-C, several processes."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import stoppable
from torch import nn

import rnnkit
from rnnkit import demo
from rnnkit.__main__ import main
from rnnkit.cli import instruction_set
from rnnkit.cli.progress import Progress
from rnnkit.demo import memory, report, text, train

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DEMO = [sys.executable, "-m", "rnnkit", "demo"]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text that is not ASCII alone."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"line {k} of {k * k}: für alle\n" for k in range(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(book: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """One run in a process of its own, held to the least instruction set: the folder, stdout, stderr."""
    out = tmp_path_factory.mktemp("alone") / "new" / "folder"
    command = [*DEMO, "--isa", "baseline", "--steps", "3", "--text", str(book), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


def read(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "result.json").read_text(), parse_constant=refuse)


def check_png(path: Path) -> None:
    """Signature, and the checksum of every chunk up to the end."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "big")
        kind, body = raw[at + 4 : at + 8], raw[at + 4 : at + 8 + size]
        assert zlib.crc32(body) == int.from_bytes(raw[at + 8 + size : at + 12 + size], "big")
        kinds.append(kind)
        at += 12 + size
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and len(raw) > 5000


def test_result(alone: tuple[Path, str, str]) -> None:
    result = read(alone[0])
    assert not result["interrupted"]
    assert result["gate"]["passed"] and result["gate"]["steps"] == 3
    assert result["config"]["steps"] == 3 and result["processes"] == 1
    assert result["versions"]["rnnkit"] == rnnkit.__version__
    assert result["sample"].startswith("def ") and len(result["sample"]) == 4 + demo.SAMPLE
    for name, run in result["runs"].items():
        assert len(run["loss"]) == len(run["milliseconds"]) == 3
        figures = [run["held_out_bits"], run["ms_per_step"], run["tokens_per_second"], *run["loss"]]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures), name
    assert result["device"] == "cpu, the baseline"
    theirs, ours = result["runs"]["torch.nn"], result["runs"]["rnnkit"]
    assert ours["backends"] and not theirs["backends"]
    assert ours["held_out_bits"] == pytest.approx(theirs["held_out_bits"], abs=1e-4)
    assert ours["loss"][-1] < ours["loss"][0]
    assert 0 < result["times_as_fast"]["p20"] <= result["times_as_fast"]["p50"]
    assert ours["peak_mib"] and theirs["peak_mib"] and "3 steps alone" in ours["peak_how"]


def test_picture(alone: tuple[Path, str, str]) -> None:
    pytest.importorskip("matplotlib")
    check_png(alone[0] / "curves.png")


def test_what_is_said(alone: tuple[Path, str, str]) -> None:
    _, out, err = alone
    for part in ("torch.nn", "rnnkit", "held-out bits per character", "peak memory", "the curves lie on one another"):
        assert part in out
    assert "step 3/3" in err and "\r" not in err, "no terminal, no bar"


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_without_matplotlib(
    cell: str, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ["--cell", cell, "--steps", "1", "--backend", "reference", "--text", str(book), "--out", str(tmp_path)]
    assert main(["demo", *options]) == 0
    assert "pip install rnnkit[plots]" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert read(tmp_path)["runs"]["rnnkit"]["backends"] == ["reference"]


def test_the_standard_library_is_a_text() -> None:
    corpus = text.load(None)
    assert 500_000 < len(corpus.train) + len(corpus.held_out) < 4_000_000
    assert set("def (self):\n") <= set(corpus.letters) and len(corpus.letters) <= text.LETTERS + 1
    assert corpus.letters[0] == text.OTHER
    assert corpus.sha256 == text.load(None).sha256


def test_letters_come_from_the_training_part(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("ab" * 5000 + "é" * 100, encoding="utf-8")
    corpus = text.load(path)
    assert corpus.letters == text.OTHER + "ab"
    assert corpus.train[:4].tolist() == [1, 2, 1, 2]
    assert corpus.held_out[-100:].tolist() == [0] * 100


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_batch(book: Path, world: int) -> None:
    corpus = text.load(book)
    rows = -(-text.BATCH // world) * world
    shares = [next(corpus.batches(1, 5, rank, world)) for rank in range(world)]
    assert sum(len(inputs) for inputs, _ in shares) == rows
    assert len({len(inputs) for inputs, _ in shares}) == 1
    assert len({tuple(row.tolist()) for inputs, _ in shares for row in inputs}) > rows // 2
    for inputs, targets in shares:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    if text.BATCH % world == 0:
        whole, _ = next(corpus.batches(1, 5, 0, 1))
        assert all(torch.equal(whole[rank::world], inputs) for rank, (inputs, _) in enumerate(shares))


def test_gate() -> None:
    curve = [5.0 - 0.1 * k for k in range(30)]
    assert report.compare(curve, curve) == report.CurveCheck(20, 0.0)
    assert report.compare(curve, curve).passed
    near, far, late = (list(curve) for _ in range(3))
    near[19] += 0.9e-4
    far[19] += 1.1e-4
    late[20] += 1.0
    assert report.compare(curve, near).passed and report.compare(curve, late).passed
    assert not report.compare(curve, far).passed and "DIFFER" in str(report.compare(curve, far))
    assert not report.compare(curve[:3], [*curve[:2], math.nan]).passed
    assert not report.compare([math.nan, *curve], curve).passed
    assert not report.compare([math.inf], [math.inf]).passed
    assert not report.compare(curve, []).passed, "nothing was compared"
    assert report.compare(curve[:3], curve[:7]).steps == 3


class Wrong(rnnkit.LSTM):
    """An LSTM whose output is a little off."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, state = super().forward(*args, **kwargs)
        return output * 1.01, state


def test_both_sides_take_each_step_in_turn(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same batch, and now the one is first, now the other."""
    corpus, where, seen = text.load(book), train.ProcessInfo(torch.device("cpu")), []
    step = train.Learner.step

    def watched(self: train.Learner, inputs: torch.Tensor, targets: torch.Tensor, *rest: Any) -> None:
        seen.append((self.run.name, inputs))
        step(self, inputs, targets, *rest)

    monkeypatch.setattr(train.Learner, "step", watched)
    sides = [train.Learner(train.Run(name), nn.RNN, corpus, where, 0) for name in ("one", "two")]
    train.train(sides, corpus, where, 4, 0)
    assert [name for name, _ in seen] == ["one", "two", "two", "one", "one", "two", "two", "one"]
    assert all(torch.equal(seen[k][1], seen[k + 1][1]) for k in range(0, 8, 2))
    assert sides[0].run.loss == sides[1].run.loss and len(sides[0].run.milliseconds) == 4


def test_how_many_times_as_fast() -> None:
    """Of paired steps, over the later half of those that both have."""
    theirs, ours = train.Run("torch.nn"), train.Run("rnnkit")
    assert report.speed(theirs, ours) is None
    theirs.milliseconds, ours.milliseconds = [900.0, 900.0, 2.0, 30.0], [1.0, 1.0, 1.0, 10.0, 5.0]
    found = report.speed(theirs, ours)
    assert found is not None and found.p50 == pytest.approx(2.5) and found.p20 < 2.5 < found.p80
    assert "2.50 times as fast" in str(found)


def test_a_wrong_layer_fails(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(demo.LAYERS, "lstm", (nn.LSTM, Wrong))
    assert main(["demo", "--steps", "2", "--text", str(book), "--out", str(tmp_path)]) == 1
    assert "THE CURVES DIFFER" in capsys.readouterr().out
    result = read(tmp_path)
    assert not result["gate"]["passed"] and result["gate"]["max_difference"] > 1e-4


BAD_TEXTS = {
    "missing": (None, "No such file"),
    "empty": (b"", "is empty"),
    "binary": (b"abc\0def" * 2000, "NUL at byte 3"),
    "not UTF-8": (b"abc\xff" * 2000, "not a text in UTF-8"),
    "too short": (b"abc" * 200, "too short"),
    "short by one": (b"a" * (text.SHORTEST - 1), f"at least {text.SHORTEST} characters are needed"),
}


@pytest.mark.parametrize("what", BAD_TEXTS)
def test_bad_text(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = BAD_TEXTS[what]
    path, out = tmp_path / "text", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    assert main(["demo", "--text", str(path), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("rnnkit demo: ") and message in said.err and said.err.count("\n") == 1
    assert not said.out and not out.exists()


def test_the_shortest_text_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("a" * text.SHORTEST)
    corpus = text.load(path)
    run = train.Run("shortest")
    where = train.ProcessInfo(torch.device("cpu"))
    learner = train.Learner(run, nn.RNN, corpus, where, 0)
    train.train([learner], corpus, where, 1, 0)
    train.evaluate(run, learner.model, corpus)
    assert run.held_out_characters and run.held_out_bits is not None and math.isfinite(run.held_out_bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "nonsense"], "must be one of auto, "),
        (["--isa", "avx512"], "--isa avx512: this processor has no AVX-512; it can be held to avx2, baseline"),
        (["--backend", "cuda"], "backend 'cuda' cannot run"),
        (["--out", "{text}/out"], "is not a folder"),
        (["--out", "{text}"], "is not a folder"),
        (["--text", "."], "cannot read ."),
    ],
    ids=" ".join,
)
def test_bad_options(
    options: list[str], message: str, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if torch.cuda.is_available() and "cuda" in options:
        pytest.skip("this backend may run here")
    monkeypatch.setattr(instruction_set, "widest", lambda: "avx2")
    out = tmp_path / "out"
    given = [option.format(text=book) for option in options]
    assert main(["demo", "--text", str(book), "--out", str(out), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rnnkit demo: ") and message in said and said.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [["--steps", "0"], ["--steps", "-3"], ["--steps", "x"], ["--seed", "-1"], ["--seed", "x"], ["--cell", "x"]],
    ids=" ".join,
)
def test_bad_values(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", *options])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "_" not in said
    assert "rnnkit demo: error: argument" in said


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent to a process")
def test_ctrl_c_leaves_what_was_reached(book: Path, tmp_path: Path) -> None:
    command = [*DEMO, "--steps", "100000", "--text", str(book), "--out", str(tmp_path)]
    process = stoppable(command, ENVIRONMENT)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 1/" in line:
            break
    process.send_signal(signal.SIGINT)
    while process.poll() is None and not (tmp_path / "result.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # a second one does not spoil what is being written
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopped by Ctrl-C" in out
    assert "curves.png" in out
    result = read(tmp_path)
    theirs, ours = (len(result["runs"][name]["loss"]) for name in ("torch.nn", "rnnkit"))
    assert result["interrupted"] and theirs and abs(theirs - ours) <= 1, "both sides learn in turn"


def test_two_processes_learn_what_one_does(book: Path, alone: tuple[Path, str, str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    options = ["-m", "rnnkit", "demo", "--steps", "3", "--text", str(book), "--out", str(tmp_path)]
    command = [sys.executable, *launch, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the curves lie on one another") == 1, "process 0 alone speaks"
    result, single = read(tmp_path), read(alone[0])
    assert result["processes"] == 2
    for name in ("torch.nn", "rnnkit"):
        assert result["runs"][name]["loss"] == pytest.approx(single["runs"][name]["loss"], abs=1e-4)


def test_processes_that_do_not_meet(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo", "--text", str(book), "--out", str(tmp_path / "out")]) == 2
    assert "MASTER_ADDR" in capsys.readouterr().err


class Terminal:
    """A stream that says it is one."""

    def __init__(self) -> None:
        self.written = ""

    def isatty(self) -> bool:
        return True

    def write(self, said: str) -> int:
        self.written += said
        return len(said)

    def flush(self) -> None:
        pass


def test_a_bar_moves_in_place_on_a_terminal() -> None:
    terminal = Terminal()
    progress = Progress("torch.nn", 10, terminal)  # type: ignore[arg-type]
    for step in range(1, 11):
        progress.show(step, "3.000 bits per character")
    progress.close()
    assert terminal.written.startswith("\r") and terminal.written.count("\n") == 1
    assert "10/10" in terminal.written and "0 s left" in terminal.written


@pytest.mark.parametrize("allowed", [True, False])
def test_peak_memory(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not allowed:
        monkeypatch.setattr(memory, "_reset", lambda: False)
    peak = memory.Peak(torch.device("cpu"))
    if peak.mib() is None:
        pytest.skip(peak.how)
    used = torch.ones(64 * 2**18)  # 64 MiB
    peak.look()
    del used
    found = peak.mib()
    assert found is not None and 60 < found < 120
    assert ("VmHWM" in peak.how) == (allowed and peak.kernel)
