"""What a layer asks of memory on a CPU: no more than torch.nn in training, little beyond its output in inference.

Counted exactly, by torch's profiler: every allocation of a tensor and its end. The engine's packed weights are not
tensors; they are as large as the weights, and gone when the call returns.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import rnnkit
from rnnkit.backends import extension
from rnnkit.benchmarks import timing

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


@pytest.mark.parametrize("name", LAYERS)
def test_inference_does_not_grow_with_time(name: str) -> None:
    """Beyond the output: chunks of fixed size, and states."""
    layer = getattr(rnnkit, name)(32, 64, backend="cpu")
    beyond = []
    for steps in (400, 4000):
        x = torch.randn(steps, 4, 32)
        with torch.inference_mode():
            beyond.append(peak(lambda x=x: layer(x)) - steps * 4 * 64 * 4)
    assert beyond[1] <= beyond[0] + 4096
    assert beyond[0] <= 2**20
