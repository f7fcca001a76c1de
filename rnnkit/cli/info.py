"""`python -m rnnkit info`: what this machine can run, and how to get what is missing.

Versions, the C++ extension, Triton, CUDA devices, CPU threads and what limits them, for each backend whether it can run
here at all, and which have kernels of custom cells. Which one runs a given layer, `rnnkit.explain(layer, x)` says.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from .. import __version__
from ..backends import BACKENDS, user_times
from ..backends.cpu import extension
from ..backends.dispatch_times import said
from ..backends.triton import backend as triton
from ..custom import choose

NO_TRITON = "not installed: pip install rnnkit[triton]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="the same as a JSON object")


def main(options: argparse.Namespace) -> int:
    """Print it; returns the exit code."""
    found = gather()
    print(json.dumps(found, indent=2) if options.json else table(found))
    return 0


def versions() -> dict[str, str]:
    """What the numbers of this process depend on."""
    return {
        "rnnkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def gather() -> dict[str, Any]:
    """Everything that the command says, for a program; a `reason` is None where nothing is missing."""
    triton = _triton()
    reasons = {backend.name: backend.available() for backend in BACKENDS}
    return {
        **versions(),
        "extension": {
            "available": extension.available(),
            "reason": extension.reason() or None,
            "variants": list(extension.variants),
        },
        "cuda_kernels": {
            "count": len(extension.cuda_kernels),
            "toolkit": next(iter(extension.cuda_built), None),
            "chips": list(extension.cuda_built[1:]),
            "reason": extension.cuda_missing or None,
        },
        "triton": {"version": triton, "reason": None if triton else NO_TRITON},
        "cuda": {"torch_built_for": torch.version.cuda, "devices": _devices()},
        "threads": torch.get_num_threads(),
        "workers": _workers(),
        "dispatch_times": _times(),
        "custom_cells": _custom_cells(),
        "backends": {name: {"available": why is None, "reason": why} for name, why in reasons.items()},
    }


def table(found: dict[str, Any]) -> str:
    """The same in aligned lines."""
    devices = [f"{d['name']} (sm_{d['capability']}, {d['memory_mib']} MiB)" for d in found["cuda"]["devices"]]
    none = "no device" if found["cuda"]["torch_built_for"] else "no device: this torch is built without CUDA"
    rows = [(name, found[name]) for name in versions()]
    rows += [
        ("extension", found["extension"]["reason"] or "available"),
        ("variants", _chosen_first(found["extension"]["variants"])),
        ("CUDA kernels", kernels(found["cuda_kernels"])),
        ("triton", found["triton"]["version"] or found["triton"]["reason"]),
        ("CUDA", "; ".join(devices) or none),
        ("CPU threads", found["threads"]),
        ("CPU workers", _bounded(found["workers"])),
        ("times", times(found["dispatch_times"])),
        ("custom cells", custom_cells(found["custom_cells"])),
        ("backends", ""),
    ]
    for name, backend in found["backends"].items():
        rows.append((f"  {name}", "runs here" if backend["available"] else f"cannot run here: {backend['reason']}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def kernels(found: dict[str, Any]) -> str:
    """What the extension has of CUDA, in a line."""
    return found["reason"] or f"{found['count']}, compiled by CUDA {found['toolkit']} for {', '.join(found['chips'])}"


def custom_cells(found: dict[str, Any]) -> str:
    """What runs a user's own step, in a line."""
    kernels = [
        f"on {device} by backend {backend['name']}"
        if backend["reason"] is None
        else f"not on {device}: {backend['reason']}"
        for device, backend in found["kernels"].items()
    ]
    return f"{found['instructions']} instructions in the engine; kernels from steps {'; '.join(kernels)}"


def times(found: dict[str, Any]) -> str:
    """Whose times put the backends in order on a CPU, in a line."""
    if found["reason"] is None:
        return f"this machine's, {found['rows']} rows for {', '.join(found['recorded'])}, in {found['path']}"
    where = f" {found['path']}:" if found["path"] else ""
    return f"rnnkit's own; of this machine,{where} {found['reason']}"


def _custom_cells() -> dict[str, Any]:
    """How many instructions the engine knows, and whether a step becomes a kernel on each kind of device."""
    instructions = len(torch.ops.rnnkit.cpu_program_ops().split()) if extension.native is not None else 0
    kernels = {}
    for device, name in choose.DEVICES.items():
        reasons = choose.unable(name, device)
        kernels[device] = {"name": name, "reason": "; ".join(reasons) or None}
    return {"instructions": instructions, "kernels": kernels}


def _times() -> dict[str, Any]:
    table = user_times.load()
    recorded = dict.fromkeys(f"{row.kind.isa} {row.kind.dtype} {said(row.threads)}" for row in table.rows)
    path = None if table.path is None else str(table.path)
    return {"path": path, "rows": len(table.rows), "recorded": list(recorded), "reason": table.reason}


def _chosen_first(variants: list[str]) -> str:
    return f"{variants[0]}, chosen of {', '.join(variants)}" if variants else "none that runs"


def _workers() -> dict[str, Any] | None:
    """The threads of the CPU engine and what bounds them: 0 where nothing does, None where the engine cannot run."""
    found = extension.workers()
    return None if found is None else {**found._asdict(), "limit": found.limit}


def _bounded(found: dict[str, Any] | None) -> str:
    return f"{found['workers']}, bound by {found['limit']}" if found else "none: the engine cannot run here"


def _triton() -> str | None:
    if not triton.installed():
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _devices() -> list[dict[str, Any]]:
    every = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}{p.minor}", "memory_mib": p.total_memory // 2**20} for p in every]
