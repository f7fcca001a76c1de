"""What this machine could do at best, measured in the same run: the limit that every row is held against.

`Machine` times a product of 1024 × 1024 × 1024 and reading arrays of several sizes; `limit` is the least time in
which a job's work could be done at these rates. It also says which processor this is, for people and for file names.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from . import timing
from .cases import GATES, Job

EXPS = {"RNN": 1, "GRU": 3, "LSTM": 5}  # exponentials a unit and step: a sigmoid or a tanh each
EXP = 2e-10  # seconds for one of them, vectorised, on one core
CALL, BACKWARD = 5e-6, 3e-5  # seconds: one call from Python a layer and direction; autograd on top of it
FULL = 1.05  # a product of this size reaches about 95 % of the multiply-add peak
CACHE = {  # KiB
    "cpu": (256, 512, 1024, 2048, 4096, 8192, 16384, 65536),
    "cuda": (8192, 32768, 262144),  # smaller ones are read faster than they are launched
}
BLOCK = {"cpu": 1, "cuda": 20}  # calls between two looks at the clock: a GPU's launches hide behind one another
# AMD's family and the upper digit of its model -> generation; what /proc/cpuinfo calls "AMD EPYC" is any of them.
ZEN = {(25, 1): "Zen 4", (25, 6): "Zen 4", (25, 7): "Zen 4", (25, 10): "Zen 4", (25, 0): "Zen 3", (23, 3): "Zen 2"}
INTEL = {85: "Cascade Lake", 106: "Ice Lake", 143: "Sapphire Rapids", 173: "Granite Rapids", 207: "Emerald Rapids"}


class Machine:
    """peak: FLOP/s of one core (of the whole GPU); stream(bytes): bytes/s from the cache that holds so many.

    Whatever else runs meanwhile makes a machine look slower, and a share of its limit larger than it is: `measure` is
    called several times in a run, and the best counts. Measured on one thread; `limit` multiplies by the threads of a
    row. The products are of `dtype`, as a row's. On a GPU float32 ones run with the TF32 setting of the run, and the
    caches are those below the multiprocessors: a kernel that keeps its weights on chip may beat the limit of a scan
    there.
    """

    def __init__(self, device: str, seconds: float, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.peak = 0.0
        self.rates = [(kib * 1024, 0.0) for kib in CACHE[device]]  # bytes, bytes/s
        self.measure(seconds)

    def measure(self, seconds: float) -> None:
        """Look again, for about three times so many seconds."""
        device, threads = self.device, torch.get_num_threads()
        torch.set_num_threads(1)
        size = 1024 if device == "cpu" else 4096
        shapes = ((size, size), (size, size), (size,))
        x, w, b = (torch.randn(shape, device=device).to(self.dtype) for shape in shapes)
        ways: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, w, b)]
        if device == "cpu" and torch.backends.mkldnn.is_available():
            ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], ""))
        few = torch.randn(16, device=device)
        with torch.no_grad():
            peak = FULL * 2 * size**3 / min(timing.least(way, device, seconds) for way in ways)
            self.peak = max(self.peak, peak)
            call = timing.least(few.sum, device, seconds / 10, BLOCK[device])
            for k, (held, known) in enumerate(self.rates):
                v = torch.randn(held // 4, device=device)
                took = timing.least(v.sum, device, seconds / 10, BLOCK[device])
                self.rates[k] = (held, max(known, held / max(took - call, took / 10)))
        torch.set_num_threads(threads)

    def stream(self, size: int) -> float:
        """Bytes/s at which an array of `size` bytes is read again and again."""
        return next((rate for held, rate in self.rates if size <= held), self.rates[-1][1])

    def __str__(self) -> str:
        reads = ", ".join(f"{size >> 10} KiB at {rate / 1e9:.0f}" for size, rate in self.rates)
        return f"peak {self.peak / 1e9:.0f} GFLOP/s; reads {reads} GB/s"


def limit(machine: Machine, job: Job, device: str, threads: int) -> float:
    """Seconds that the job must take at least.

    The products at the peak; in each step the recurrent product or reading its weights, whichever is longer, each
    thread's core a part of them; EXP for each exponential (none on a GPU); one call a layer and direction. Training:
    two more products for the input projection (its input's gradient and its weight's), and in each step those of the
    state and of W_hh. In group `scan` the recurrent product or the reading alone.
    """
    case = job.case
    cores = threads if device == "cpu" else 1
    peak = machine.peak * cores
    gates, hidden = GATES[job.cell], case.hidden
    product = 2 * case.rows * gates * hidden**2 / peak
    size = getattr(torch, job.dtype).itemsize * gates * hidden**2
    part = size / cores  # each core reads its own units' weights
    step = max(product, part / machine.stream(part))
    if case.group == "scan":
        return case.steps * step
    exps = case.rows * hidden * EXPS[job.cell] * EXP / cores if device == "cpu" else 0.0
    total = 0.0
    for layer in range(case.layers):
        width = case.inputs if layer == 0 else hidden * case.directions
        project = 2 * case.steps * case.rows * gates * hidden * width / peak
        once = project + case.steps * (step + exps) + CALL
        if job.train:
            once += 2 * project + case.steps * (step + product) + BACKWARD
        total += case.directions * once
    return total


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


def file_name(device: str, name: str) -> str:
    """The name, without an ending, of the file of a processor's rows: "cpu-amd-epyc-zen4"."""
    words = re.sub(r"(Zen) (\d)", r"\1\2", name)
    return f"{device}-{re.sub('[^a-z0-9]+', '-', words.lower()).strip('-')}"


def no_device() -> str | None:
    """Why nothing can run on a GPU here, and what it takes; None where something can."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    return (
        f"torch {torch.__version__} finds no CUDA device here{'' if built else ', and is built without CUDA'}. Needed: "
        "a GPU with its driver, and a torch >= 2.11 that is built for it; `python -m rnnkit info` says what is here"
    )


MADE = ("benchmarks/results", "rnnkit/backends/dispatch_times.csv", "README.md")  # what recording a run changes


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
