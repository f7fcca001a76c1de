"""What `gpu-check` asks of a GPU, asked of the kernels in Triton's interpreter: some of its problems and calls."""

from __future__ import annotations

import pytest
from fake_cuda import rerun

from rnnkit.backends.triton import configs as triton_configs
from rnnkit.benchmarks.gpu_check import bitwise_checks, parity, parity_cases
from rnnkit.benchmarks.gpu_check.parity_cases import BF16, F32, Problem, Variant


def found(*every: Problem) -> parity.Findings:
    findings = parity.Findings()
    parity.examine(findings, "cpu", every, ("triton",))
    assert findings.wrong == findings.failing == [] and sum(findings.ran.values()) == len(every)
    return findings


def test_a_persistent_kernel_with_everything_on() -> None:
    (first,) = [
        p
        for p in parity_cases.persistent(triton_configs.INTERPRETER)
        if p.kind == "gru" and p.variant.size[3] == 32 and p.tf32
    ]
    assert {row[:5] for row in found(first).kernels} == {("gru", side, 32, 32, "tf32") for side in triton_configs.SIDES}


def test_step_by_step_nothing_persistent_runs() -> None:
    by = Variant((3, 17, 3, 9), lengths=True, resets=True, reset_state=True)
    assert not found(Problem("lstm_proj", by, F32, tf32=True, stepwise=True, fused=True)).kernels


@pytest.mark.parametrize("stepwise", [False, True])
def test_every_call_is_as_a_plain_one(stepwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitwise_checks, "graph", rerun)
    monkeypatch.setattr(bitwise_checks, "COMPILER", "aot_eager")
    small = Variant((3, 18, 3, 5), lengths=True, resets=True, reset_state=True)
    found(Problem("rnn_tanh", small, BF16, stepwise=stepwise, calls=True, fused=True))


def test_rows_among_many() -> None:
    found(Problem("lstm", Variant((2, 4, 2, 16), lengths=True, many=36), BF16, fused=True))
