"""The command line as a user meets it: help, unknown commands, and what `info` says of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from rnnkit import __version__
from rnnkit.backends import BACKENDS
from rnnkit.backends.cpu import extension
from rnnkit.backends.triton import backend as triton
from rnnkit.cli import info
from rnnkit.cli import main as cli


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)], ids=" ".join)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: {' '.join(['python -m rnnkit', *command])}" in said and "exit codes" in said


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"], ["info", "more"]], ids=" ".join)
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_without_a_command_those_that_exist_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "COMMAND (info, tune, bench, demo, experiments, gpu-check)" in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"rnnkit {__version__}\n"


def test_info_as_json_from_a_process_of_its_own() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rnnkit", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rnnkit"] == __version__
    assert found["torch"] == torch.__version__
    assert found["threads"] == 1
    if extension.available():
        assert found["workers"]["workers"] == 1 and found["workers"]["limit"] == "torch's threads"
    assert found["extension"]["available"] == extension.available()
    assert set(found["backends"]) == {backend.name for backend in BACKENDS}
    assert found["backends"]["reference"] == {"available": True, "reason": None}


@pytest.mark.skipif(not extension.available(), reason=extension.reason())
@pytest.mark.parametrize("asked", ["", *extension.variants[-1:], "sse9"])
def test_info_says_what_the_engine_says_of_its_variant(asked: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RNNKIT_CPU_ISA": asked}
    words = [sys.executable, "-m", "rnnkit", "info"]
    plain, as_json = (
        subprocess.run(words + more, capture_output=True, text=True, env=environment) for more in ([], ["--json"])
    )
    assert plain.returncode == 0 and as_json.returncode == 0, plain.stderr
    (line,) = [line for line in plain.stdout.splitlines() if line.split()[0] == "cpu"]
    found = json.loads(as_json.stdout)
    if asked == "sse9":
        assert "cannot run here: RNNKIT_CPU_ISA must be one of" in line and "got 'sse9'" in line
        assert found["backends"]["cpu"]["available"] is False and found["extension"]["variants"] == []
        layer = "import rnnkit, torch; rnnkit.GRU(4, 4)(torch.zeros(2, 1, 4))"
        done = subprocess.run([sys.executable, "-c", layer], capture_output=True, text=True, env=environment)
        assert done.returncode != 0 and "got 'sse9'" in done.stderr, "auto does not pass over it in silence"
        return
    assert "runs here" in line
    assert found["extension"]["variants"][0] == (asked or found["extension"]["variants"][0])
    assert f"{found['extension']['variants'][0]}, chosen of" in plain.stdout


def test_info_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines[0].index(__version__)
    (workers,) = [line for line in lines if line.startswith("CPU workers")]
    assert ("1, bound by torch's threads" if extension.available() else "cannot run here") in workers
    assert all(line[first - 2 : first] == "  " for line in lines if line[first - 2 :]), "not aligned"
    for backend in BACKENDS:
        (line,) = [line for line in lines if line.split()[0] == backend.name and line.startswith("  ")]
        assert (backend.available() or "runs here") in line


def test_info_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_reason", "it is not built: build it")
    monkeypatch.setattr(triton, "installed", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = info.gather()
    assert found["triton"] == {"version": None, "reason": "not installed: pip install rnnkit[triton]"}
    assert not found["backends"]["cpu"]["available"]
    said = info.table(found)
    for part in ("it is not built: build it", "pip install rnnkit[triton]", "no device"):
        assert part in said


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", interrupted)
    assert cli.main(["info"]) == 130
