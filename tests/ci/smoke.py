"""A first look at an installed rnnkit, run from a folder that is not its source tree.

Usage: smoke.py with|without|cuda   (the C++ extension; cuda: with the CUDA kernels in it)
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

import rnnkit
import rnnkit.benchmarks
import rnnkit.kernels
from rnnkit.backends import BY_NAME
from rnnkit.backends.cpu import extension


def check(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"smoke: {message}")


def train(layer: torch.nn.Module) -> None:
    """One forward and backward; every parameter gets a finite gradient."""
    x = torch.randn(7, 3, 5, requires_grad=True)
    layer(x, lengths=torch.tensor([7, 0, 4]))[0].square().sum().backward()
    for name, value in [("input", x), *layer.named_parameters()]:
        check(value.grad is not None and bool(value.grad.isfinite().all()), f"{name} has no finite gradient")


def main(wanted: str) -> None:
    place = Path(rnnkit.__file__).parent
    check("site-packages" in place.parts, f"rnnkit comes from {place}, not from an installed wheel")
    check(importlib.resources.files("rnnkit").joinpath("py.typed").is_file(), "py.typed is missing")
    check(extension.available() == (wanted != "without"), f"wanted {wanted} the extension: {extension.reason()!r}")
    check(bool(extension.cuda_kernels) == (wanted == "cuda"), f"wanted {wanted}: {extension.cuda_missing!r}")
    reason = BY_NAME["cuda"].available()
    if wanted == "cuda" and not torch.cuda.is_available():
        check("needs a GPU" in str(reason), f"backend cuda, in a process without a GPU, says {reason!r}")
    for layer in (rnnkit.RNN(5, 6, bidirectional=True), rnnkit.LSTM(5, 6, num_layers=2), rnnkit.GRU(5, 6)):
        train(layer)
    subprocess.run([sys.executable, "-m", "rnnkit", "info"], check=True)
    triton = "there" if importlib.util.find_spec("triton") else "not there"
    how = "with the extension and its CUDA kernels" if wanted == "cuda" else f"{wanted} the extension"
    print(f"smoke: rnnkit works {how}; triton is {triton}")


if __name__ == "__main__":
    main(*sys.argv[1:])
