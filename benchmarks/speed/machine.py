"""Which machine a row was measured on and which code was measured: for people, for columns and for file names."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import torch

# AMD's family and the upper digit of its model -> generation; what /proc/cpuinfo calls "AMD EPYC" is any of them.
ZEN = {(25, 1): "Zen 4", (25, 6): "Zen 4", (25, 7): "Zen 4", (25, 10): "Zen 4", (25, 0): "Zen 3", (23, 3): "Zen 2"}
INTEL = {85: "Cascade Lake", 106: "Ice Lake", 143: "Sapphire Rapids", 173: "Granite Rapids", 207: "Emerald Rapids"}


def processor(device: str) -> str:
    """What runs the work, for people: "AMD EPYC (Zen 4)", "NVIDIA H100 80GB HBM3"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)| CPU| Processor|@.*|\d+-Core", "", name).strip()
    family, model = int(facts.get("cpu family", 0)), int(facts.get("model", 0))
    kind = INTEL.get(model) if family == 6 else "Zen 5" if family == 26 else ZEN.get((family, model >> 4))
    return f"{name} ({kind})" if kind else name


def file_name(device: str, name: str, isa: str = "-") -> str:
    """The name, without an ending, of the file of a processor's rows by a set: "cpu-amd-epyc-zen4-avx2"."""
    words = re.sub(r"(Zen) (\d)", r"\1\2", name)
    plain = f"{device}-{re.sub('[^a-z0-9]+', '-', words.lower()).strip('-')}"
    return plain if isa == "-" else f"{plain}-{isa}"


def no_device() -> str | None:
    """Why nothing can run on a GPU here, and what it takes; None where something can."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    return (
        f"torch {torch.__version__} finds no CUDA device here{'' if built else ', and is built without CUDA'}. Needed: "
        "a GPU with its driver, and a torch >= 2.11 that is built for it; `python -m rnnkit info` says what is here"
    )


MADE = ("benchmarks/results", "rnnkit/backends/dispatch_times.csv", "README.md", "docs/performance.md", "docs/assets")
"""What recording a run changes."""


def commit() -> str:
    """The commit of the clone that runs, with a + where more than MADE is changed; else the version of the package."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not git("ls-files", Path(__file__).name):  # installed, maybe below somebody else's repository
        from rnnkit import __version__

        return __version__
    others = (":(top)", *(f":(top,exclude){path}" for path in MADE))
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", *others) else "")


def tf32(device: str) -> str:
    """Whether products may be rounded to TF32, as it stands in a row; "-" on a CPU."""
    if device != "cuda":
        return "-"
    on = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return f"cudnn {'on' if on[0] else 'off'}, matmul {'on' if on[1] else 'off'}"
