"""The C++ extension: found, loaded and made known to torch's tracing here, and nowhere else.

Importing this never fails. Where the library is missing or does not load, `available()` is False and
`reason()` says why and what to do.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

_HOW = "`pip install -v --no-build-isolation -e .` in a source tree builds it, or says what is missing"
_HOW_CUDA = "with RNNKIT_CUDA=1 and nvcc, `pip install -v --no-build-isolation -e .` in a source tree builds them"


def _library(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("_C*.so"))), None)


def _load(folder: Path) -> str:
    """Load the library in `folder`. Returns why it is not available, empty where it is."""
    library = _library(folder)
    if library is None:
        return f"the C++ extension is not built in {folder}; {_HOW}"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"the C++ extension {library.name} does not load ({error}); {_HOW}"
    return ""


_FOLDER = Path(__file__).parents[2]
_reason = _load(_FOLDER)


def available() -> bool:
    """Whether the extension's operators can be called."""
    return not _reason


def reason() -> str:
    """Why the extension is not available, and the way out; empty where it is."""
    return _reason


def _variants() -> tuple[tuple[str, ...], str]:
    """The engine's variants that this processor can run, the chosen one first; or none, and why it refuses to run."""
    if _reason:
        return (), _reason
    try:
        chosen, *known = torch.ops.rnnkit.cpu_variants().split()
    except RuntimeError as error:  # RNNKIT_CPU_ISA names none of them, or RNNKIT_CPU_THREADS is no number
        return (), str(error).strip().partition("\n")[0]
    return (chosen, *(name for name in known if name != chosen)), ""


variants, refusal = _variants()
"""The variants of the engine on this processor, the chosen one first; and why there are none, else empty."""


class Workers(NamedTuple):
    """How many threads the engine uses for a call now, and what bounds them; 0 where nothing does."""

    workers: int
    torch: int
    """torch.get_num_threads()."""
    affinity: int
    """CPUs in the affinity mask of the calling thread."""
    quota: int
    """CPUs that the cgroups of this process grant, rounded up."""
    asked: int
    """RNNKIT_CPU_THREADS, which takes the place of affinity and quota."""

    @property
    def limit(self) -> str:
        """What binds, in words."""
        bounds = {"torch's threads": self.torch}
        if self.asked:
            bounds["RNNKIT_CPU_THREADS"] = self.asked
        else:
            bounds |= {"the affinity mask": self.affinity, "the cgroup's CPU quota": self.quota}
        least = min(bound for bound in bounds.values() if bound)
        if self.workers < least:
            return "the fork of this process"
        return next(name for name, bound in bounds.items() if bound == least)


def workers() -> Workers | None:
    """The threads of the engine, or None where it cannot run."""
    if not variants:
        return None
    words = torch.ops.rnnkit.cpu_workers().split()
    return Workers(**{name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)})


def _cuda() -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """The CUDA kernels that are built in, by which toolkit for which chips; or none, and why."""
    if _reason:
        return (), (), _reason
    if not hasattr(torch.ops.rnnkit, "cuda_kernels"):
        return (), (), f"the C++ extension is built without the CUDA kernels; {_HOW_CUDA}"
    ops = torch.ops.rnnkit
    return tuple(ops.cuda_kernels().split()), tuple(ops.cuda_built().split()), ""


cuda_kernels, cuda_built, cuda_missing = _cuda()
"""The names of the CUDA kernels in the extension; the toolkit that compiled them, like 13.0, and each chip; and why
there are none, else empty. Whether a device is here is another question."""


def cuda_serves(capability: int, chips: tuple[str, ...] = cuda_built[1:]) -> bool:
    """Whether kernels compiled for these chips run on a GPU of this compute capability, as 90.

    Code of sm_80 serves 8.x, of sm_90a 9.0 alone; PTX (compute_100) serves whatever comes later.
    """
    for chip in chips:
        kind, _, name = chip.partition("_")
        number = int(name.rstrip("a"))
        if name.endswith("a"):
            able = capability == number
        else:
            able = capability >= number and (kind == "compute" or capability // 10 == number // 10)
        if able:
            return True
    return False


def _bind() -> ModuleType | None:
    """The extension as a module: its operators without torch's dispatcher; see csrc/torch/python_module.cpp."""
    crossing = getattr(torch._C, "_aoti", None)
    to_handle = getattr(crossing, "unsafe_alloc_void_ptr_from_tensor", None)
    to_tensors = getattr(crossing, "alloc_tensors_by_stealing_from_void_ptrs", None)
    if _reason or to_handle is None or to_tensors is None:
        return None
    path = str(_library(_FOLDER))
    loader = importlib.machinery.ExtensionFileLoader("rnnkit._C", path)
    spec = importlib.util.spec_from_file_location("rnnkit._C", path, loader=loader)
    try:
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        loader.exec_module(module)
    except ImportError:  # built before it was a module: the operators are there
        return None
    sys.modules["rnnkit._C"] = module
    ops = torch.ops.rnnkit
    operators = (ops.cpu_layer_forward, ops.cpu_layer_backward)
    kinds = (torch.Tensor, torch.nn.Parameter, torch.Tensor.is_neg)
    module.bind(to_handle, to_tensors, *kinds, *(op.default for op in operators))
    return module


native = _bind()
"""The module of functions, or None where this torch has no way for tensors to cross."""

Unfit: type[RuntimeError] = RuntimeError if native is None else native.Unfit
"""What the module's functions raise for arguments that do not fit, before anything is done."""
NotPlain: type[RuntimeError] = RuntimeError if native is None else native.NotPlain
"""An Unfit: of what is no plain tensor, or of a tensor whose memory does not hold its values."""
