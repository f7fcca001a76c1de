"""CUDA kernels on the CPU from Python: a scan of csrc/cuda/scan.h on torch tensors, by the fibers of simt.h.

`run` takes the fields of scan.h by name, as backend `cuda` gives them to a GPU. A kernel's library is built when it is
first asked for. The order of threads is `schedule`, which `scheduled` sets for a while.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
FLAVOUR = os.environ.get("RNNKIT_SIMT_FLAVOUR", "plain")
"""plain, asan or tsan: see the Makefile."""

Field = Tensor | int | bool | None


class Schedule(ctypes.Structure):
    """The order in which threads run, see simt.h."""

    _fields_ = (("seed", ctypes.c_uint64), ("ordered", ctypes.c_bool), ("launches", ctypes.c_uint64))

    def __init__(self, seed: int = 0, ordered: bool = False) -> None:
        super().__init__(seed, ordered, 0)


schedule = Schedule()


@contextlib.contextmanager
def scheduled(seed: int = 0, ordered: bool = False) -> Iterator[None]:
    """Scans inside run in this order, the same each time that it is entered."""
    global schedule
    before, schedule = schedule, Schedule(seed, ordered)
    try:
        yield
    finally:
        schedule = before


csrc, out = Path("csrc"), Path("build") / "simt"


@contextlib.contextmanager
def sources(copy: Path, folder: Path) -> Iterator[None]:
    """Kernels inside are compiled from a copy of csrc/, their libraries kept in a folder."""
    global csrc, out
    before, (csrc, out) = (csrc, out), (copy, folder)
    try:
        yield
    finally:
        csrc, out = before


class State(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("opmath", ctypes.c_bool))


SIZES = ("n", "B", "H", "N", "t0", "total")
SEQUENCE = (
    *((name, ctypes.c_int64) for name in SIZES),
    *((name, ctypes.c_bool) for name in ("reverse", "relu")),
    *((name, ctypes.c_void_p) for name in ("lengths", "reset")),
    *((name, State) for name in ("h_r", "c_r")),
    ("b_hn", ctypes.c_void_p),
    *((name, State) for name in ("h_0", "c_0")),
    ("workspace", ctypes.c_void_p),
)


class Forward(ctypes.Structure):
    _fields_ = (
        *SEQUENCE,
        *((name, ctypes.c_void_p) for name in ("gx", "w_hh", "w_hr", "y")),
        *((name, State) for name in ("h_n", "c_n")),
        *((name, ctypes.c_void_p) for name in ("c_all", "gates")),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        *SEQUENCE,
        *((name, ctypes.c_void_p) for name in ("w_t", "w_hr_t", "gy", "gc_all")),
        *((name, State) for name in ("gh_n", "gc_n")),
        *((name, ctypes.c_void_p) for name in ("y", "c_all", "gates", "dgx", "dgh", "dp")),
        *((name, State) for name in ("dh_0", "dc_0", "dh_r", "dc_r")),
    )


SIDES = {"forward": Forward, "backward": Backward}
SHAPES = {
    **dict.fromkeys(("h_0", "h_r", "h_n", "gh_n", "dh_0", "dh_r"), "BN"),
    **dict.fromkeys(("c_0", "c_r", "c_n", "gc_n", "dc_0", "dc_r"), "BH"),
    **dict.fromkeys(("y", "gy", "dp"), "nBN"),
    **dict.fromkeys(("c_all", "gc_all"), "nBH"),
    "lengths": "B",
    "reset": "tB",
    "b_hn": "H",
    "w_hr": "NH",
    "w_hr_t": "HN",
}
"""Of the fields whose shape does not depend on the cell; t is the whole sequence."""


@functools.cache
def generator() -> ModuleType:
    """csrc/cuda/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "csrc" / "cuda" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not() -> str | None:
    """Why libraries cannot be built here; None where they can."""
    missing = [tool for tool in ("make", os.environ.get("CXX", "g++").split()[0]) if shutil.which(tool) is None]
    return f"there is no {' and no '.join(missing)}" if missing else None


def built(name: str, flavour: str = FLAVOUR) -> Path:
    """The library of a kernel, or `toys`, up to date. One process at a time builds."""
    target = out / flavour / f"{name}.so"
    lock = ROOT / "build" / "simt" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if name != "toys":
            names = [path.stem for path in generator().write(ROOT / "build" / "cuda")]
            if name not in names:
                raise ValueError(f"there is no CUDA kernel {name!r}; there are {', '.join(names)}")
        command = ["make", "-s", f"SIMT_CSRC={csrc}", f"SIMT_OUT={out}", str(target)]
        # A compiler with a sanitizer in it is a slow one.
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{target} cannot be built:\n{done.stdout}{done.stderr}")
    return ROOT / target


def sanitizer(flavour: str) -> dict[str, str]:
    """Variables of the environment in which a process can load libraries of a flavour."""
    if flavour == "plain":
        return {}
    command = [*os.environ.get("CXX", "g++").split(), f"-print-file-name=lib{flavour}.so"]
    found = subprocess.check_output(command, text=True).strip()
    # Python and torch leave memory behind at exit.
    return {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "RNNKIT_SIMT_FLAVOUR": flavour}


def library(name: str) -> ctypes.CDLL:
    """The library, built when it is first asked for."""
    return loaded(out, name)


@functools.cache
def loaded(folder: Path, name: str) -> ctypes.CDLL:
    found = ctypes.CDLL(str(built(name)))
    found.rnnkit_simt_kernels.restype = ctypes.c_char_p
    return found


def kernels(name: str) -> list[str]:
    """What the library of a kernel lists: it alone."""
    return library(name).rnnkit_simt_kernels().decode().split()


def structure(side: str, fields: Mapping[str, Field]) -> Forward | Backward:
    """The fields in C. Tensors are contiguous, on the CPU, of the dtype and shape that scan.h says."""
    result = SIDES[side]()
    kinds = dict(result._fields_)
    stored = fields["gx" if side == "forward" else "y"]
    assert isinstance(stored, Tensor)
    sizes = {"n": fields["n"], "B": fields["B"], "H": fields["H"], "N": fields["N"], "t": fields["total"]}
    for name, value in fields.items():
        if name not in kinds or name == "workspace":
            raise TypeError(f"{side} has no field {name!r}; it has {', '.join(kinds)}")
        if value is None:
            continue
        if not isinstance(value, Tensor):
            setattr(result, name, value)
            continue
        dtypes = {"lengths": (torch.int64,), "reset": (torch.bool,)}.get(name, (stored.dtype,))
        if kinds[name] is State and stored.dtype.itemsize < 4:
            dtypes = (stored.dtype, torch.float32)
        if value.dtype not in dtypes:
            raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
        if not value.is_contiguous() or value.device.type != "cpu":
            raise ValueError(f"{name}: expected a contiguous tensor of the CPU, got strides {value.stride()}")
        shape = tuple(sizes[letter] for letter in SHAPES[name]) if name in SHAPES else tuple(value.shape)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
        opmath = value.dtype in (torch.float32, torch.float64)
        setattr(result, name, State(value.data_ptr(), opmath) if kinds[name] is State else value.data_ptr())
    return result


def run(name: str, side: str, fields: Mapping[str, Field]) -> None:
    """One scan, `forward` or `backward`, of a kernel. Raises RuntimeError with what the scheduler says."""
    arguments = structure(side, fields)
    reason = ctypes.create_string_buffer(1024)
    call = getattr(library(name), f"rnnkit_simt_{side}")
    if call(name.encode(), ctypes.byref(arguments), ctypes.byref(schedule), reason, ctypes.c_int64(len(reason))):
        raise RuntimeError(reason.value.decode())


def forward(name: str, **fields: Field) -> None:
    run(name, "forward", fields)


def backward(name: str, **fields: Field) -> None:
    run(name, "backward", fields)
