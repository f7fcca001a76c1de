"""What the kernel backends ask of this machine's GPUs, each question once, and how they take a regime by its name.

A process that was forked from one that used CUDA may ask nothing. So nothing here is called for tensors on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
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


def unknown(variable: str, regime: str | None, regimes: Iterable[str]) -> str | None:
    """What is wrong with the name of a regime in the environment."""
    if regime is None or regime in regimes:
        return None
    return f"{variable} must be one of {', '.join(regimes)} or unset, got {regime!r}"


def check(variable: str, regime: str | None, regimes: Iterable[str]) -> None:
    """Raises ValueError where the name is none."""
    wrong = unknown(variable, regime, regimes)
    if wrong is not None:
        raise ValueError(wrong)


def refused(variable: str, regime: str, regimes: Iterable[str], why: object) -> NotImplementedError:
    """What is raised where a regime that was asked for by name cannot run a scan."""
    return NotImplementedError(f"{variable}={regime}: {why}. Unset it, or name another of {', '.join(regimes)}")
