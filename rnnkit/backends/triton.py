"""Backend `triton`: the kernels of rnnkit.kernels, for GPUs that Triton compiles for, and for its interpreter.

It brings the two scans; the products around them are those of products.py. Which regime a scan runs in, and with
which tiles, kernels/table.py says. Triton is imported at the first scan: `import rnnkit` needs none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..cells import Cell
from ..reference.scan import ScanGradients
from . import measured
from .problem import Options, Outputs, Problem, Tensors
from .products import KernelBackend, bias_inside

if TYPE_CHECKING:
    from ..kernels.table import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPWISE = os.environ.get("RNNKIT_TRITON_REGIME") == "step"
"""Whether every scan is to run step by step, whatever the table says."""


Answer = TypeVar("Answer")


@contextlib.contextmanager
def stepwise() -> Iterator[None]:
    """The same for a block, in every thread: a backward on a GPU runs in one of autograd's own."""
    global STEPWISE
    before = STEPWISE
    STEPWISE = True
    try:
        yield
    finally:
        STEPWISE = before


def once(ask: Callable[[], Answer]) -> Callable[[], Answer]:
    """Asks one time in a process. To torch.compile the answer is a constant, as torch.compiler.assume_constant_result
    makes it, which would import the compiler with the package."""
    known = functools.cache(ask)

    @functools.wraps(ask)
    def answer() -> Answer:
        return known()

    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return answer


@once
def installed() -> bool:
    """Whether there is a Triton; it is not imported for the answer."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ModuleNotFoundError:  # a finder that refuses it
        return False


@once
def interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors in this process."""
    if not installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def capability(index: int | None = None) -> int:
    """Of one CUDA device as in sm_90, or the least of all; table.AMD where torch was built for ROCm."""
    from ..kernels import table

    if torch.version.hip is not None:
        return table.AMD
    every = range(torch.cuda.device_count()) if index is None else (index,)
    major, minor = min(torch.cuda.get_device_capability(k) for k in every)
    return 10 * major + minor


def chip(index: int | None = None) -> int:
    """The capability that kernels/table.py goes by: the interpreter's is the oldest."""
    from ..kernels import table

    return table.OLDEST if interpreted() else capability(index)


@once
def missing() -> str | None:
    """Why no kernel can run here; None where they can."""
    if not installed():
        return "Triton is not installed: pip install rnnkit[triton]"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "needs a GPU, and torch sees none (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    from ..kernels import table

    if capability() == table.AMD:
        chips = {torch.cuda.get_device_properties(k).gcnArchName for k in range(torch.cuda.device_count())}
        others = sorted({chip.partition(":")[0] for chip in chips} - set(table.CHIPS))
        if others:
            return f"of AMD's GPUs its kernels are compiled for gfx942 alone, got {', '.join(others)}"
    elif capability() < table.OLDEST:
        return f"needs GPUs from compute capability 8.0 on, got one of {capability() / 10}"
    return None


class Triton(KernelBackend):
    name = "triton"
    saves_narrow = True
    overlaps = True

    def available(self) -> str | None:
        return missing()

    def unsupported(self, problem: Problem) -> list[str]:
        reason = missing()
        reasons = [] if reason is None else [reason]
        device = "cpu" if interpreted() else "cuda"
        if problem.device != device:
            how = "in Triton's interpreter runs" if interpreted() else "runs"
            reasons.append(f"{how} on the device {device}, got {problem.device}")
        if problem.dtype not in DTYPES:
            reasons.append(f"computes in float32, bfloat16 and float16, got {problem.dtype}")
        if problem.hidden_size == 0:
            reasons.append("needs at least one unit, got H=0")
        return reasons

    def reluctant(self, problem: Problem) -> str | None:
        if interpreted():
            return "can run it in Triton's interpreter, far slower than any other; runs when named"
        return measured.untried(self.name, problem)

    def detail(self, problem: Problem, index: int | None = None) -> str | None:
        sides = ("forward", "backward")[: 1 + problem.train]
        facts = (problem.hidden_size, problem.proj_size, kind(problem.dtype), chip(index), problem.batch)
        plans = [_planned(problem.cell, side, *facts) for side in sides]
        if len({(plan.regime, plan.reason) for plan in plans}) == 1:
            return f"{plans[0].regime}: {plans[0].reason}"
        return "; ".join(f"{side} {plan.regime}: {plan.reason}" for side, plan in zip(sides, plans, strict=True))

    def scan_forward(
        self, cell: Cell, gx: Tensor, h: Tensor, c: Tensor | None, t: Tensors, *, t0: int, reverse: bool, save: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        plan = _plan(cell, "forward", t)
        with on_device_of(gx):
            return _regime(plan).forward(
                cell, gx, h, c, t, bias_inside(cell, t), t0=t0, reverse=reverse, save=save, plan=plan
            )

    def scan_backward(
        self, cell: Cell, grads: Outputs, y: Tensor, c_all: Tensor | None, gates: Tensor | None, t: Tensors, o: Options
    ) -> ScanGradients:
        plan = _plan(cell, "backward", t)
        with on_device_of(y):
            found = _regime(plan).backward(
                cell, grads, y, c_all, gates, t, bias_inside(cell, t), reverse=o.reverse, plan=plan
            )
        return ScanGradients(*found)


def kind(dtype: torch.dtype) -> str:
    """How products treat their operands: TF32 exactly where torch allows it to cuDNN's recurrent layers."""
    if dtype != torch.float32:
        return "half"
    allowed = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if allowed == "tf32" else "ieee"


def on_device_of(v: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(v.device) if v.is_cuda else contextlib.nullcontext()


def _plan(cell: Cell, side: str, t: Tensors) -> Plan:
    hidden = t.w_hh.shape[0] // cell.gates
    proj = 0 if t.w_hr is None else t.w_hr.shape[0]
    return _planned(cell.name, side, hidden, proj, kind(t.x.dtype), chip(t.x.device.index), t.x.shape[1])


def _planned(cell: str, side: str, hidden: int, proj: int, operands: str, capability: int, rows: int) -> Plan:
    from ..kernels import table

    if STEPWISE:
        return table.stepwise(cell, side, hidden, proj, operands, rows, "RNNKIT_TRITON_REGIME=step asks for it")
    return table.plan(cell, side, hidden, proj, operands, capability, rows)


def _regime(plan: Plan) -> Any:
    from ..kernels import persistent, step

    return persistent if plan.regime == "persistent" else step
