"""Every backend on a device against float64: outputs, states and every gradient, of every cell, dtype and extra.

It stands here and not among the tests, since it has to run where there is a GPU and maybe neither pytest nor
hypothesis; it needs torch alone. The budget is the project's (speed/accuracy.py): at most twice the error that
torch.nn makes at that dtype on that device, or the reference where torch has no such problem (reference_runs.py), and a
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
from .parity_cases import Problem, Values, compiled_for, draw, kernels_of
from .reference_runs import by_pieces, by_steps, by_tf32, named, numbers


@dataclass
class Findings:
    """What came of it. A share is an error over what is allowed."""

    wrong: list[str] = field(default_factory=list)
    culprits: set[tuple[str, str, str]] = field(default_factory=set)
    """The backend, kind of layer and precision that something is wrong with."""
    ran: dict[tuple[str, str], int] = field(default_factory=dict)
    """How many problems a backend has run, in a precision."""
    worst: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    """backend -> reason -> problems that it cannot run for it"""
    ended: bool = False
    """Whether the device failed before the end."""
    left: int = 0
    """Problems for which there was no time."""
    unwatched: int = 0
    """Kernels that a check of compute-sanitizer was to watch, and did not."""
    without: list[str] = field(default_factory=list)
    """Problems that nothing is held against: the device's memory is too small for them."""
    failing: list[str] = field(default_factory=list)
    """Problems in which torch itself fails."""
    kernels: set[triton_configs.CompiledKernel | cuda_configs.CompiledKernel] = field(default_factory=set)
    """Of the kernels in the tables those that ran: Triton's persistent ones, and CUDA's."""

    def blame(self, backend: str, problem: Problem, what: str) -> None:
        """Put a failure down."""
        self.culprits.add((backend, problem.kind, problem.precision))
        self.wrong.append(f"{backend}: {what}, in {problem}")

    def stumbled(self, problem: Problem, error: Exception) -> None:
        """Put down an error of the examination itself, or of what all backends stand on."""
        self.wrong.append(f"{first_line(error)}, where this is examined: {problem}")

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
    every: Sequence[Problem],
    backends: Sequence[str] = NAMES,
    tell: Callable[[int, str], None] | None = None,
    seconds: float = float("inf"),
) -> None:
    """Run the problems on every backend that can, and on `auto`, and put down what is found.

    `tell` hears how many are done, and which. Begins no problem after so many seconds. Ends early where the device
    fails: a kernel that wrote where it must not leaves one that nothing runs on.
    """
    begin = time.monotonic()
    with _strict():
        for done, problem in enumerate(every, 1):
            if time.monotonic() - begin > seconds:
                findings.left = len(every) - done + 1
                return
            try:
                _examine(findings, device, problem, backends)
            except RuntimeError as error:
                line = f"{problem}: {first_line(error)}"
                if works(device):
                    findings.failing.append(line)
                else:
                    findings.ended = True
                    findings.wrong.append(f"torch fails, and the examination ends, in {line}")
                    return
            except Exception as error:  # a Triton that cannot be imported, say
                findings.stumbled(problem, error)
            if problem.memory and device == "cuda":  # else torch keeps it from those that come after
                gc.collect()
                torch.cuda.empty_cache()
            if tell is not None:
                tell(done, str(problem))


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


def _examine(findings: Findings, device: str, problem: Problem, backends: Sequence[str]) -> None:
    able = _able(findings, device, problem, backends)
    if not able:
        return
    if problem.memory > (free := memory(device)):
        findings.without.append(f"{problem} needs {problem.memory / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
        return
    drawn = [draw(problem, seed) for seed in range(problem.samples)]
    way = by_pieces if problem.known else by_steps
    there = device if problem.long else "cpu"
    truth = _pooled([numbers(way, problem, given, torch.float64, there) for given in drawn])
    if problem.tf32:
        yardstick = _pooled([numbers(by_tf32, problem, given, problem.dtype, "cpu") for given in drawn])
    else:
        yardstick = _pooled([numbers(way, problem, given, problem.dtype, device) for given in drawn])
    for name in able:
        key = (name, problem.precision)
        findings.ran[key] = findings.ran.get(key, 0) + 1
        try:
            with record() as choices, asked(problem):
                samples = [numbers(named(name), problem, given, problem.dtype, device) for given in drawn]
                again = numbers(named(name), problem, drawn[0], problem.dtype, device) if name in FUSED else samples[0]
        except Exception as raised:  # compilers of kernels have errors of their own
            findings.blame(name, problem, f"raised {first_line(raised)}")
            continue
        others = {chosen for _, _, chosen in choices} - {name}
        if others and name != "auto":
            findings.blame(name, problem, f"was named, and {', '.join(sorted(others))} ran")
        for what in differing(again, samples[0]):
            findings.blame(name, problem, f"{what} has other bits the second time")
        findings.kernels |= _kernels(name, problem)
        _judge(findings, key, problem, _pooled(samples), truth, yardstick)
        if problem.calls:
            with asked(problem):
                for complaint in bitwise_checks.complaints(name, problem, drawn[0], device):
                    findings.blame(name, problem, complaint)


def _able(findings: Findings, device: str, problem: Problem, backends: Sequence[str]) -> list[str]:
    """The backends that can run it; why others cannot is put down. Asked of few steps and rows of it."""
    asked = [name for name in backends if name in FUSED or not problem.fused]
    steps, rows, features, hidden = problem.variant.size
    size = (min(steps, 2), min(rows, 2), features, hidden)
    short = replace(problem, variant=replace(problem.variant, size=size, many=0))
    given = draw(short, 0)
    with record() as met:
        named("reference")(short, given, *given.to(problem.dtype, device))
    facts = [fact._replace(steps=steps, batch=problem.variant.many or rows) for fact, _, _ in met]
    for backend in BACKENDS:
        reasons = dict.fromkeys(reason for fact in facts for reason in backend.unsupported(fact))
        if reasons and backend.name in asked:
            counts = findings.skipped.setdefault(backend.name, {})
            for reason in reasons:
                counts[reason] = counts.get(reason, 0) + 1
            asked.remove(backend.name)
    return asked


def _kernels(name: str, problem: Problem) -> set[triton_configs.CompiledKernel | cuda_configs.CompiledKernel]:
    """Of a table's kernels those by which a backend has just run a problem."""
    if name == "triton" and triton.missing() is None:
        return set(kernels_of(problem, triton.chip()))
    if name == "cuda" and cuda.missing() is None:
        return {compiled_for(problem, cuda.machine.capability(None))}
    return set()


def _judge(
    findings: Findings, key: tuple[str, str], problem: Problem, got: Values, truth: Values, yardstick: Values
) -> None:
    """Each number against what it may be off by."""
    name = key[0]
    if got.keys() != truth.keys():
        findings.blame(name, problem, f"gives {', '.join(got)}, expected {', '.join(truth)}")
        return
    for what, v in got.items():
        if v.dtype != problem.dtype:
            findings.blame(name, problem, f"{what} is {v.dtype}, expected {problem.dtype}")
        off = error(v, truth[what])
        allowed = 2 * error(yardstick[what], truth[what]) + band(truth[what], problem.dtype)
        if not off <= allowed:
            findings.blame(name, problem, f"{what} is off by {off:.3g}, allowed {allowed:.3g}")
        share = off / allowed if allowed else float(off > 0)
        if share > findings.worst.get(key, (-1.0, ""))[0]:
            findings.worst[key] = (share, f"{what}, {problem}")


@contextlib.contextmanager
def asked(problem: Problem) -> Iterator[None]:
    """What a problem asks of kernels: TF32 or none, a regime."""
    rnn: Any = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    try:
        if problem.tf32:
            rnn.fp32_precision = "tf32"
        with contextlib.ExitStack() as regimes:
            if problem.stepwise:
                regimes.enter_context(triton.regimes.alone("step"))
                regimes.enter_context(cuda.regimes.alone("step"))
            yield
    finally:
        rnn.fp32_precision = before


def _pooled(samples: list[Values]) -> Values:
    """Several runs of a problem as one."""
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
