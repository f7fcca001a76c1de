"""What a layer asks of memory on a CPU: no more than torch.nn in training, little beyond its output in inference.

Counted exactly, by torch's profiler: every allocation of a tensor and its end. The engine's packed weights are not
tensors; where they are most of it, the resident memory of a process is looked at.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support import some
from torch import nn

import rnnkit
from rnnkit.backends.cpu import extension
from rnnkit.benchmarks.speed import timing

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.reason())

LAYERS = ("RNN", "LSTM", "GRU")


def peak(work: Callable[[], object]) -> float:
    """By how many bytes the memory of tensors grows at its highest during one call, not the first."""
    work()
    return timing.peak_mib(work, "cpu") * 2**20


def training(layer: nn.Module, x: torch.Tensor, **extra: torch.Tensor) -> Callable[[], object]:
    """A step that frees nothing from before it: the profiler does not know the size of such a block each time."""

    def work() -> None:
        own = x.clone().requires_grad_()
        torch.autograd.grad(layer(own, **extra)[0].sum(), [own, *layer.parameters()])

    return work


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(32, 50, 64, 64), (4, 100, 128, 128), (1, 128, 96, 96), (64, 24, 8, 16)])
def test_training_needs_no_more_than_torch(name: str, shape: tuple[int, int, int, int]) -> None:
    rows, steps, features, hidden = shape
    x = torch.randn(steps, rows, features)
    theirs = peak(training(getattr(nn, name)(features, hidden), x))
    ours = peak(training(getattr(rnnkit, name)(features, hidden, backend="cpu"), x))
    assert ours <= 1.05 * theirs, f"{ours / theirs:.2f} of torch.nn's peak"


RESIDENT = """
import re, sys, torch, rnnkit
place, name, *shape = sys.argv[1:]
rows, steps, features, hidden = map(int, shape)
torch.set_num_threads(1)
layer = getattr({"rnnkit": rnnkit, "torch.nn": torch.nn}[place], name)(features, hidden)
x = torch.randn(steps, rows, features, requires_grad=True)
torch.randn(64, 64) @ torch.randn(64, 64)
kib = lambda what: int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = kib("VmRSS")
layer(x)[0].sum().backward()
print(kib("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which Linux has")
@pytest.mark.parametrize("shape", some([("GRU", 4, 50), ("GRU", 1, 4), ("RNN", 4, 50), ("GRU", 1, 1)], 2), ids=str)
def test_wide_layers_with_their_packed_weights(shape: tuple[str, int, int]) -> None:
    """H = 1024 and few rows: the weights are most of the memory, and packing them must not double it."""

    def kib(place: str) -> int:
        command = [sys.executable, "-c", RESIDENT, place, *map(str, shape), "1024", "1024"]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    ours, theirs = kib("rnnkit"), kib("torch.nn")
    assert ours <= 1.05 * theirs, f"{ours / 1024:.1f} MiB, torch.nn {theirs / 1024:.1f}"


@pytest.mark.parametrize("name", LAYERS)
def test_recompute_keeps_no_gates(name: str) -> None:
    x = torch.randn(64, 32, 48)
    layers = [getattr(rnnkit, name)(48, 64, backend="cpu", recompute=recompute) for recompute in (False, True)]

    def kept(layer: nn.Module) -> int:
        results = []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results.append(layer(x))
        return sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")

    saved, recomputed = (kept(layer) for layer in layers)
    if name == "RNN":  # keeps nothing but its output
        assert saved == recomputed
    else:
        assert recomputed <= saved / 2


@pytest.mark.parametrize("name", LAYERS[1:])
@pytest.mark.parametrize("steps", [20, 200])
def test_recompute_takes_less_at_the_peak(name: str, steps: int) -> None:
    x = torch.randn(steps, 4, 96)
    layers = [getattr(rnnkit, name)(96, 96, backend="cpu", recompute=recompute) for recompute in (False, True)]
    saved, recomputed = (peak(training(layer, x)) for layer in layers)
    assert recomputed < saved


@pytest.mark.parametrize("name", LAYERS)
def test_inference_does_not_grow_with_time(name: str) -> None:
    """Beyond the output: chunks of fixed size, and states. The engine chooses by instruction set and size whether a
    short sequence needs a chunk at all, so growth is looked for where every sequence has one."""
    layer = getattr(rnnkit, name)(32, 64, backend="cpu")
    beyond = []
    for steps in (400, 4000, 40000):
        x = torch.randn(steps, 4, 32)
        with torch.inference_mode():
            beyond.append(peak(lambda x=x: layer(x)) - steps * 4 * 64 * 4)
    assert beyond[2] <= beyond[1] + 4096
    assert max(beyond) <= 2**20
