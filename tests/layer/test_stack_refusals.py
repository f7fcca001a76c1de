"""What a whole call refuses, before anything is done, and what happens once and no second time: a choice, a cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine import NAMES, TENSORS, WHOLE, B, H, I, T, forget, outcome, same, with_tensor
from torch import Tensor

import rnnkit
from rnnkit import backends, functional, ops
from rnnkit.backends.cpu import extension
from rnnkit.layer import stack

native = extension.native
no_way = extension.reason() or "this torch lacks torch._C._aoti, by which tensors reach C++; torch 2.13 has it"
pytestmark = pytest.mark.skipif(native is None, reason=no_way)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    forget(monkeypatch)


def layer_by_layer(call: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "run", lambda *_: None)
        return call()


UNFIT = {
    "layers": (1, 0, "layers must be at least 1"),
    "directions": (2, 3, "directions 1 or 2"),
    "a projection": (3, 2, "P = 2"),
    "layout": (4, 4, r"layout must lie in \[0, 3\], got 4"),
    "its dimensions": (4, 3, "x must have 2 dimensions"),
    "a kind": (7, "0", "not of the kind"),
    "needs": (8, b"1", "needs must have 9 bytes, got 1"),
    "no tensors": (9, (), "there must be 7 tensors and weights, got 0"),
    "a list": (9, list(TENSORS), "not of the kind"),
    "one weight": (9, TENSORS[:-1], "2 to 5 weights, got 1"),
}
UNFIT_TENSORS = {
    "x": (0, torch.ones(T, B, H).to_sparse(), "dense"),
    "no x": (0, None, "x must be given"),
    "no steps": (0, torch.ones(0, B, H), "at least one step"),
    "h_0": (1, torch.ones(1, B + 1, H), r"h_0 must be Float \[2, 4\], got Float \[3, 4\]"),
    "h_0 of two layers": (1, torch.ones(2, B, H), "of 1 layers and directions"),
    "c_0 of an RNN": (2, torch.ones(B, H), "a state must have 3 dimensions"),
    "lengths": (3, torch.tensor([1, T + 1]), "got 6 at row 1"),
    "their dtype": (3, torch.ones(B), "lengths must be Long"),
    "reset": (4, torch.ones(T, B), "reset must be Bool"),
    "no weight": (8, None, "weight 1 must be given"),
    "a weight": (8, torch.eye(H).double(), "w_hh must be Float"),
}
SIZES = {
    "a larger layer": [torch.ones(8, H), torch.eye(8)],
    "a smaller layer": [torch.ones(2, H), torch.eye(2)],
}


@pytest.mark.parametrize("which", [*UNFIT, *UNFIT_TENSORS])
def test_what_does_not_fit_is_refused_before_anything_is_done(which):
    at, value, words = (UNFIT_TENSORS if which in UNFIT_TENSORS else UNFIT)[which]
    arguments = with_tensor(at, value) if which in UNFIT_TENSORS else (*WHOLE[:at], value, *WHOLE[at + 1 :])
    native.stack_forward(*WHOLE)
    state = torch.get_rng_state()
    with pytest.raises(extension.Unfit, match=words):
        native.stack_forward(*arguments)
    assert torch.equal(state, torch.get_rng_state())


BACKWARD = {
    "needs": (8, b"1", "needs must have a byte for each tensor, got 1 for 10"),
    "no y": (9, TENSORS, "y must be saved"),
    "another result": (9, (*TENSORS, TENSORS[0], TENSORS[0]), "what is kept must be 0 tensors, got 1"),
    "no gradients": (10, (), "each result must have its gradient or none, got 0"),
    "a list of them": (10, [TENSORS[0], None], "not of the kind"),
    "y of another size": (9, (*TENSORS, TENSORS[0][..., 1:]), r"y must be Float \[5, 2, 4\], got Float \[5, 2, 3\]"),
    "a gradient of another size": (10, (TENSORS[0][..., 1:], None), r"gy must be Float \[5, 2, 4\]"),
}


@pytest.mark.parametrize("which", BACKWARD)
def test_a_backward_refuses_what_does_not_fit(which):
    at, value, words = BACKWARD[which]
    good = (*WHOLE[:8], bytes(8) + b"1", (*TENSORS, TENSORS[0]), (TENSORS[0], None))
    found = native.stack_backward(*good)
    assert found[:8] == [None] * 8 and found[8].shape == (H, H)
    with pytest.raises(extension.Unfit, match=words):
        native.stack_backward(*good[:at], value, *good[at + 1 :])


def test_a_backward_refuses_the_output_of_one_direction_for_both():
    """It would read beyond the end."""
    tensors, y = (*TENSORS[:7], *[torch.eye(H)] * 4), torch.ones(T, B, 2 * H)
    needs = bytes(10) + b"1"
    found = native.stack_backward(0, 1, 2, *WHOLE[3:8], needs, (*tensors, y), (y, None))
    assert found[10].shape == (H, H)
    for saved, grads, name in (((*tensors, y[..., :H]), (y, None), "y"), ((*tensors, y), (y[..., :H], None), "gy")):
        with pytest.raises(extension.Unfit, match=rf"^rnnkit: {name} must be Float \[5, 2, 8\], got Float \[5, 2, 4\]"):
            native.stack_backward(0, 1, 2, *WHOLE[3:8], needs, saved, grads)


@pytest.mark.parametrize("which", SIZES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_of_other_sizes_are_refused(which, bidirectional):
    """All share one tensor of states. Nothing is written beyond its end."""
    weights, x = [torch.eye(H), torch.eye(H), *SIZES[which]], torch.ones(T, B, H)
    with pytest.raises(extension.Unfit, match=r"every layer and direction must have H = 4 and N = 4, got"):
        native.stack_forward(0, *((1, 2) if bidirectional else (2, 1)), *WHOLE[3:9], (x, *[None] * 6, *weights), ())
    how = {"bidirectional": True} if bidirectional else {"num_layers": 2}

    def call() -> Any:
        return functional.rnn(x, None, weights, backend="cpu", **how)

    found = outcome(call)
    assert issubclass(found[0], Exception) and found == layer_by_layer(lambda: outcome(call))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_chooses_and_casts_nothing_anew(name):
    layer, x = getattr(rnnkit, name)(I, H, 2, backend="cpu"), torch.randn(T, B, I, requires_grad=True)

    def gradient(around: Any) -> list[Tensor]:
        layer.backend = "cpu"
        y = layer(x)[0]
        layer.backend = "reference"  # of a later call
        with around:
            return list(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], create_graph=True))

    truth = gradient(torch.enable_grad())
    assert same(gradient(torch.autocast("cpu")), truth)
    assert same(gradient(rnnkit.use_backend("torch")), truth)
    assert same(gradient(ops.override_layer(lambda *_: pytest.fail("asked in a backward"))), truth)
    with backends.record() as met:
        gradient(torch.enable_grad())
    assert len(met) == 2  # of the forward


def test_what_is_recorded_is_recorded_once():
    layer, x = rnnkit.LSTM(I, H, 2, backend="cpu"), torch.randn(T, B, I)
    for extras in ({"lengths": torch.tensor([T, 2])}, {"lengths": torch.tensor([T, 2], dtype=torch.int32)}):
        assert [c.layer for c in rnnkit.explain(layer, x, **extras).choices] == [0, 1]
    for reset in (torch.zeros(T, B, 1, dtype=torch.bool), torch.zeros(T, B)):
        assert [c.layer for c in rnnkit.explain(layer, x, reset=reset).choices] == [0, 1]


def test_a_default_device_changes_no_way(monkeypatch):
    layer, x = rnnkit.GRU(I, H, 2, backend="cpu"), torch.randn(T, B, I)
    layer(x)
    monkeypatch.setattr(ops, "layer", lambda *args, **how: pytest.fail("layer by layer"))
    torch.set_default_device("cpu")
    try:
        layer(x)
    finally:
        torch.set_default_device(None)
