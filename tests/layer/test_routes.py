"""A call takes the same way whether there was one like it before: a checkpoint runs its layer once for the outputs and
once more for what the backward needs, and hands the second run's tensors to the first run's node. And two calls whose
short way once differed from the ordinary one: half a state, and no inputs at all.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rnnkit
from rnnkit import backends
from rnnkit.backends import select

NAMES = ("RNN", "LSTM", "GRU")
needs_cpu = pytest.mark.skipif(
    bool(backends.BY_NAME["cpu"].available()),
    reason=f"backend cpu: {backends.BY_NAME['cpu'].available()}",
)


@needs_cpu
@pytest.mark.parametrize("sizes", [(5, 4), (6, 6)])
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_first_call_may_be_checkpointed(name, batch_first, hx, sizes, monkeypatch):
    monkeypatch.setattr(select, "_selected", {})
    steps, rows = sizes
    mine = getattr(rnnkit, name)(8, 16, batch_first=batch_first, backend="cpu")
    theirs = getattr(nn, name)(8, 16, batch_first=batch_first)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn((rows, steps, 8) if batch_first else (steps, rows, 8), requires_grad=True)
    h = torch.randn(1, rows, 16)
    state = None if not hx else (h, torch.randn(1, rows, 16)) if name == "LSTM" else h

    def gradients(layer: nn.Module, wrap: bool) -> list[torch.Tensor]:
        def run(v: torch.Tensor) -> torch.Tensor:
            return layer(v, state)[0]

        y = checkpoint(run, x, use_reentrant=False) if wrap else run(x)
        return list(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))

    for a, b in zip(gradients(mine, True), gradients(theirs, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_cpu
@torch.no_grad()
def test_half_a_state_is_refused_after_a_good_call_too():
    layer, x = rnnkit.LSTM(3, 4, backend="cpu"), torch.randn(5, 2, 3)
    h = torch.zeros(1, 2, 4)
    layer(x, (h, h)), layer(x)
    for half in ((h, None), (None, h), (None, None)):
        with pytest.raises(AttributeError):
            layer(x, half)


@needs_cpu
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
@torch.no_grad()
def test_without_inputs_the_biases_are_all_there_is(name):
    weights = [p.detach() for p in getattr(nn, name.upper())(1, 5).parameters()]
    weights[0] = weights[0][:, :0]
    run = getattr(rnnkit.functional, name)
    x = torch.randn(6, 4, 0)
    torch.testing.assert_close(run(x, None, weights, backend="cpu"), run(x, None, weights, backend="reference"))
