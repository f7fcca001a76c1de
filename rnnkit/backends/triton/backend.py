"""Backend `triton`: the kernels of rnnkit.kernels, for GPUs that Triton compiles for, and for its interpreter.

It brings the two scans; the products around them are those of scan_backend.py. Which regime a scan runs in, and with
which tiles, configs.py says. `import rnnkit` needs no Triton, and one that cannot be used is a reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ...cells import Cell
from ...reference.scan import ScanGradients
from .. import dispatch_times, gpu
from ..scan_backend import ScanBackend, bias_inside
from ..spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec
from . import configs
from .configs import LaunchConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
regimes = gpu.Regimes("RNNKIT_TRITON_REGIME", ("persistent", "step"))


@gpu.once
def installed() -> bool:
    """Whether there is a Triton; it is not imported for the answer. A mere folder of that name is none."""
    try:
        found = importlib.util.find_spec("triton")
    except ModuleNotFoundError:  # a finder that refuses it
        return False
    return found is not None and found.origin is not None


@gpu.once
def broken() -> str | None:
    """Why the Triton that is installed cannot be used; None where it can."""
    try:
        from triton import knobs  # noqa: F401
    except (ImportError, OSError) as error:
        return f"the Triton that is installed cannot be used ({error}): pip install --upgrade 'triton>=3.6'"
    return None


@gpu.once
def interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors in this process."""
    if not installed() or broken() is not None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def capability(index: int | None = None) -> int:
    """Of one CUDA device as in sm_90, None: of the current one; configs.AMD where torch was built for ROCm."""
    return gpu.capability(index) if torch.version.hip is None else configs.AMD


def chip(index: int | None = None) -> int:
    """The capability that configs.py goes by."""
    return configs.INTERPRETER if interpreted() else capability(index)


def uninstalled() -> str | None:
    """Why no kernel can run in this process, whatever its GPUs; None where they can. Asks no GPU."""
    return broken() if installed() else "Triton is not installed: pip install rnnkit[triton]"


def missing(index: int | None = None) -> str | None:
    """Why no kernel can run on the GPU of this index, None: on the current one; None where they can."""
    why = uninstalled()
    if why is not None or interpreted():
        return why
    if not gpu.present():
        return "needs a GPU, and torch sees none (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    return _unfit(torch.cuda.current_device() if index is None else index)


def _unfit(index: int) -> str | None:
    """What speaks against a GPU."""
    found = capability(index)
    if found == configs.AMD:
        name = gpu.amd(index)
        if name not in configs.CHIPS:
            return f"of AMD's GPUs its kernels are compiled for gfx942 alone, got {name}"
    elif found < configs.OLDEST:
        return (
            f"needs compute capability 8.0 or later, got a GPU of {found / 10}: of its regimes "
            f"({', '.join(regimes.names)}) none runs there, the backends torch and reference do"
        )
    return None


class Triton(ScanBackend):
    name = "triton"
    saves_narrow = True
    concurrent_directions = True

    def available(self) -> str | None:
        return regimes.wrong() or gpu.anywhere(missing)

    def unsupported(self, spec: LayerSpec) -> list[str]:
        reasons = []
        device = "cpu" if interpreted() else "cuda"
        if spec.device != device:
            how = "in Triton's interpreter runs" if interpreted() else "runs"
            reasons.append(f"{how} on the device {device}, got {spec.device}")
            reason = uninstalled()
        else:
            reason = regimes.wrong() or missing(spec.device_index)
        if reason is not None:
            reasons.append(reason)
        if spec.dtype not in DTYPES:
            reasons.append(f"computes in float32, bfloat16 and float16, got {spec.dtype}")
        if spec.hidden_size == 0:
            reasons.append("needs at least one unit, got H=0")
        if regimes.only is not None and not reasons:
            try:
                _plans(spec)
            except NotImplementedError as refused:
                reasons.append(str(refused))
        return reasons

    def auto_exclusion_reason(self, spec: LayerSpec) -> str | None:
        if interpreted():
            return "can run it in Triton's interpreter, far slower than any other; runs when named"
        return dispatch_times.unmeasured_reason(self.name, spec)

    def detail(self, spec: LayerSpec) -> str | None:
        plans = _plans(spec)
        if len({(config.regime, config.reason) for config in plans.values()}) == 1:
            return f"{plans['forward'].regime}: {plans['forward'].reason}"
        return "; ".join(f"{side} {config.regime}: {config.reason}" for side, config in plans.items())

    def scan_forward(
        self, cell: Cell, gx: Tensor, h: Tensor, c: Tensor | None, t: LayerInputs, *, t0: int, reverse: bool, save: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        config = _plan(cell, "forward", t)
        with on_device_of(gx):
            return _regime(config).forward(
                cell, gx, h, c, t, bias_inside(cell, t), t0=t0, reverse=reverse, save=save, config=config
            )

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
        config = _plan(cell, "backward", t)
        with on_device_of(y):
            return _regime(config).backward(
                cell, grads, y, c_all, gates, t, bias_inside(cell, t), reverse=o.reverse, config=config
            )


def kind(dtype: torch.dtype) -> str:
    """How products treat their operands: TF32 exactly where torch allows it to cuDNN's recurrent layers, and on AMD's
    GPUs, whose own such layers know none, to its products."""
    if dtype != torch.float32:
        return "half"
    library: Any = torch.backends.cudnn.rnn if torch.version.hip is None else torch.backends.cuda.matmul
    return "tf32" if library.fp32_precision == "tf32" else "ieee"


def on_device_of(v: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(v.device) if v.is_cuda else contextlib.nullcontext()


def _plans(spec: LayerSpec) -> dict[str, LaunchConfig]:
    """How each side of a layer runs."""
    facts = (spec.hidden_size, spec.proj_size, kind(spec.dtype), chip(spec.device_index), spec.batch)
    sides = ("forward", "backward")[: 1 + spec.train]
    return {side: _planned(spec.cell, side, *facts) for side in sides}


def _plan(cell: Cell, side: str, t: LayerInputs) -> LaunchConfig:
    hidden = t.w_hh.shape[0] // cell.gates
    proj = 0 if t.w_hr is None else t.w_hr.shape[0]
    return _planned(cell.name, side, hidden, proj, kind(t.x.dtype), chip(t.x.device.index), t.x.shape[1])


def _planned(cell: str, side: str, hidden: int, proj: int, operands: str, capability: int, rows: int) -> LaunchConfig:
    """Raises NotImplementedError where the regime that is asked for cannot."""
    if regimes.only == "step":
        return configs.stepwise(cell, side, hidden, proj, operands, rows, regimes.asks())
    config = configs.plan(cell, side, hidden, proj, operands, capability, rows)
    if regimes.only is None:
        return config
    if config.regime != regimes.only:
        raise regimes.refused(f"{side}: {config.reason}")
    return config._replace(reason=regimes.asks())


def _regime(config: LaunchConfig) -> Any:
    from ...kernels import persistent, step

    return persistent if config.regime == "persistent" else step
