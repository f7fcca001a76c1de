"""What this machine could do at best, measured in the same run: the roofline that every row is held against.

`Machine` times a product of 1024 × 1024 × 1024 and reading arrays of several sizes; `roofline_seconds` is the
least time in which a job's work could be done at these rates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from . import timing, variant_cells
from .bench_cases import CUSTOM, GATES, BenchJob

EXPS = {"RNN": 1, "GRU": 3, "LSTM": 5}  # exponentials a unit and step: a sigmoid or a tanh each
EXP = 2e-10  # seconds for one of them, vectorised, on one core
CALL, BACKWARD = 5e-6, 3e-5  # seconds: one call from Python, of the whole stack; autograd on top of it
FULL = 1.05  # a product of this size reaches about 95 % of the multiply-add peak
CACHE = {  # KiB
    "cpu": (256, 512, 1024, 2048, 4096, 8192, 16384, 65536),
    "cuda": (8192, 32768, 262144),  # smaller ones are read faster than they are launched
}
BLOCK = {"cpu": 1, "cuda": 20}  # calls between two looks at the clock: a GPU's launches hide behind one another


class NoProduct(RuntimeError):
    """torch cannot multiply matrices of a dtype on this device, so that nothing of that dtype is measured."""


class Machine:
    """peak: FLOP/s of one core (of the whole GPU); stream(bytes): bytes/s from the cache that holds so many.

    Whatever else runs meanwhile makes a machine look slower, and a share of its limit larger than it is: `measure` is
    called several times in a run, and the best counts. Measured on one thread; `roofline_seconds` multiplies by the
    threads of a row. The products are of `dtype`, as a row's, by the instruction set that the process is held to;
    `unable` says which of torch's cannot run here. On a GPU float32 products run with the TF32 setting of the run, and
    the caches are those below the multiprocessors: a kernel that keeps its weights on chip may beat the limit of a scan
    there. Raises NoProduct where torch has none.
    """

    def __init__(self, device: str, seconds: float, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.peak = 0.0
        self.rates = [(kib * 1024, 0.0) for kib in CACHE[device]]  # bytes, bytes/s
        self.unable: list[str] = []
        self.measure(seconds)

    def measure(self, seconds: float) -> None:
        """Look again, for about three times so many seconds."""
        device, threads = self.device, torch.get_num_threads()
        torch.set_num_threads(1)
        size = 1024 if device == "cpu" else 4096
        shapes = ((size, size), (size, size), (size,))
        x, w, b = (torch.randn(shape, device=device).to(self.dtype) for shape in shapes)
        products = self._runnable(x, w, b)
        few = torch.randn(16, device=device)
        with torch.no_grad():
            peak = FULL * 2 * size**3 / min(timing.least(product, device, seconds) for product in products)
            self.peak = max(self.peak, peak)
            call = timing.least(few.sum, device, seconds / 10, BLOCK[device])
            for k, (held, known) in enumerate(self.rates):
                v = torch.randn(held // 4, device=device)
                took = timing.least(v.sum, device, seconds / 10, BLOCK[device])
                self.rates[k] = (held, max(known, held / max(took - call, took / 10)))
        torch.set_num_threads(threads)

    @torch.no_grad()
    def _runnable(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> list[Callable[[], object]]:
        """Of torch's ways to multiply those that this processor has: oneDNN lacks narrow dtypes on some."""
        able: list[Callable[[], object]] = []
        self.unable = []
        for name, product in _products(x, w, b):
            try:
                product()
            except RuntimeError as error:
                self.unable.append(f"{name} in {str(self.dtype)[6:]}: {str(error).partition(chr(10))[0]}")
                continue
            able.append(product)
        if not able:
            raise NoProduct(f"torch has no product here: {'; '.join(self.unable)}")
        return able

    def stream(self, size: int) -> float:
        """Bytes/s at which an array of `size` bytes is read again and again."""
        return next((rate for held, rate in self.rates if size <= held), self.rates[-1][1])

    def __str__(self) -> str:
        reads = ", ".join(f"{size >> 10} KiB at {rate / 1e9:.0f}" for size, rate in self.rates)
        return f"peak {self.peak / 1e9:.0f} GFLOP/s; reads {reads} GB/s"


def _products(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways to x wᵀ + b, by name: what torch's layers call, oneDNN's own, and on a CPU wide operands in place of narrow
    ones, which is faster where the processor cannot multiply those."""
    cpu = x.device.type == "cpu"
    inner = torch.ops.mkldnn._linear_pointwise if cpu and torch.backends.mkldnn.is_available() else None
    ways = [("", (x, w, b))]
    if cpu and x.dtype != torch.float32:
        ways.append((" on float32 operands", (x.float(), w.float(), b.float())))
    for words, (x1, w1, b1) in ways:
        yield f"torch.nn.functional.linear{words}", functools.partial(torch.nn.functional.linear, x1, w1, b1)
        if inner is not None:
            yield f"oneDNN's inner product{words}", functools.partial(inner, x1, w1, b1, "none", [], "")


def roofline_seconds(machine: Machine, job: BenchJob, device: str, threads: int) -> float:
    """Seconds that the job must take at least.

    The products at the peak; in each step the recurrent product or reading its weights, whichever is longer, each
    thread's core a part of them; EXP for each exponential (none on a GPU, none of custom cells); one call. Training:
    two more products for the input projection (its input's gradient and its weight's), and in each step those of the
    state and of W_hh. In group `scan` the recurrent product or the reading alone.
    """
    case = job.case
    cores = threads if device == "cpu" else 1
    peak = machine.peak * cores
    custom, hidden = case.group in CUSTOM, case.hidden
    gates, blocks = variant_cells.products(job.cell) if custom else (GATES[job.cell], GATES[job.cell])
    product = 2 * case.rows * blocks * hidden**2 / peak
    size = getattr(torch, job.dtype).itemsize * blocks * hidden**2
    part = size / cores  # each core reads its own units' weights
    step = max(product, part / machine.stream(part))
    if case.group == "scan":
        return case.steps * step
    counted = device == "cpu" and not custom
    exps = case.rows * hidden * EXPS[job.cell] * EXP / cores if counted else 0.0
    total = CALL + (BACKWARD if job.train else 0.0)
    for layer in range(case.layers):
        width = case.inputs if layer == 0 else hidden * case.directions
        project = 2 * case.steps * case.rows * gates * hidden * width / peak
        once = project + case.steps * (step + exps)
        if job.train:
            once += 2 * project + case.steps * (step + product)
        total += case.directions * once
    return total
