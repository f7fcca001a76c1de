"""Holds a command to an instruction set, rnnkit and torch's libraries alike.

A processor with AVX-512 can then show what AVX2 gives, which most users have. The libraries read their
settings once, when they are loaded: a command that is to be held starts itself anew, with the settings in its
environment, before it does anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

import torch

from ..backends.cpu import extension

# By name, widest first: what ATen's operators, oneDNN and MKL are told. MKL_ENABLE_INSTRUCTIONS does not hold MKL below
# AVX2 on AMD's processors, its reproducible mode does.
SETTINGS = {
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}
VARIABLES = ("RNNKIT_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
WORDS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "the baseline"}
TORCH = {"AVX512": "avx512", "AVX2": "avx2"}  # what torch calls them; everything else is the baseline


class CannotHold(ValueError):
    """The processor lacks what was asked for, or a library does not obey; the message is one line for the user."""


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option of a command that can be held."""
    parser.add_argument(
        "--isa", choices=SETTINGS, help="hold rnnkit and torch to this instruction set; default: all that there is"
    )


def widest() -> str:
    """The widest instruction set of this processor, whatever the process is held to."""
    if torch.cpu._is_avx512_supported():
        return "avx512"
    return "avx2" if torch.cpu._is_avx2_supported() else "baseline"


def of_torch() -> str:
    """What torch's own operators use in this process."""
    return TORCH.get(torch.backends.cpu.get_cpu_capability(), "baseline")


def in_use() -> str:
    """What rnnkit's engine uses in this process; torch's where there is no engine."""
    if not extension.variants:
        return of_torch()
    return next((name for name in SETTINGS if extension.variants[0].startswith(name)), "baseline")


def able() -> tuple[str, ...]:
    """What this processor can be held to, widest first."""
    names = tuple(SETTINGS)
    return names[names.index(widest()) :]


def here() -> tuple[str, ...]:
    """What is worth measuring on this processor: the widest, and AVX2, which most users have, where that is less."""
    return tuple(name for name in able() if name in (widest(), "avx2"))


def mixed() -> str | None:
    """That rnnkit and torch are held to different instruction sets, in words; None where they are not."""
    if in_use() == of_torch():
        return None
    return (
        f"rnnkit runs by {WORDS[in_use()]} and torch by {WORDS[of_torch()]}: no fair comparison; "
        "--isa holds both to one"
    )


def environment(isa: str, settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that is held to `isa`: this one's, with every one of VARIABLES set or taken away.

    settings: others than SETTINGS has for it."""
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    wanted = SETTINGS[isa] if settings is None else settings
    settings = wanted if torch.cpu._is_avx2_supported() else {}  # no other kind of processor knows these words
    engine = max((name for name in extension.variants if name.startswith(isa)), key=len, default=isa)
    return {**others, **settings, "RNNKIT_CPU_ISA": engine}  # with every extension of the set that the processor has


def hold(isa: str) -> None:
    """Return where this process is held to `isa`; else start its command anew so that it is, and do not return.

    Raises CannotHold where the processor lacks it, or where the settings are in the environment and have no effect.
    """
    if isa not in able():
        raise CannotHold(f"--isa {isa}: this processor has no {WORDS[isa]}; it can be held to {', '.join(able())}")
    wanted = environment(isa)
    if any(os.environ.get(name) != wanted.get(name) for name in VARIABLES):
        if "--isa" not in (word.partition("=")[0] for word in sys.orig_argv):
            settings = " ".join(f"{name}={wanted[name]}" for name in VARIABLES if name in wanted)
            raise CannotHold(f"--isa {isa}: only a command can start itself anew; start this program with {settings}")
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
    if (in_use(), of_torch()) != (isa, isa):
        raise CannotHold(
            f"--isa {isa}: the settings are in the environment, and rnnkit still runs by {WORDS[in_use()]}, torch by "
            f"{WORDS[of_torch()]}; {extension.refusal or 'a library was loaded before they were set'}"
        )


if __name__ == "__main__":
    print(*here())
