"""Several GPUs in one process: a layer on one that is not current, layers on all in turn, on streams of their own.

A kernel launched on the current device instead of its tensors' shows nowhere else. Parity is asked again on each
further device while the first is current; then every device has a layer, all are called in turn without a wait between
them, and each must give the bits that it gave alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.triton import backend as triton

from ..speed.implementations import first_line
from ..speed.targets import FUSED
from . import parity
from .bitwise_checks import CHECKS, Call, differing
from .parity import Findings, asked
from .parity_cases import BF16, CALLS, Problem, draw

EVERY = [
    Problem(kind, replace(CALLS, both=True), BF16, stepwise=by) for by in (False, True) for kind in ("lstm", "gru")
]
ROUNDS = 3
MISSING = {"cuda": cuda.missing, "triton": triton.missing}
STREAM = "on another stream"


def examine(findings: Findings, backends: Sequence[str]) -> list[str]:
    """Put down what is found. Returns lines for a person: what was asked, or why nothing was."""
    count = torch.cuda.device_count()
    if count < 2:
        return [f"devices    not examined: several GPUs in one process, since torch sees {count} here"]
    wrong, fused = len(findings.wrong), [name for name in FUSED if name in backends]
    for k in range(1, count):
        parity.examine(findings, f"cuda:{k}", EVERY, backends)
        if findings.ended:
            break
    served = {name: [f"cuda:{k}" for k in range(count) if MISSING[name](k) is None] for name in fused}
    for problem, name in ((problem, name) for problem in EVERY for name in fused if not findings.ended):
        try:
            with asked(problem):
                for complaint in _complaints(name, problem, served[name]) if len(served[name]) > 1 else ():
                    findings.blame(name, problem, complaint)
        except Exception as raised:  # compilers of kernels have errors of their own
            findings.blame(name, problem, f"raised {first_line(raised)}, on {len(served[name])} GPUs in turn")
    found = f"{len(findings.wrong) - wrong} findings"
    lines = [f"devices    {len(EVERY)} problems on each further GPU while cuda:0 is current, and in turn: {found}"]
    few = {name: len(devices) for name, devices in served.items() if len(devices) < 2}
    return lines + [
        f"devices    not examined: {name} on GPUs in turn, it runs on {n} of {count}" for name, n in few.items()
    ]


def _complaints(name: str, problem: Problem, devices: Sequence[str]) -> Iterator[str]:
    before, given = torch.cuda.current_device(), draw(problem, 0)
    calls = [Call(name, problem, given, device, problem.dtype) for device in devices]
    alone = [call.both() for call in calls]
    rounds = [[call.both() for call in calls] for _ in range(ROUNDS)]
    for found in rounds:
        for device, got, wanted in zip(devices, found, alone, strict=True):
            yield from (f"{what} has other bits on {device}, GPUs in turn" for what in differing(got, wanted))
    for device, call in zip(devices, calls, strict=True):
        yield from (f"{what} has other bits {STREAM} of {device}" for what in CHECKS[STREAM](call, given))
    if torch.cuda.current_device() != before:
        yield f"leaves GPU {torch.cuda.current_device()} current, found {before}"
