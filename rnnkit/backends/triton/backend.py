"""Backend `triton`: the kernels of rnnkit.kernels, for GPUs that Triton compiles for, and for its interpreter.

It brings the two scans; the products around them are those of scan_backend.py. Which regime a scan runs in, and with
which tiles, configs.py says. `import rnnkit` needs no Triton, and one that cannot be used is a reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...cells import Cell
from ...reference.scan import ScanGradients
from .. import gpu
from ..base import no_kernel
from ..scan_backend import bias_inside
from ..spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec
from . import configs
from .configs import LaunchConfig

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


class Triton(gpu.GPUBackend[LaunchConfig]):
    name = "triton"
    regimes = regimes
    cells = configs.KERNEL_OF
    dtypes: ClassVar = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

    def runs_on(self) -> tuple[str, str]:
        return ("cpu", "in Triton's interpreter runs") if interpreted() else ("cuda", "runs")

    def unbuilt(self) -> str | None:
        return uninstalled()

    def missing(self, index: int | None) -> str | None:
        return missing(index)

    def slowly(self) -> str | None:
        if interpreted():
            return "can run it in Triton's interpreter, far slower than any other; runs when named"
        return None

    def select_config(self, spec: LayerSpec) -> gpu.KernelConfig[LaunchConfig] | gpu.Reason:
        """A kernel of the table for each scan, or the step regime, which takes any size."""
        if spec.cell not in configs.KERNEL_OF:
            return gpu.Reason(no_kernel(spec.cell))
        launches: list[LaunchConfig] = []
        for side in configs.SIDES[: 1 + spec.train]:
            sizes = (spec.cell, side, spec.hidden_size, spec.proj_size)
            if regimes.only == "step":
                tile = configs.step_tile(*sizes, spec.batch)
                launches.append(configs.step_config(tile, kind(spec.dtype), regimes.asks()))
                continue
            found = configs.launch_config(*sizes, kind(spec.dtype), chip(spec.device_index), spec.batch)
            if regimes.only is not None:
                if found.regime != regimes.only:
                    return regimes.refused(f"{side}: {found.reason}")
                found = found._replace(reason=regimes.asks())
            launches.append(found)
        return gpu.KernelConfig(launches[0], launches[1] if spec.train else None)

    def scan_forward(
        self, cell: Cell, gx: Tensor, h: Tensor, c: Tensor | None, t: LayerInputs, *, t0: int, reverse: bool, save: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        config = self.config(cell, t, train=False).forward
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
        config = self.config(cell, t, train=True).backward
        assert config is not None
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


def _regime(config: LaunchConfig) -> Any:
    from ...kernels import persistent, step

    return persistent if config.regime == "persistent" else step
