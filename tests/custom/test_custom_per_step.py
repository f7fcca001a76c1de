"""Inputs of each step, as a call brings them: in every layout, for one layer or each, the same at every step; and what
is said of those that do not fit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from custom_layers import F64, LSTM, Everything
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkit

T, B, H = 5, 3, 8


def layer_and_call(**how: Any) -> tuple[rnnkit.Custom, Tensor, dict[str, Tensor]]:
    """A layer of two layers in both directions, and [T, B, ...] for it."""
    layer = rnnkit.Custom(Everything, 4, H, 2, bidirectional=True, dtype=F64, **how)
    inputs = {"keep": (torch.rand(T, B, H) < 0.6).to(F64), "gap": torch.rand(T, B, dtype=F64)}
    return layer, torch.randn(T, B, 4, dtype=F64), inputs


def test_layouts() -> None:
    layer, x, inputs = layer_and_call()
    y, (h, m) = layer(x, **inputs)
    first = rnnkit.Custom(Everything, 4, H, 2, bidirectional=True, batch_first=True, dtype=F64)
    first.load_state_dict(layer.state_dict())
    found, (h_1, m_1) = first(x.transpose(0, 1), **{n: v.transpose(0, 1) for n, v in inputs.items()})
    torch.testing.assert_close([found.transpose(0, 1), h_1, m_1], [y, h, m])
    one, (h_1, m_1) = first(x[:, 1], **{n: v[:, 1] for n, v in inputs.items()})
    torch.testing.assert_close([one, h_1, m_1], [y[:, 1], h[:, 1], m[:, 1]])


def test_packed_and_nested() -> None:
    layer, x, inputs = layer_and_call()
    lengths = torch.tensor([3, 5, 2])
    y, (h, m) = layer(x, lengths=lengths, **inputs)
    whole = torch.arange(T)[:, None] < lengths

    def pack(v: Tensor) -> Any:
        return pack_padded_sequence(v, lengths, enforce_sorted=False)

    want = pack(y).data
    for given in ({n: pack(v) for n, v in inputs.items()}, inputs):  # packed as x, or padded in the caller's order
        found, states = layer(pack(x), **given)
        torch.testing.assert_close([found.data, *states], [want, h, m])

    def nest(v: Tensor) -> Tensor:
        return torch.nested.nested_tensor([v[:n, b] for b, n in enumerate(lengths)], layout=torch.jagged)

    nested = nest(x)
    offsets, keep = nested.offsets(), inputs["keep"].transpose(0, 1)[whole.T]
    given = {"keep": torch.nested.nested_tensor_from_jagged(keep, offsets), "gap": inputs["gap"]}
    found, states = layer(nested, **given)
    torch.testing.assert_close([found.values(), *states], [y.transpose(0, 1)[whole.T], h, m])


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_for_each_layer_and_the_same_at_every_step(batch_first: bool) -> None:
    layer, x, inputs = layer_and_call()
    every = {n: v.expand(4, *v.shape) * torch.tensor([1, 0, 1, 1])[(..., *[None] * v.dim())] for n, v in inputs.items()}
    y = layer(x, **every)[0]
    assert not torch.allclose(y, layer(x, **inputs)[0])
    top = rnnkit.Custom(Everything, 4, H, bidirectional=True, dtype=F64, batch_first=batch_first)
    top.load_state_dict({n: v for n, v in layer.state_dict().items() if "_l0" in n})
    both = {n: v[:2] for n, v in every.items()}
    once = {n: v[:, :1].clone() for n, v in both.items()}
    again = {n: v.expand(2, T, *v.shape[2:]) for n, v in once.items()}
    if batch_first:
        x, once, again = x.transpose(0, 1), *({n: v.transpose(1, 2) for n, v in w.items()} for w in (once, again))
    torch.testing.assert_close(top(x, **once)[0], top(x, **again)[0])


def test_gradients_of_what_is_the_same_at_every_step() -> None:
    layer, x, inputs = layer_and_call()
    gap = torch.rand(1, B, dtype=F64, requires_grad=True)
    wide = gap.expand(T, B).detach().requires_grad_()
    for v in (gap, wide):
        layer(x, keep=inputs["keep"], gap=v)[0].sin().sum().backward()
    assert gap.grad is not None and wide.grad is not None
    torch.testing.assert_close(gap.grad[0], wide.grad.sum(0))


def test_masks_of_bool_and_whole_numbers() -> None:
    layer, x, inputs = layer_and_call()
    keep = inputs["keep"]
    for v in (keep.bool(), keep.to(torch.uint8)):
        assert torch.equal(layer(x, keep=v, gap=inputs["gap"])[0], layer(x, **inputs)[0])


ONES = torch.ones(T, B, dtype=F64)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "missing": ({"gap": None}, TypeError, ["Everything needs gap", "layer(x, gap=...)", "[T, B]"]),
    "misspelt": ({"gaps": ONES}, TypeError, ["'gaps'", "declares the inputs of each step keep, gap"]),
    "a shape": ({"gap": torch.ones(B, T, dtype=F64)}, ValueError, ["gap must be [T, B] = [5, 3]", "[L·D = 4, ...]"]),
    "units": ({"keep": ONES}, ValueError, ["keep must be [T, B, H] = [5, 3, 8]", "got [5, 3]"]),
    "layers": ({"gap": ONES.expand(3, T, B)}, ValueError, ["[L·D = 4, ...]", "got [3, 5, 3]"]),
    "no tensor": ({"gap": [1.0]}, TypeError, ["gap must be a tensor", "list"]),
    "a dtype": ({"gap": ONES.float()}, TypeError, ["gap torch.float32", "convert one"]),
    "a gradient": (
        {"keep": torch.ones(T, B, H, dtype=F64, requires_grad=True)}, TypeError, ["grad=False", "keep.detach()"]),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named(what: str) -> None:
    change, kind, words = MISTAKES[what]
    layer, x, inputs = layer_and_call()
    with pytest.raises(kind) as caught:
        layer(x, **{**inputs, **change})
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_cell_that_declares_none() -> None:
    with pytest.raises(TypeError, match=r"LSTM got an unexpected keyword 'length'; it declares no rnnkit.per_step"):
        rnnkit.Custom(LSTM, 4, H)(torch.randn(T, B, 4), length=torch.ones(3))


def test_what_a_cell_draws_is_checked_and_repeats_with_its_seed() -> None:
    class Drawn(rnnkit.Cell):
        gates, states = 1, ("h",)
        mask = rnnkit.per_step(grad=False)
        shape = rnnkit.option(0)

        @staticmethod
        def step(a: Tensor, h: Tensor, mask: Tensor) -> Tensor:
            return torch.tanh(a) * mask

        def draw(self, training, steps, rows, hidden, like):  # type: ignore[no-untyped-def]
            return {"mask": torch.rand(steps, rows, hidden + self.shape) < 0.5}

    layer, x = rnnkit.Custom(Drawn, 4, H, bidirectional=True), torch.randn(T, B, 4)
    results = []
    for backend in ("auto", "reference"):
        layer.backend = backend
        torch.manual_seed(5)
        results.append(layer(x)[0])
    torch.testing.assert_close(*results)
    assert not torch.equal(layer(x)[0], results[1])
    with pytest.raises(ValueError, match=r"Drawn.draw must give mask as \[5, 3, 8\], or with T = 1; got \[5, 3, 9\]"):
        rnnkit.Custom(Drawn(shape=1), 4, H)(x)
