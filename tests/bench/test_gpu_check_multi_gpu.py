"""What `gpu-check` asks of streams and of several GPUs in one process, where there is none: stand-ins that launch
elsewhere, mix devices up, or leave another one current.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_cuda import Fused, Restless, put

from rnnkit.benchmarks.gpu_check import bitwise_checks, multi_gpu, parity, parity_cases
from rnnkit.benchmarks.gpu_check.parity_cases import BF16, Problem, Variant
from rnnkit.benchmarks.speed import timing

CALLED = Problem("rnn_tanh", Variant((4, 20, 2, 5), lengths=True, resets=True), BF16, calls=True, fused=True)


def test_a_launch_on_a_stream_that_is_not_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what was there before, and so gives what came before."""
    put(monkeypatch, Fused())
    monkeypatch.setattr(bitwise_checks, "CHECKS", {"on another stream": bitwise_checks.on_another_stream})
    findings = parity.Findings()
    given = parity_cases.draw(CALLED, 0)

    def early(work: Callable[[], Any], device: torch.device) -> Any:
        """The launches come before the copy that the stream was given first."""
        with monkeypatch.context() as patch:
            patch.setattr(bitwise_checks.Call, "put", lambda self, leaves: None)
            return work()

    monkeypatch.setattr(bitwise_checks, "aside", early)
    parity.examine(findings, "cpu", [CALLED], ("triton",))
    assert any("on another stream: y has other bits than in a plain call" in line for line in findings.wrong)
    monkeypatch.setattr(bitwise_checks, "aside", timing.aside)
    assert not list(bitwise_checks.complaints("triton", CALLED, given, "cpu"))


def test_aside_is_on_a_busy_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Stream:
        def __init__(self, device: Any = None, name: str = "own") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            done.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        done.append(f"on {stream.name}")
        yield
        done.append(f"off {stream.name}")

    for name, stand_in in dict(Stream=Stream, stream=on, current_stream=lambda device: Stream(name="main")).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: done.append("busy"))
    assert timing.aside(lambda: done.append("work") or 7, torch.device("cuda:1")) == 7
    assert done == ["own waits for main", "on own", "busy", "work", "off own", "main waits for own"]


# Several devices.


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two make-believe GPUs, whose tensors are on the CPU; the devices that parity was asked of."""
    met: list[str] = []
    real = parity.examine

    def examine(findings: parity.Findings, device: str, *rest: Any) -> None:
        met.append(device)
        real(findings, "cpu", *rest)

    monkeypatch.setattr(parity, "examine", examine)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(multi_gpu, "MISSING", {"triton": lambda k: None, "cuda": lambda k: "too old" if k else None})
    monkeypatch.setattr(
        multi_gpu,
        "Call",
        lambda name, problem, given, device, dtype: bitwise_checks.Call(name, problem, given, "cpu", dtype),
    )
    return met


def test_two_devices_in_one_process(two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Fused())
    findings = parity.Findings()
    line, other = multi_gpu.examine(findings, ("triton", "cuda", "reference"))
    assert two == ["cuda:1"] and findings.wrong == [] and findings.ran["triton", "bfloat16"] == len(multi_gpu.EVERY)
    assert line == "devices    4 problems on each further GPU while cuda:0 is current, and in turn: 0 findings"
    assert other == "devices    not examined: cuda on GPUs in turn, it runs on 1 of 2"


def test_a_backend_that_mixes_devices_up(two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Restless("after"))
    findings = parity.Findings()
    (line,) = multi_gpu.examine(findings, ("triton",))
    assert any("y has other bits on cuda:1, GPUs in turn, in lstm in bfloat16" in line for line in findings.wrong)
    assert any("y has other bits on another stream of cuda:0" in line for line in findings.wrong)
    assert line.endswith(f": {len(findings.wrong)} findings") and ("triton", "gru", "bfloat16") in findings.culprits

    put(monkeypatch, Fused())
    current = itertools.count()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: next(current))
    findings = parity.Findings()
    multi_gpu.examine(findings, ("triton",))
    assert findings.wrong and all("current, found" in line for line in findings.wrong)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("invalid resource handle\nand more")

    monkeypatch.setattr(multi_gpu, "Call", refuse)
    findings = parity.Findings()
    multi_gpu.examine(findings, ("triton",))
    assert findings.wrong[0].startswith("triton: raised RuntimeError: invalid resource handle, on 2 GPUs in turn, in ")


def test_one_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    findings = parity.Findings()
    assert multi_gpu.examine(findings, ("triton",)) == [
        "devices    not examined: several GPUs in one process, since torch sees 1 here"
    ]
    assert findings == parity.Findings()
