"""What backends `cuda` and `triton` share: what they ask of this machine's GPUs, each question once, how they take a
regime by its name, and the form of the answer to which kernels run a layer.

A process that was forked from one that used CUDA may ask nothing. So nothing here is called for tensors on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import ClassVar, Generic, ParamSpec, Protocol, TypeVar

import torch

from ..cells import Cell
from . import dispatch_times
from .base import no_kernel
from .scan_backend import ScanBackend
from .spec import LayerInputs, LayerOptions, LayerSpec, describe

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


def once(ask: Callable[Asked, Answer]) -> Callable[Asked, Answer]:
    """Asks one time in a process. To torch.compile the answer is a constant, as torch.compiler.assume_constant_result
    makes it, which would import the compiler with the package."""
    known = functools.cache(ask)

    @functools.wraps(ask)
    def answer(*args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
        return known(*args, **kwargs)  # type: ignore[arg-type]

    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return answer


@once
def present() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


@once
def capability_of(index: int) -> int:
    """Of one NVIDIA GPU, as 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(index: int | None = None) -> int:
    """Of one NVIDIA GPU; None: of the current one."""
    return capability_of(torch.cuda.current_device() if index is None else index)


@once
def amd(index: int) -> str:
    """The name of one of AMD's GPUs, like gfx942."""
    return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]


@once
def driver() -> int | None:
    """The newest CUDA that the driver serves, as 12080 for 12.8; None where torch cannot tell."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if ask is None else ask()


def release(version: int) -> str:
    """Of CUDA, from 12080."""
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def anywhere(missing: Callable[[int | None], str | None]) -> str | None:
    """None where one of the GPUs serves, else why the first does not; missing(None) where there is none."""
    reasons = [missing(k) for k in range(torch.cuda.device_count()) or (None,)]
    return None if None in reasons else reasons[0]


class Reason(str):
    """Why no kernel of a backend runs a layer."""


class ScanConfig(Protocol):
    """How one scan runs, as far as both backends' tables say it alike."""

    @property
    def regime(self) -> str: ...

    @property
    def reason(self) -> str: ...


Config = TypeVar("Config", bound=ScanConfig, covariant=True)


class KernelConfig(Generic[Config]):
    """The kernels that run a layer's scans. `str()` says which and why, for `explain`."""

    def __init__(self, forward: Config, backward: Config | None) -> None:
        self.forward = forward
        self.backward = backward
        """None where no gradient follows."""

    def __str__(self) -> str:
        sides = {"forward": self.forward, "backward": self.backward}
        said = {side: f"{c.regime}: {c.reason}" for side, c in sides.items() if c is not None}
        if len(set(said.values())) == 1:
            return said["forward"]
        return "; ".join(f"{side} {text}" for side, text in said.items())


class Regimes:
    """The regimes of a backend, and `only`: the one that may run its scans, whatever its table says; None: any. An
    environment variable names it, or `alone` does for a block."""

    def __init__(self, variable: str, names: Collection[str]) -> None:
        self.variable, self.names = variable, names
        self.only = os.environ.get(variable) or None
        wrong = self.wrong()
        if wrong is not None:
            warnings.warn(f"{wrong}: the backend runs nothing on a GPU", stacklevel=2)

    def wrong(self) -> str | None:
        """What is wrong with the name that was given."""
        if self.only is None or self.only in self.names:
            return None
        return f"{self.variable} must be one of {', '.join(self.names)} or unset, got {self.only!r}"

    def asks(self) -> str:
        """Why a scan runs as it does."""
        return f"{self.variable}={self.only} asks for it"

    def refused(self, why: object) -> Reason:
        """Why the regime that was asked for by name cannot run a scan."""
        others = ", ".join(name for name in self.names if name != self.only)
        return Reason(f"{self.variable}={self.only}: {why}. Unset it, or name {others}")

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """For a block, in every thread: a backward on a GPU runs in one of autograd's own."""
        before, self.only = self.only, name
        try:
            yield
        finally:
            self.only = before


class GPUBackend(ScanBackend, Generic[Config]):
    """A backend whose scans are kernels for GPUs, chosen from a table of its own."""

    saves_narrow = True
    concurrent_directions = True
    regimes: Regimes
    cells: Collection[str]
    """Those that it has kernels for."""
    dtypes: ClassVar[dict[torch.dtype, str]]
    """Those that it computes in, with their names in words."""

    def runs_on(self) -> tuple[str, str]:
        """The type of device, and "runs" or how else it runs there."""
        raise NotImplementedError(self.name)

    def unbuilt(self) -> str | None:
        """Why no kernel can run in this process, whatever its GPUs. Asks no GPU."""
        raise NotImplementedError(self.name)

    def missing(self, index: int | None) -> str | None:
        """Why no kernel can run on the GPU of this index, None: on the current one."""
        raise NotImplementedError(self.name)

    def select_config(self, spec: LayerSpec) -> KernelConfig[Config] | Reason:
        """The kernels of the table that run a layer, or why none does."""
        raise NotImplementedError(self.name)

    def config(self, cell: Cell, t: LayerInputs, *, train: bool) -> KernelConfig[Config]:
        """The same for tensors. Raises NotImplementedError with the reason."""
        found = self.select_config(describe(cell.name, t, LayerOptions(), train=train))
        if isinstance(found, Reason):
            raise NotImplementedError(found)
        return found

    def available(self) -> str | None:
        return self.regimes.wrong() or anywhere(self.missing)

    def unsupported(self, spec: LayerSpec) -> list[str]:
        reasons = []
        device, how = self.runs_on()
        if spec.device != device:
            reasons.append(f"{how} on the device {device}, got {spec.device}")
            reason = self.unbuilt()
        else:
            reason = self.regimes.wrong() or self.missing(spec.device_index)
        if reason is not None:
            reasons.append(reason)
        if spec.cell not in self.cells:
            reasons.append(no_kernel(spec.cell))
        if spec.dtype not in self.dtypes:
            *names, last = self.dtypes.values()
            reasons.append(f"computes in {', '.join(names)} and {last}, got {spec.dtype}")
        if spec.hidden_size == 0:
            reasons.append("needs at least one unit, got H=0")
        if self.regimes.only is not None and not reasons:  # else a regime takes any size: B is not looked at
            found = self.select_config(spec)
            if isinstance(found, Reason):
                reasons.append(found)
        return reasons

    def slowly(self) -> str | None:
        """Why what runs here is too slow for `auto`; None where it is a GPU."""
        raise NotImplementedError(self.name)

    def auto_exclusion_reason(self, spec: LayerSpec) -> str | None:
        return self.slowly() or dispatch_times.unmeasured_reason(self.name, spec)

    def detail(self, spec: LayerSpec) -> str | None:
        return str(self.select_config(spec))
