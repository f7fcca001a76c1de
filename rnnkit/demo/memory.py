"""Peak memory of a piece of work, and in words how it was measured: no two systems let one ask the same way."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

SELF = Path("/proc/self")


class Peak:
    """Between `Peak(device)` and `mib()`: by how much the memory in use grew at its highest.

    `how` says how it is measured. Where nothing can be measured `mib()` is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            self.how = "torch.cuda.max_memory_allocated, less what was allocated before the run"
            torch.cuda.reset_peak_memory_stats(device)
            self.before: float | None = torch.cuda.memory_allocated(device) / 2**20
            return
        with contextlib.suppress(OSError, AttributeError):  # glibc alone; gives back what earlier work has freed
            ctypes.CDLL(None).malloc_trim(0)
        self.before = self.highest = _status("VmRSS")
        self.kernel = self.before is not None and _reset()
        if self.kernel:
            self.how = "growth of the process's resident memory during the run, the kernel's high-water mark (VmHWM)"
        elif self.before is not None:
            self.how = "growth of the process's resident memory during the run, looked at between forward and backward"
        else:
            self.how = "not measured: this system has no /proc/self/status"

    def look(self) -> None:
        """Called where much is in use; counts where the kernel keeps no high-water mark."""
        if self.device.type != "cuda" and not self.kernel and self.highest is not None:
            self.highest = max(self.highest, _status("VmRSS") or 0.0)

    def mib(self) -> float | None:
        """MiB above what was in use at the start."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before
        highest = _status("VmHWM") if self.kernel else self.highest
        return None if highest is None else highest - self.before


def _status(field: str) -> float | None:
    """A field of /proc/self/status, in MiB."""
    with contextlib.suppress(OSError):
        for line in (SELF / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return None


def _reset() -> bool:
    """Set VmHWM back to VmRSS; False where the system does not allow it."""
    try:
        (SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    highest, now = _status("VmHWM"), _status("VmRSS")
    return highest is not None and now is not None and highest < now + 16
