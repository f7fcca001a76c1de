"""What the kernel backends ask of this machine's GPUs, each question once, and how they take a regime by its name.

A process that was forked from one that used CUDA may ask nothing. So nothing here is called for tensors on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import ParamSpec, TypeVar

import torch

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

    def refused(self, why: object) -> NotImplementedError:
        """What is raised where the regime that was asked for by name cannot run a scan."""
        others = ", ".join(name for name in self.names if name != self.only)
        return NotImplementedError(f"{self.variable}={self.only}: {why}. Unset it, or name {others}")

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """For a block, in every thread: a backward on a GPU runs in one of autograd's own."""
        before, self.only = self.only, name
        try:
            yield
        finally:
            self.only = before
