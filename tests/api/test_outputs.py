"""What a program may do with a layer's results, as with torch.nn's: change them in place, and know that they share no
memory. And that a missing initial state means zeros in every derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine import KINDS, NAMES, B, H, I, T, flat, same, state_of
from support import backends_for
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rnnkit
from rnnkit.backends import REFERENCE


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_results_share_no_memory(name, backend, steps, options, engine):
    layer, x = getattr(rnnkit, name)(I, H, backend=backend, **options), torch.randn(steps, B, I)
    hx = state_of(name, 4 if "num_layers" in options else 1, steps if "batch_first" in options else B, H)
    for train in (False, True):
        with torch.set_grad_enabled(train):
            for given in (hx, None):
                results = [*flat(layer(x, given)), *flat(hx)]
                places = {v.untyped_storage().data_ptr() for v in results}
                assert len(places) == len(results)
                every = flat(layer(x, given, return_all_states=True)) if (backend, name) != ("torch", "LSTM") else []
                assert len({v.untyped_storage().data_ptr() for v in every}) == len(every)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_final_states_may_be_changed_in_place(name, backend, engine):
    theirs, ours, x = getattr(nn, name)(I, H), getattr(rnnkit, name)(I, H, backend=backend), torch.randn(T, B, I)
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    for layer in (theirs, ours):
        states = flat(layer(x)[1])
        for v in states:
            v.mul_(2).add_(1)
        gradients.append(torch.autograd.grad(sum(v.square().sum() for v in states), list(layer.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_results_may_be_detached_in_place(name, backend, mode, engine):
    """As in truncated backpropagation: torch refuses it for a view."""
    layer = getattr(rnnkit, name)(I, H, backend=backend)
    for _ in range(2):
        with mode():
            for v in flat(layer(torch.randn(T, B, I))):
                assert not v.detach_().requires_grad


def outputs_changed(layer: nn.Module, x: Tensor, change: Callable[[Tensor], Any], run: Any) -> Any:
    leaf = x.clone().requires_grad_()
    y, h_n = run(leaf)
    change(y)
    loss = (y * torch.arange(y.shape[-1])).sum() + flat(h_n)[0].sum()
    return torch.autograd.grad(loss, [leaf, *layer.parameters()])


CHANGEABLE = [
    *(kind for kind in KINDS if kind[0] != "LSTM"),
    *((name, {"bidirectional": True, **options}) for name, options in KINDS),
    *((name, {"bidirectional": True, "num_layers": 2}) for name in NAMES),
]
"""An LSTM of one direction alone is refused, as in torch."""


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", [lambda y: y.relu_(), lambda y: y[0].zero_(), lambda y: y.mul_(0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "options"), CHANGEABLE)
def test_an_output_may_be_changed_on_any_backend(name, options, backend, change, compiled, recompute):
    layer, x = getattr(rnnkit, name)(I, H, recompute=recompute, **options), torch.randn(T, B, I)
    if backend not in backends_for(layer, x) or (compiled and backend == "reference"):
        pytest.skip(f"{backend} cannot do that")
    layer.backend = backend
    if compiled:
        torch._dynamo.reset()  # it compiles one function for few kinds of layers
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer.forward
    found = outputs_changed(layer, x, change, run)
    copied = outputs_changed(layer, x, lambda y: None, lambda v: changed_copy(layer, v, change))
    torch.testing.assert_close(found, copied)


def changed_copy(layer: nn.Module, x: Tensor, change: Callable[[Tensor], Any]) -> Any:
    y, h_n = layer(x)
    y = y.clone()
    change(y)
    return y, h_n


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_a_changed_output_is_made_again_only_then(name, engine):
    layer, x = getattr(rnnkit, name)(I, H), torch.randn(T, B, I)
    assert same(*(outputs_changed(layer, x, lambda y: None, layer) for _ in range(2)))
    assert engine.went == ["layer"] * 2
    outputs_changed(layer, x, lambda y: y.add_(1), layer)
    assert engine.went == ["layer"] * 4
    changed = outputs_changed(layer, x, lambda y: y.add_(1), lambda v: checkpoint(layer, v, use_reentrant=False))
    assert same(changed, outputs_changed(layer, x, lambda y: None, layer))


def test_an_lstms_output_may_not_be_changed_as_in_torch(engine):
    for layer in (nn.LSTM(I, H), rnnkit.LSTM(I, H), rnnkit.LSTM(I, H, backend="reference")):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs_changed(layer, torch.randn(T, B, I), lambda y: y.add_(1), layer)


def test_what_watches_an_output_does_not_keep_its_memory(engine):
    y, _ = rnnkit.GRU(I, H)(torch.randn(T, B, I))
    counter, version = y.grad_fn.version_guard
    assert counter.untyped_storage().nbytes() == 0 and counter._version == version
    y.add_(1)
    assert counter._version == version + 1


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_without_a_state(name, engine):
    """None where zeros are meant, in the first, the second and the batched derivative."""
    layer, x = getattr(rnnkit, name)(I, H), torch.randn(T, B, I, requires_grad=True)
    weights = list(layer.parameters())
    found = []
    for backend in ("cpu", "reference"):
        layer.backend = backend
        y = layer(x)[0]
        first = torch.autograd.grad(y.square().sum(), [x, *weights], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *weights], retain_graph=True)
        batched = torch.autograd.grad(y, [x], torch.eye(y.numel()).view(-1, *y.shape), is_grads_batched=True)
        found.append([*first, *second, *batched])
    torch.testing.assert_close(*found)


def test_zeros_are_made_for_backends_that_want_them(monkeypatch):
    seen = []
    right = REFERENCE.forward
    monkeypatch.setattr(REFERENCE, "forward", lambda cell, t, o, **how: seen.append(t) or right(cell, t, o, **how))
    for name, options in (("GRU", {}), ("LSTM", {"proj_size": 2})):
        getattr(rnnkit, name)(I, H, backend="reference", **options)(torch.randn(T, B, I))
        h_0, c_0 = seen[-1].h_0, seen[-1].c_0
        assert torch.equal(h_0, torch.zeros(B, options.get("proj_size", H)))
        assert c_0 is None if name == "GRU" else torch.equal(c_0, torch.zeros(B, H))
