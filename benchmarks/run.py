"""What a layer costs in rnnkit against torch.nn: `python -m rnnkit.benchmarks.run [--threads N] [--csv FILE]`.

Each row first holds the output and the gradients against float64 (at most twice torch.nn's error, and a rounding
band), then times the two sides in turn in one process on the same random input, and gives the ratio of the paired
times, torch.nn over rnnkit: above 1, rnnkit is faster. Absolute times drift from machine to machine; ratios of one
run are what counts. `steps` times a loop over torch's cell, which is how resets are done without rnnkit.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rnnkit
from rnnkit.backends import record

SHAPES = [(1, 1, 64, 64), (1, 128, 64, 64), (32, 100, 128, 128), (128, 64, 64, 256)]  # B, T, I, H
COLUMNS = [
    *("cell", "what", "mode", "B", "T", "I", "H", "backend", "torch_ms", "rnnkit_ms"),
    *("ratio_p20", "ratio_p50", "ratio_p80", "threads", "torch", "commit", "processor"),
]
BAND = 2e-6  # a few float32 roundings, relative to the largest element


def gradients(module: nn.Module, x: torch.Tensor, run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = run(module, x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def correct(sides: list[list[torch.Tensor]], exact: list[torch.Tensor]) -> bool:
    """Ours (the second side) within twice the error of torch's."""
    for theirs, ours, truth in zip(*sides, exact, strict=True):
        error = [(v.double() - truth).abs().max().item() for v in (theirs, ours)]
        if error[1] > 2 * error[0] + BAND * max(1.0, truth.abs().max().item()):
            return False
    return True


def clock(work: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def plain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)[0]


def by_steps(cell: nn.RNNCellBase, x: torch.Tensor, reset: torch.Tensor) -> torch.Tensor:
    """A sequence with resets as a loop over torch's cell."""
    pair = isinstance(cell, nn.LSTMCell)
    h = x.new_zeros((x.shape[1], cell.hidden_size))
    state: Any = (h, h) if pair else h
    ys = []
    for x_t, keep in zip(x, (1 - reset).unsqueeze(-1), strict=True):
        state = cell(x_t, tuple(s * keep for s in state) if pair else state * keep)
        ys.append(state[0] if pair else state)
    return torch.stack(ys)


def cases() -> Iterator[tuple[str, str, tuple[int, int, int, int], nn.Module, nn.Module, Callable, Callable]]:
    """Name, what is compared, shape, torch's module, ours, and how each is run."""
    for name in ("RNN", "LSTM", "GRU"):
        for shape in SHAPES:
            theirs, ours = getattr(nn, name)(*shape[2:]), getattr(rnnkit, name)(*shape[2:])
            ours.load_state_dict(theirs.state_dict())
            yield name, "plain", shape, theirs, ours, plain, plain
        shape = (64, 64, 32, 128)
        reset = (torch.rand(shape[1], shape[0]) < 0.02).float()
        cell, ours = getattr(nn, f"{name}Cell")(*shape[2:]), getattr(rnnkit, name)(*shape[2:])
        ours.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
        yield (
            name,
            "resets, steps",
            shape,
            cell,
            ours,
            lambda m, x, r=reset: by_steps(m, x, r.to(x.dtype)),
            lambda m, x, r=reset: m(x, reset=r)[0],
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows, wrong = [], 0
    for name, what, (b, t, i, h), theirs, ours, run_theirs, run_ours in cases():
        x = torch.randn(t, b, i)
        sides = [gradients(theirs, x, run_theirs), gradients(ours, x, run_ours)]
        exact = gradients(theirs.double(), x.double(), run_theirs)
        theirs.float()
        if not correct(sides, exact):
            wrong += 1
            print(f"{name} {what} B={b} T={t} I={i} H={h}: WRONG, not timed", file=sys.stderr)
            continue
        for mode in ("inference", "training"):
            work = [partial(step, m, x, r, mode) for m, r in ((theirs, run_theirs), (ours, run_ours))]
            ratios, times = alternate(work, options.seconds)
            low, middle, high = (statistics.quantiles(ratios, n=10)[k] for k in (1, 4, 7))
            row = [
                name,
                what,
                mode,
                b,
                t,
                i,
                h,
                backend(ours, x, run_ours, mode),
                times[0] * 1e3,
                times[1] * 1e3,
                low,
                middle,
                high,
            ]
            rows.append([f"{v:.3g}" if isinstance(v, float) else v for v in row])
            print(
                f"{name:4} {what:13} {mode:9} B={b:<3} T={t:<3} I={i:<3} H={h:<3} {row[7]:9} "
                f"{times[1] * 1e3:8.2f} ms, ratio {middle:.2f} ({low:.2f}–{high:.2f})",
                flush=True,
            )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            about = [options.threads, torch.__version__, commit(), processor()]
            writer.writerows([*row, *about] for row in rows)
    return 1 if wrong else 0


def step(module: nn.Module, x: torch.Tensor, run: Callable[..., torch.Tensor], mode: str) -> None:
    if mode == "inference":
        with torch.inference_mode():
            run(module, x)
    else:
        run(module, x).sum().backward()


def alternate(work: Sequence[Callable[[], None]], seconds: float) -> tuple[list[float], list[float]]:
    """Ratios of paired times, first over second, and the median time of each, after a warm-up."""
    repeats = max(1, int(0.01 / max(max(clock(w, 2) for w in work), 1e-7)))
    pairs: list[list[float]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(pairs) < 9:
        pairs.append([clock(w, repeats) for w in work])
    return [a / b for a, b in pairs], [statistics.median(column) for column in zip(*pairs, strict=True)]


def backend(module: nn.Module, x: torch.Tensor, run: Callable[..., torch.Tensor], mode: str) -> str:
    """Which backend runs our side."""
    with record() as met:
        step(module, x, run, mode)
    return met[0][2]


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
