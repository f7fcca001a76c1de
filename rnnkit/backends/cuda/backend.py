"""Backend `cuda`: the kernels of csrc/cuda, for NVIDIA GPUs from compute capability 8.0 on.

It brings the two scans; the products around them are those of scan_backend.py. Which kernel runs a scan, configs.py
says. A `Machine` is what they run on: this process' GPUs, or a CPU that executes the same sources (tests/cuda/simt).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cells import CELLS, Cell, compute_dtype
from ...reference.scan import ScanGradients
from .. import dispatch_times, gpu
from ..cpu import extension
from ..scan_backend import ScanBackend, bias_inside
from ..spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec
from . import configs
from .configs import CompiledKernel

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "f64"}
regimes = gpu.Regimes("RNNKIT_CUDA_REGIME", configs.REGIMES)

Run = Callable[[str, str, dict[str, Any]], None]
"""run(kernel, side, fields): `fields` by the names of csrc/cuda/scan.h."""


class Machine(NamedTuple):
    """Where the kernels run."""

    device: str
    capability: Callable[[int | None], int]
    """Of a device by its index, as in sm_90; None: of the current one."""
    run: Run


COMMON = ("h_0", "c_0", "lengths", "reset", "h_r", "c_r")
FORWARD = ("gx", "w_hh", "w_hr", "b_hn", *COMMON, "y", "h_n", "c_n", "c_all", "gates")
GIVEN = ("gy", "gh_n", "gc_n", "gc_all")
BACKWARD = ("w_t", "w_hr_t", *COMMON, *GIVEN, "y", "c_all", "gates", "dgx", "dgh", "dp", "dh_0", "dc_0", "dh_r", "dc_r")
"""The operands of cuda_scan_forward and cuda_scan_backward (csrc/cuda/ops.cpp), in order."""


def launch(kernel: str, side: str, fields: dict[str, Any]) -> None:
    """On the tensors' device, on its current stream. Never waits."""
    flags = (fields["reverse"], fields["relu"])
    if side == "forward":
        torch.ops.rnnkit.cuda_scan_forward(kernel, fields["t0"], *flags, *(fields[name] for name in FORWARD))
    else:
        torch.ops.rnnkit.cuda_scan_backward(kernel, *flags, *(fields[name] for name in BACKWARD))


machine = Machine("cuda", gpu.capability, launch)
simulated = False
"""Whether `machine` is a CPU that executes the kernels' sources."""


@contextlib.contextmanager
def simulation(run: Run, capability: int = 90) -> Iterator[None]:
    """For a block: kernels on CPU tensors, by whoever can execute their sources."""
    global machine, simulated
    before = machine, simulated
    machine, simulated = Machine("cpu", lambda index: capability, run), True
    try:
        yield
    finally:
        machine, simulated = before


def unbuilt() -> str | None:
    """Why no kernel can run in this process, whatever its GPUs; None where they can. Asks no GPU."""
    if simulated:
        return None
    if extension.cuda_missing:
        return extension.cuda_missing
    return None if torch.version.hip is None else "needs an NVIDIA GPU, and this torch is built for AMD's"


def missing(index: int | None = None) -> str | None:
    """Why no kernel can run on the GPU of this index, None: on the current one; None where they can."""
    why = unbuilt()
    if why is not None or simulated:
        return why
    if not gpu.present():
        return "needs a GPU, and torch sees none"
    return _unfit(torch.cuda.current_device() if index is None else index)


def _unfit(index: int) -> str | None:
    """What speaks against a GPU and its driver."""
    capability, (toolkit, *chips) = gpu.capability(index), extension.cuda_built
    old = configs.too_old(capability)
    if old is not None:
        return old
    if not extension.cuda_serves(capability, tuple(chips)):
        return f"its kernels are compiled for {', '.join(chips)}, got a GPU of {capability / 10}; build again for it"
    # The runtime is linked in. It runs on any driver of its generation; PTX is compiled by the driver, so by no older.
    major, minor = (int(n) for n in toolkit.split("."))
    code = [chip for chip in chips if chip.startswith("sm_")]
    wanted = 1000 * major + (0 if extension.cuda_serves(capability, tuple(code)) else 10 * minor)
    served = gpu.driver()
    if served is None or served >= wanted:
        return None
    own = gpu.release(served)
    return (
        f"compiled by CUDA {toolkit}, needs a driver for {gpu.release(wanted)} or later, got one for {own}: update the "
        f"driver, or build again with the nvcc of {own} or older"
    )


class CUDA(ScanBackend):
    name = "cuda"
    saves_narrow = True
    concurrent_directions = True

    def available(self) -> str | None:
        return regimes.wrong() or gpu.anywhere(missing)

    def unsupported(self, spec: LayerSpec) -> list[str]:
        reasons = []
        if spec.device != machine.device:
            reasons.append(f"runs on the device {machine.device}, got {spec.device}")
            reason = unbuilt()
        else:
            reason = regimes.wrong() or missing(spec.device_index)
        if reason is not None:
            reasons.append(reason)
        if spec.dtype not in (torch.float32, *KINDS):
            reasons.append(f"computes in float32, float64, bfloat16 and float16, got {spec.dtype}")
        if spec.hidden_size == 0:
            reasons.append("needs at least one unit, got H=0")
        if regimes.only is not None and not reasons:
            try:
                _planned(spec)
            except NotImplementedError as refused:
                reasons.append(str(refused))
        return reasons

    def auto_exclusion_reason(self, spec: LayerSpec) -> str | None:
        if simulated:
            return "can run it on a CPU that executes its kernels, far slower than any other; runs when named"
        return dispatch_times.unmeasured_reason(self.name, spec)

    def detail(self, spec: LayerSpec) -> str | None:
        row, why = _planned(spec)
        return f"{row.regime}: {why} ({row.name})"

    def scan_forward(
        self, cell: Cell, gx: Tensor, h: Tensor, c: Tensor | None, t: LayerInputs, *, t0: int, reverse: bool, save: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        n, rows = gx.shape[:2]
        hidden, size = t.w_hh.shape[0] // cell.gates, t.w_hh.shape[1]
        y = gx.new_empty((n, rows, size))
        h_n = torch.empty_like(h, memory_format=torch.contiguous_format)
        c_n = None if c is None else torch.empty_like(c, memory_format=torch.contiguous_format)
        c_all = gx.new_empty((n, rows, hidden)) if cell.has_c and save else None
        gates = gx.new_empty((n, rows, cell.saved * hidden)) if cell.saved and save else None
        fields = _common(cell, t, reverse, t0, t0 + n)
        fields |= {"gx": gx.contiguous(), "w_hh": t.w_hh.contiguous(), "w_hr": _solid(t.w_hr)}
        fields |= {"b_hn": _solid(bias_inside(cell, t)), "h_0": h.contiguous(), "c_0": _solid(c)}
        fields |= {"y": y, "h_n": h_n, "c_n": c_n, "c_all": c_all, "gates": gates, "n": n, "B": rows}
        if rows:
            machine.run(_row(cell, t).name, "forward", {**fields, "H": hidden, "N": size})
        return y, h_n, c_n, c_all, gates

    def scan_backward(
        self,
        cell: Cell,
        grads: LayerOutputs,
        y: Tensor,
        c_all: Tensor | None,
        gates: Tensor | None,
        t: LayerInputs,
        o: LayerOptions,
    ) -> ScanGradients:
        n, rows, size = y.shape
        hidden = t.w_hh.shape[0] // cell.gates
        wide = compute_dtype(y.dtype)
        dgx = y.new_empty((n, rows, t.w_hh.shape[0]))
        dgh = torch.empty_like(dgx) if cell.reset_after else dgx
        dp = y.new_empty(y.shape) if t.w_hr is not None else None
        dh_0 = y.new_empty((rows, size), dtype=t.h_0.dtype)
        dc_0 = None if t.c_0 is None else y.new_empty((rows, hidden), dtype=t.c_0.dtype)
        dh_r = dc_r = None
        if t.reset is not None:
            dh_r = y.new_empty((rows, size), dtype=wide)
            dc_r = y.new_empty((rows, hidden), dtype=wide) if cell.has_c else None
        fields = _common(cell, t, o.reverse, 0, n)
        fields |= {"w_t": t.w_hh.t().contiguous(), "w_hr_t": None if t.w_hr is None else t.w_hr.t().contiguous()}
        fields |= {"h_0": t.h_0.contiguous(), "c_0": _solid(t.c_0), "y": y.contiguous()}
        fields |= {"c_all": _solid(c_all), "gates": _solid(gates)}
        fields |= dict(zip(GIVEN, (_solid(g) for g in grads), strict=True))
        fields |= {"dgx": dgx, "dgh": dgh, "dp": dp, "dh_0": dh_0, "dc_0": dc_0, "dh_r": dh_r, "dc_r": dc_r}
        if rows:
            machine.run(_row(cell, t).name, "backward", {**fields, "n": n, "B": rows, "H": hidden, "N": size})
        dh_r, dc_r = (None if v is None else v.to(t.h_0.dtype) for v in (dh_r, dc_r))
        return ScanGradients(dgx, dgh, dh_0, dc_0, dh_r, dc_r, dp)


def kind(dtype: torch.dtype) -> str:
    """How products treat their operands: TF32 exactly where torch allows it to cuDNN's recurrent layers."""
    if dtype in KINDS:
        return KINDS[dtype]
    allowed = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if allowed == "tf32" else "ieee"


def planned(
    cell: str, hidden: int, proj: int, operands: str, batch: int, capability: int
) -> tuple[CompiledKernel, str]:
    """The kernel that runs a scan, and why. Raises NotImplementedError where the regime that is asked for cannot."""
    facts = (cell, hidden, proj, operands, batch, capability)
    if regimes.only is None:
        return configs.plan(*facts)
    try:
        return configs.plan(*facts, regimes.only)[0], regimes.asks()
    except ValueError as why:
        raise regimes.refused(why) from None


def _planned(spec: LayerSpec) -> tuple[CompiledKernel, str]:
    sizes = (spec.hidden_size, spec.proj_size, kind(spec.dtype), spec.batch)
    return planned(spec.cell, *sizes, machine.capability(spec.device_index))


def _row(cell: Cell, t: LayerInputs) -> CompiledKernel:
    proj = 0 if t.w_hr is None else t.w_hr.shape[0]
    chip = machine.capability(t.x.device.index)
    return planned(cell.name, t.w_hh.shape[0] // cell.gates, proj, kind(t.x.dtype), t.x.shape[1], chip)[0]


def _common(cell: Cell, t: LayerInputs, reverse: bool, t0: int, end: int) -> dict[str, Any]:
    total = end if t.reset is None else t.reset.shape[0]
    flags = {"t0": t0, "total": total, "reverse": reverse, "relu": cell is CELLS["rnn_relu"]}
    read = {"lengths": t.lengths, "reset": t.reset, "h_r": t.h_reset, "c_r": t.c_reset}
    return flags | {name: _solid(v) for name, v in read.items()}


def _solid(v: Tensor | None) -> Tensor | None:
    """Contiguous: an expanded gradient is written out."""
    return None if v is None else v.contiguous()
