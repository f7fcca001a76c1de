"""compute-sanitizer over the CUDA kernels, where there is neither: a tool that says what the real one says, what is
made of it, and that the program that it watches runs every kernel. The reports are in the form of its manual.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.benchmarks.gpu_check import main as gpu_check
from rnnkit.benchmarks.gpu_check import parity, parity_cases, sanitizer, timed_process
from rnnkit.benchmarks.usage import cuda_usage as compiled

KERNEL = (
    "void rnnkit::cuda::cta_forward<rnnkit::cuda::Cta<rnnkit::cuda::cell::lstm, rnnkit::cuda::kind::bf16, (int)64, "
    "(int)4, (int)8>>(rnnkit::cuda::Forward)"
)
HEAD = """\
========= COMPUTE-SANITIZER
kernels, in this order: cta_rnn_bf16_64 cta_lstm_bf16_64
problem 1 of 2: rnn_tanh in bfloat16 (T 4)
problem 2 of 2: lstm in bfloat16 (T 4)
"""
MORE = HEAD.replace("lstm_bf16_64\n", "lstm_bf16_64 step_gru_ieee_8 step_rnn_f64_8\n").replace(" of 2:", " of 4:")
OUTSIDE = f"""\
========= Invalid __global__ write of size 2 bytes
=========     at {KERNEL}+0x9c0 in cta_forward.cuh:123
=========     by thread ({{}},0,0) in block (0,0,0)
=========     Address 0x7f551f200000 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f551f1ffe00 of size 512 bytes
"""
RACE = f"""\
========= Error: Race reported between Read access at {KERNEL}+0x100 in cta.cuh:9
=========     and Write access at {KERNEL}+0x200 in cta_forward.cuh:77 [508 hazards]
=========
"""
BARRIER = f"""\
========= Barrier error detected. Divergent thread(s) in block
=========     at {KERNEL.replace("lstm", "gru_reset_before")}+0x50 in step.cuh:88
=========     by thread (3,0,0) in block (0,0,0)
"""
ELSEWHERE = """\
========= Invalid __shared__ read of size 4 bytes
=========     at void at::native::copy<float>(int)+0x10
"""
TAIL = "all that there was time for\n========= ERROR SUMMARY: 3 errors\n"


def test_what_is_reported_is_read() -> None:
    ours, others = sanitizer.reports(HEAD + OUTSIDE.format(0) + OUTSIDE.format(1) + RACE + BARRIER + ELSEWHERE + TAIL)
    assert others == 1
    assert ours == {
        "Invalid __global__ write of size 2 bytes in cta_forward lstm bf16 (cta_forward.cuh:123)": 2,
        "Error: Race reported in cta_forward lstm bf16 (cta.cuh:9, cta_forward.cuh:77)": 1,
        "Barrier error detected. Divergent thread(s) in cta_forward gru_reset_before bf16 (step.cuh:88)": 1,
    }
    assert sanitizer.reports(HEAD + TAIL) == ({}, 0)
    bare = re.sub(r" in \S+:\d+", "", RACE)  # as it is built without -lineinfo
    assert list(sanitizer.reports(bare)[0]) == ["Error: Race reported in cta_forward lstm bf16 (0x100, 0x200)"]


def test_whom_a_report_speaks_of() -> None:
    assert sanitizer.culprits("a race in cta_forward lstm bf16") == {("lstm", "bfloat16"), ("lstm_proj", "bfloat16")}
    assert sanitizer.culprits("step rnn tf32") == {("rnn_tanh", "tf32"), ("rnn_relu", "tf32")}
    assert sanitizer.culprits("step gru_reset_before ieee (x.cuh:1)") == {("gru_reset_before", "float32")}
    assert len(sanitizer.culprits("")) == len(parity_cases.KINDS) * len(cuda_configs.KINDS), (
        "all, where it does not tell"
    )


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """examined(text, code, sleep) -> findings, lines: by a tool that says this and runs nothing."""
    monkeypatch.setattr(cuda, "missing", lambda: None)

    def examined(
        text: str, code: int = 0, sleep: float = 0.0, seconds: float = 60.0
    ) -> tuple[parity.Findings, list[str]]:
        (tmp_path / "text").write_text(text)
        tool = tmp_path / "bin" / "compute-sanitizer"
        tool.parent.mkdir(exist_ok=True)
        asked = f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {tmp_path}/asked'
        tool.write_text("\n".join(["#!/bin/sh", asked, f"cat {tmp_path}/text", f"sleep {sleep}", f"exit {code}", ""]))
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
        findings = parity.Findings()
        return findings, sanitizer.examine(findings, seconds, tmp_path)

    return examined


def test_a_kernel_without_findings(found: Any, tmp_path: Path) -> None:
    findings, lines = found(HEAD + TAIL)
    assert findings == parity.Findings()
    assert lines == [f"{check:<10} 2 of 2 problems, 0 findings in the kernels" for check in sanitizer.CHECKS]
    asked = sorted((tmp_path / "asked").read_text().splitlines())
    assert len(asked) == len(sanitizer.CHECKS)
    for line, check in zip(asked, sorted(sanitizer.CHECKS)):
        assert line.startswith(f"1 --tool {check} --kernel-name kernel_substring=rnnkit "), "each tensor by itself"
        assert f"{sys.executable} -m rnnkit.benchmarks.gpu_check.sanitizer --seconds 35" in line


def test_findings_are_failures_of_the_backend(found: Any, tmp_path: Path) -> None:
    findings, lines = found(HEAD + OUTSIDE.format(0) + OUTSIDE.format(1) + ELSEWHERE + TAIL, sanitizer.FOUND)
    assert len(findings.wrong) == len(sanitizer.CHECKS)
    assert findings.wrong[0] == (
        "cuda: memcheck: Invalid __global__ write of size 2 bytes in cta_forward lstm bf16 (cta_forward.cuh:123), "
        "2 times"
    )
    assert findings.culprits == {("cuda", "lstm", "bfloat16"), ("cuda", "lstm_proj", "bfloat16")}
    assert lines[0] == "memcheck   2 of 2 problems, 1 findings in the kernels, 1 elsewhere"
    assert gpu_check.barred(findings) >= {("cuda", "LSTM", "bfloat16"), ("auto", "LSTM", "bfloat16")}
    findings, lines = found(HEAD + TAIL, sanitizer.FOUND)
    assert findings.wrong == [] and lines[0].endswith(f"see {tmp_path / 'memcheck.txt'}"), "what we cannot read"


def test_a_program_that_ends_early(found: Any) -> None:
    findings, _ = found(HEAD + "Traceback\n", 1)
    assert findings.wrong[0].startswith("cuda: memcheck: ended with 1 in lstm in bfloat16 (T 4), see ")
    assert ("cuda", "gru", "float16") in findings.culprits


@pytest.mark.parametrize("check", sanitizer.CHECKS)
def test_what_is_not_watched_is_not_examined(check: str, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "CHECKS", {check: ()})
    findings, lines = found(MORE + TAIL)
    assert findings == parity.Findings(unwatched=2)
    assert lines == [
        f"{check:<10} 2 of 4 problems, 0 findings in the kernels",
        f"NOT EXAMINED by {check}, for want of time: 2 of 4 kernels: step_gru_ieee_8 step_rnn_f64_8; "
        "a larger --limit takes them in",
    ]
    findings, lines = found(MORE.partition("problem")[0] + TAIL)
    assert findings.unwatched == 4 and "4 of 4 kernels: cta_rnn_bf16_64 cta_lstm_bf16_64 step_gru" in lines[1]
    monkeypatch.setattr(sanitizer, "LEAST", 0.0)
    findings, lines = found(MORE, sleep=100, seconds=1.0)
    assert findings.unwatched == 3, "nor what was stopped"
    assert "3 of 4 kernels: cta_lstm_bf16_64 step_gru_ieee_8 step_rnn_f64_8" in lines[1]
    findings, lines = found(MORE + "Traceback\n", 1)
    assert findings.unwatched == 2 and "since it ended: 2 of 4 kernels: step_gru_ieee_8" in lines[1]
    assert len(findings.wrong) == 1
    findings, lines = found("", sleep=100, seconds=0.5)
    assert findings.unwatched == 1 and lines[1:] == [
        f"NOT EXAMINED by {check}: any kernel, it did not begin in time; a larger --limit takes them in"
    ]
    several = parity.Findings(unwatched=1)
    several.add(findings)
    assert several.unwatched == 2


def test_a_tool_that_does_not_run(found: Any, tmp_path: Path) -> None:
    findings, lines = found("========= Error: Target application terminated before first instrumented API call\n", 1)
    assert findings == parity.Findings()
    assert lines[0] == f"memcheck   left out: the tool could not run it, see {tmp_path / 'memcheck.txt'}"


def test_what_hangs_is_stopped(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "LEAST", 0.0)
    begin = time.monotonic()
    findings, lines = found(HEAD, sleep=100, seconds=1.0)
    assert findings == parity.Findings(unwatched=3) and time.monotonic() - begin < 50
    assert lines[0].endswith("; stopped in the last, for want of time: lstm in bfloat16 (T 4)")
    _, lines = found("", sleep=100, seconds=0.5)
    assert lines[0].endswith("; it did not begin in time")


def test_why_it_is_left_out(found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings, lines = found("", seconds=12.0)
    assert lines == ["sanitizer  left out: 12 s are too few, it takes 40; a larger --limit takes it in"]
    monkeypatch.setattr(cuda, "missing", lambda: "it is not built")
    assert found("")[1] == ["sanitizer  left out: it is not built"]
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(sanitizer, "tool", lambda: None)
    assert sanitizer.examine(findings, 60.0, tmp_path)[0].startswith(
        "sanitizer  left out: compute-sanitizer is not here: "
    )


def test_where_the_tool_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(folder: Path) -> Path:
        path = folder / "bin" / "compute-sanitizer"
        path.parent.mkdir(parents=True)
        path.touch(0o755)
        return path

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert sanitizer.tool() is None
    wheel = put(tmp_path / "nvidia" / "cu13")
    assert sanitizer.tool() == wheel, "installed by pip"
    home = put(tmp_path / "home")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert sanitizer.tool() == home
    first = put(tmp_path / "path")
    monkeypatch.setenv("PATH", str(first.parent))
    assert sanitizer.tool() == first


# The program that is watched.


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_every_kernel_is_watched(capability: int) -> None:
    every = sanitizer.small(capability)
    rows = cuda_configs.able(capability)
    assert {parity_cases.compiled_for(problem, capability) for problem in every} == set(rows) and len(every) == len(
        rows
    )
    first = [parity_cases.compiled_for(problem, capability) for problem in every[: len(every) // 3]]
    for facts in ("regime", "kernel", "kind"):
        assert {getattr(row, facts) for row in first} == {getattr(row, facts) for row in rows}, (
            "a third has some of all"
        )


def test_the_program_runs_as_long_as_there_is_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sanitizer, "numbers", lambda runner, case, given, dtype, device: ran.append((case, device)))
    monkeypatch.setattr(sanitizer, "small", lambda capability: few)
    few = list(parity_cases.stepping(cuda_configs.ROWS))[:3]
    monkeypatch.setattr(cuda, "machine", cuda.machine._replace(capability=lambda index: 90))
    assert sanitizer.main([]) == 0
    assert [case for case, _ in ran] == few and {device for _, device in ran} == {"cuda"}
    said = capsys.readouterr().out
    order = f"kernels, in this order: {' '.join(parity_cases.compiled_for(p, 90).name for p in few)}\n"
    assert (
        said
        == order + "".join(f"problem {k} of 3: {p}\n" for k, p in enumerate(few, 1)) + "all that there was time for\n"
    )
    assert sanitizer.main(["--seconds", "-1"]) == 0
    assert capsys.readouterr().out == order + "all that there was time for\n"


def test_a_child_finds_what_its_parent_found(tmp_path: Path) -> None:
    begun = timed_process.TimedProcess("rnnkit.benchmarks.gpu_check.sanitizer", ["--help"], tmp_path / "said")
    assert begun.wait(time.monotonic() + 100) == 0 and "compute-sanitizer over the CUDA kernels" in begun.text()
