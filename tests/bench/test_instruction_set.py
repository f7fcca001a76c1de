"""A command held to an instruction set: both sides obey, what is not there is refused, rows say what it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_rows import SHAPE

from rnnkit.backends.cpu import extension
from rnnkit.benchmarks.speed import report, rows
from rnnkit.cli import instruction_set

X86 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="these words are x86-64's")


@pytest.mark.parametrize("isa", instruction_set.able())
def test_both_sides_are_held(isa: str, tmp_path: Path) -> None:
    """Whatever the environment said before."""
    command = [sys.executable, "-m", "rnnkit", "bench", "--isa", isa, "--case", SHAPE, "--cell", "lstm", "--quick"]
    command += ["--mode", "inference", "--backend", "auto", "--seconds", "0.001", "--out", str(tmp_path)]
    before = {**os.environ, "OMP_NUM_THREADS": "1", "RNNKIT_CPU_ISA": "sse9", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run(command, capture_output=True, text=True, env=before)
    assert done.returncode == 0, done.stderr
    found = rows.read(tmp_path / "rows.csv")
    assert {(r.isa, r.processor_isa) for r in found} == {(isa, instruction_set.widest())}
    where = report.where(found[0].processor, isa, instruction_set.widest())
    assert done.stdout.startswith(f"{where}, torch {torch.__version__}") and "no fair comparison" not in done.stdout
    assert (" held to " in where) == (isa != instruction_set.widest())


def test_what_the_processor_lacks_is_refused(
    bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instruction_set, "widest", lambda: "baseline")
    assert bench("--isa", "avx2") == 2
    said = capsys.readouterr()
    expected = "rnnkit bench: --isa avx2: this processor has no AVX2; it can be held to baseline\n"
    assert said.err == expected and not said.out
    with pytest.raises(SystemExit) as stop:
        bench("--isa", "sse9")
    assert stop.value.code == 2 and "invalid choice: 'sse9'" in capsys.readouterr().err


def test_only_a_command_starts_itself_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that calls it is told what to set."""
    isa = instruction_set.able()[-1]
    monkeypatch.setenv("RNNKIT_CPU_ISA", "")
    monkeypatch.setattr(sys, "orig_argv", ["python", "program.py"])
    with pytest.raises(instruction_set.CannotHold, match=f"start this program with RNNKIT_CPU_ISA={isa}"):
        instruction_set.hold(isa)


def test_settings_without_effect_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where something loads the libraries first."""
    isa = instruction_set.widest()
    monkeypatch.setattr(extension, "variants", (isa, "other"))
    wanted = instruction_set.environment(isa)
    for name in instruction_set.VARIABLES:
        monkeypatch.delenv(name, raising=False)
        if name in wanted:
            monkeypatch.setenv(name, wanted[name])
    monkeypatch.setattr(instruction_set, "of_torch", lambda: isa)
    instruction_set.hold(isa)
    monkeypatch.setattr(instruction_set, "of_torch", lambda: "nothing")
    monkeypatch.setitem(instruction_set.WORDS, "nothing", "nothing at all")
    with pytest.raises(instruction_set.CannotHold, match="torch by nothing at all"):
        instruction_set.hold(isa)


@X86
def test_what_was_set_before_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    monkeypatch.setattr(extension, "variants", ("avx512", "avx2", "baseline"))
    found = instruction_set.environment("avx512")
    assert "MKL_ENABLE_INSTRUCTIONS" not in found and found["RNNKIT_CPU_ISA"] == "avx512"
    assert instruction_set.environment("avx2")["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"


def test_a_set_has_every_extension_that_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's libraries take them: only so is bfloat16 compared as each side multiplies it."""
    monkeypatch.setattr(extension, "variants", ("avx2", "avx512_bf16", "avx512", "baseline"))
    assert instruction_set.environment("avx512")["RNNKIT_CPU_ISA"] == "avx512_bf16"
    assert instruction_set.environment("avx2")["RNNKIT_CPU_ISA"] == "avx2"
    monkeypatch.setattr(extension, "variants", ())
    assert instruction_set.environment("avx512")["RNNKIT_CPU_ISA"] == "avx512"


def test_what_is_worth_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    for widest, found in (("avx512", ("avx512", "avx2")), ("avx2", ("avx2",)), ("baseline", ("baseline",))):
        monkeypatch.setattr(instruction_set, "widest", lambda name=widest: name)
        assert instruction_set.here() == found


def test_two_sides_that_are_held_apart(
    bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As where somebody sets a variable of one of them alone."""
    monkeypatch.setattr(extension, "variants", ("avx2", "avx512"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert bench("--case", SHAPE, "--cell", "rnn", "--mode", "inference", "--backend", "reference") == 0
    assert "rnnkit runs by AVX2 and torch by AVX-512: no fair comparison" in capsys.readouterr().out
    assert {r.isa for r in rows.read(tmp_path / "rows.csv")} == {"avx2"}
    monkeypatch.setattr(extension, "variants", ())
    assert instruction_set.in_use() == "avx512", "without an engine it is torch's"
    monkeypatch.setattr(extension, "variants", ("avx512_bf16",))
    assert instruction_set.in_use() == "avx512"
