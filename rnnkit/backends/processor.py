"""What this processor is and can do, as far as recorded times depend on it: its name, its instruction set, and the
products in bfloat16 that torch finds on it and the engine does not use.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform

import torch

from .cpu import extension

# Of /proc/cpuinfo, on x86-64 and on Arm: what tells one kind of processor from another.
IDENTITY = (
    "cpu family",
    "model",
    "flags",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "Features",
)
BELOW_AMX = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
             "AVX512_CORE_FP16")  # fmt: skip
BELOW_BF16 = BELOW_AMX[:-2]
"""Values of ONEDNN_MAX_CPU_ISA under which oneDNN uses no AMX, and no dot products in bfloat16 either."""


@functools.cache
def facts() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor, by its names; empty where there is none."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:  # a system with many processors makes the lines as they are read
                name, colon, value = line.partition(":")
                if not colon and found:
                    break
                found[name.strip()] = value.strip()
    except OSError:
        return {}
    return found


@functools.cache
def identity() -> str:
    """The model's name and a digest of what it can do: "AMD EPYC, 1f0c9a2e"."""
    known = facts()
    name = known.get("model name") or platform.processor() or platform.machine()
    able = [known.get(key, "") for key in IDENTITY] if known else [torch.backends.cpu.get_cpu_capability()]
    digest = hashlib.sha256("\n".join(able).encode()).hexdigest()[:8]
    return f"{name}, {digest}"


def instruction_set(dtype: torch.dtype) -> str:
    """The one by which times in this dtype are recorded: the engine's variant in use. Empty where there is no engine.

    A variant with dot products of bfloat16 is another one in that dtype alone. The baseline of Arm has a name of its
    own: it has nothing to do with that of x86-64.
    """
    if not extension.variants:
        return ""
    name = extension.variants[0]
    if name == "baseline" and platform.machine().lower() in ("aarch64", "arm64"):
        name = "neon"
    return name if dtype == torch.bfloat16 else name.removesuffix("_bf16")


def computes_in(dtype: torch.dtype) -> bool:
    """Whether the engine multiplies in this dtype. Others it widens to float32 first."""
    if dtype == torch.bfloat16:
        return bool(extension.variants) and extension.variants[0].endswith("_bf16")
    return dtype in (torch.float32, torch.float64)


@functools.cache
def _bfloat16_products() -> str:
    flags = facts().get("flags", "").split()
    held = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    if "amx_bf16" in flags and held not in BELOW_AMX:
        return "amx_bf16"
    return "avx512_bf16" if "avx512_bf16" in flags and held not in BELOW_BF16 else ""


def unused_bfloat16() -> str:
    """Products of bfloat16 that oneDNN has on this processor and the engine does not use: "amx_bf16" or "avx512_bf16";
    empty where there are none."""
    found = _bfloat16_products()
    return "" if found == "avx512_bf16" and computes_in(torch.bfloat16) else found
