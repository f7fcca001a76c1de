"""Every backend on a device against float64: outputs, states and every gradient, of every cell, dtype and extra.

It stands here and not among the tests, since it has to run where there is a GPU and maybe neither pytest nor
hypothesis; it needs torch alone. The budget is the project's (speed/accuracy.py): at most twice the error that
torch.nn makes at that dtype on that device, or the reference where torch has no such case (reference_runs.py), and a
rounding band. TF32 is held to twice what cutting a product's operands to its 10 bits costs. The truth is float64 on the
CPU, where the tests have it, or for very long sequences on the device. A fused backend must give the same bits twice.
New memory is filled with NaN, and so is the padding.
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rnnkit.backends import BACKENDS, NAMES, record
from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.backends.triton import backend as triton
from rnnkit.backends.triton import configs as triton_configs

from ..speed.accuracy import band, error
from ..speed.implementations import first_line
from ..speed.targets import FUSED
from . import bitwise_checks
from .bitwise_checks import differing
from .parity_cases import ParityCase, Values, compiled_for, draw, kernels_of
from .reference_runs import by_pieces, by_steps, by_tf32, named, numbers


@dataclass
class Findings:
    """What came of it. A share is an error over what is allowed."""

    wrong: list[str] = field(default_factory=list)
    culprits: set[tuple[str, str, str]] = field(default_factory=set)
    """The backend, kind of layer and precision that something is wrong with."""
    ran: dict[tuple[str, str], int] = field(default_factory=dict)
    """How many cases a backend has run, in a precision."""
    worst: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    """backend -> reason -> cases that it cannot run for it"""
    ended: bool = False
    """Whether the device failed before the end."""
    left: int = 0
    """Cases for which there was no time."""
    unwatched: int = 0
    """Kernels that a check of compute-sanitizer was to watch, and did not."""
    without: list[str] = field(default_factory=list)
    """Cases that nothing is held against: the device's memory is too small for them."""
    failing: list[str] = field(default_factory=list)
    """Cases in which torch itself fails."""
    kernels: set[triton_configs.CompiledKernel | cuda_configs.CompiledKernel] = field(default_factory=set)
    """Of the kernels in the tables those that ran: Triton's persistent ones, and CUDA's."""

    def blame(self, backend: str, case: ParityCase, what: str) -> None:
        """Record a failure."""
        self.culprits.add((backend, case.kind, case.precision))
        self.wrong.append(f"{backend}: {what}, in {case}")

    def stumbled(self, case: ParityCase, error: Exception) -> None:
        """Record an error of the examination itself, or of what all backends stand on."""
        self.wrong.append(f"{first_line(error)}, where this is examined: {case}")

    def add(self, other: Findings) -> None:
        """Take over what somebody else found."""
        self.wrong += other.wrong
        self.culprits |= other.culprits
        self.without += other.without
        self.failing += other.failing
        self.kernels |= other.kernels
        self.ended |= other.ended
        self.left += other.left
        self.unwatched += other.unwatched
        for key, count in other.ran.items():
            self.ran[key] = self.ran.get(key, 0) + count
        for key, found in other.worst.items():
            self.worst[key] = max(found, self.worst.get(key, found))
        for backend, reasons in other.skipped.items():
            counts = self.skipped.setdefault(backend, {})
            for reason, count in reasons.items():
                counts[reason] = counts.get(reason, 0) + count

    def lines(self) -> list[str]:
        """For a person: a line for each backend and precision, then what was left out."""
        said = []
        for (backend, precision), count in sorted(self.ran.items(), key=lambda item: NAMES.index(item[0][0])):
            share, where = self.worst.get((backend, precision), (0.0, "nothing"))
            said.append(f"{backend:<10} {precision:<9} {count:>4} problems, at most {share:.0%} of the budget: {where}")
        for backend, reasons in self.skipped.items():
            said += [f"{backend:<10} left out of {count:>4} problems: {reason}" for reason, count in reasons.items()]
        said += [f"left out for want of memory: {line}" for line in self.without]
        said += [f"NOT EXAMINED, since torch itself fails: {line}" for line in self.failing]
        return said


def examine(
    findings: Findings,
    device: str,
    every: Sequence[ParityCase],
    backends: Sequence[str] = NAMES,
    tell: Callable[[int, str], None] | None = None,
    seconds: float = float("inf"),
) -> None:
    """Run the cases on every backend that can, and on `auto`, and record what is found.

    `tell` hears how many are done, and which. Begins no case after so many seconds. Ends early where the device
    fails: a kernel that wrote where it must not leaves one that nothing runs on.
    """
    begin = time.monotonic()
    with _strict():
        for done, case in enumerate(every, 1):
            if time.monotonic() - begin > seconds:
                findings.left = len(every) - done + 1
                return
            try:
                _examine(findings, device, case, backends)
            except RuntimeError as error:
                line = f"{case}: {first_line(error)}"
                if works(device):
                    findings.failing.append(line)
                else:
                    findings.ended = True
                    findings.wrong.append(f"torch fails, and the examination ends, in {line}")
                    return
            except Exception as error:  # a Triton that cannot be imported, say
                findings.stumbled(case, error)
            if case.memory and device == "cuda":  # else torch keeps it from those that come after
                gc.collect()
                torch.cuda.empty_cache()
            if tell is not None:
                tell(done, str(case))


def works(device: str) -> bool:
    """Whether anything still runs there."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def memory(device: str) -> float:
    """Bytes that are free there, as far as anybody asks."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else float("inf")


def _examine(findings: Findings, device: str, case: ParityCase, backends: Sequence[str]) -> None:
    able = _able(findings, device, case, backends)
    if not able:
        return
    if case.memory > (free := memory(device)):
        findings.without.append(f"{case} needs {case.memory / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
        return
    drawn = [draw(case, seed) for seed in range(case.samples)]
    runner = by_pieces if case.known else by_steps
    there = device if case.long else "cpu"
    truth = _pooled([numbers(runner, case, given, torch.float64, there) for given in drawn])
    if case.tf32:
        yardstick = _pooled([numbers(by_tf32, case, given, case.dtype, "cpu") for given in drawn])
    else:
        yardstick = _pooled([numbers(runner, case, given, case.dtype, device) for given in drawn])
    for name in able:
        key = (name, case.precision)
        findings.ran[key] = findings.ran.get(key, 0) + 1
        try:
            with record() as choices, precision_and_regime(case):
                samples = [numbers(named(name), case, given, case.dtype, device) for given in drawn]
                again = numbers(named(name), case, drawn[0], case.dtype, device) if name in FUSED else samples[0]
        except Exception as raised:  # compilers of kernels have errors of their own
            findings.blame(name, case, f"raised {first_line(raised)}")
            continue
        others = {chosen for _, _, chosen in choices} - {name}
        if others and name != "auto":
            findings.blame(name, case, f"was named, and {', '.join(sorted(others))} ran")
        for what in differing(again, samples[0]):
            findings.blame(name, case, f"{what} has other bits the second time")
        findings.kernels |= _kernels(name, case)
        _judge(findings, key, case, _pooled(samples), truth, yardstick)
        if case.calls:
            with precision_and_regime(case):
                for complaint in bitwise_checks.complaints(name, case, drawn[0], device):
                    findings.blame(name, case, complaint)


def _able(findings: Findings, device: str, case: ParityCase, backends: Sequence[str]) -> list[str]:
    """The backends that can run it; why others cannot is recorded. Asked of few steps and rows of it."""
    asked = [name for name in backends if name in FUSED or not case.fused]
    steps, rows, features, hidden = case.variant.size
    size = (min(steps, 2), min(rows, 2), features, hidden)
    short = replace(case, variant=replace(case.variant, size=size, many=0))
    given = draw(short, 0)
    with record() as met:
        named("reference")(short, given, *given.to(case.dtype, device))
    facts = [fact._replace(steps=steps, batch=case.variant.many or rows) for fact, _, _ in met]
    for backend in BACKENDS:
        reasons = dict.fromkeys(reason for fact in facts for reason in backend.unsupported(fact))
        if reasons and backend.name in asked:
            counts = findings.skipped.setdefault(backend.name, {})
            for reason in reasons:
                counts[reason] = counts.get(reason, 0) + 1
            asked.remove(backend.name)
    return asked


def _kernels(name: str, case: ParityCase) -> set[triton_configs.CompiledKernel | cuda_configs.CompiledKernel]:
    """Of a table's kernels those by which a backend has just run a case."""
    if name == "triton" and triton.missing() is None:
        return set(kernels_of(case, triton.chip()))
    if name == "cuda" and cuda.missing() is None:
        return {compiled_for(case, cuda.machine.capability(None))}
    return set()


def _judge(
    findings: Findings, key: tuple[str, str], case: ParityCase, got: Values, truth: Values, yardstick: Values
) -> None:
    """Each number against what it may be off by."""
    name = key[0]
    if got.keys() != truth.keys():
        findings.blame(name, case, f"gives {', '.join(got)}, expected {', '.join(truth)}")
        return
    for what, v in got.items():
        if v.dtype != case.dtype:
            findings.blame(name, case, f"{what} is {v.dtype}, expected {case.dtype}")
        off = error(v, truth[what])
        allowed = 2 * error(yardstick[what], truth[what]) + band(truth[what], case.dtype)
        if not off <= allowed:
            findings.blame(name, case, f"{what} is off by {off:.3g}, allowed {allowed:.3g}")
        share = off / allowed if allowed else float(off > 0)
        if share > findings.worst.get(key, (-1.0, ""))[0]:
            findings.worst[key] = (share, f"{what}, {case}")


@contextlib.contextmanager
def precision_and_regime(case: ParityCase) -> Iterator[None]:
    """What a case asks of kernels: TF32 or none, a regime."""
    rnn: Any = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    try:
        if case.tf32:
            rnn.fp32_precision = "tf32"
        with contextlib.ExitStack() as regimes:
            if case.stepwise:
                regimes.enter_context(triton.regimes.alone("step"))
                regimes.enter_context(cuda.regimes.alone("step"))
            yield
    finally:
        rnn.fp32_precision = before


def _pooled(samples: list[Values]) -> Values:
    """Several runs of a case as one."""
    if len(samples) == 1:
        return samples[0]
    return {name: torch.cat([sample[name].flatten() for sample in samples]) for name in samples[0]}


FILL = "fill_uninitialized_memory"  # a property that type checkers do not see


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """float32 that is float32, not TF32; NaN in the memory that nobody wrote; no advice on speed."""
    matmul, cudnn, filling = torch.backends.cuda.matmul, torch.backends.cudnn, torch.utils.deterministic
    before, mode = (matmul.allow_tf32, cudnn.allow_tf32), torch.get_deterministic_debug_mode()
    fill = getattr(filling, FILL)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        setattr(filling, FILL, True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        setattr(filling, FILL, fill)
        torch.set_deterministic_debug_mode(mode)
