"""What else of torch looks into a layer: fx, per-sample gradients, flop counting, what only passes for a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.flop_counter import FlopCounterMode

import rnnkit

I, H, T, B = 3, 4, 5, 2
LAYERS = ("RNN", "LSTM", "GRU")


class Traced(nn.Module):
    """A model in which torch.fx meets a layer, a cell, a state and a reset."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = getattr(rnnkit, name)(I, H)
        self.cell = getattr(rnnkit, f"{name}Cell")(H, H)
        self.pair = name == "LSTM"

    def forward(self, x: torch.Tensor, h: torch.Tensor, reset: torch.Tensor) -> torch.Tensor:
        y = self.layer(x, (h, h) if self.pair else h, reset=reset)[0]
        new = self.cell(y[-1], (h[0], h[0]) if self.pair else h[0])
        return new[0] if self.pair else new


@pytest.mark.parametrize("name", LAYERS)
def test_fx_sees_one_node_for_each_module(name: str) -> None:
    model = Traced(name)
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer", "cell"]
    x, h, reset = torch.randn(T, B, I), torch.randn(1, B, H), torch.rand(T, B) < 0.3
    assert torch.equal(traced(x, h, reset), model(x, h, reset))


def per_sample(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    call_for_per_sample_grads(layer)(x)[0].square().sum().backward()
    return [p.grad_sample for p in layer.parameters()]


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients_of_torch(name: str) -> None:
    theirs = getattr(nn, name)(I, H, batch_first=True)
    ours = getattr(rnnkit, name)(I, H, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, I)
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's LSTM knows no ExpandedWeight, in torch.nn either
        torch.testing.assert_close(per_sample(ours, x), per_sample(theirs, x))


@pytest.mark.parametrize("name", LAYERS)
def test_flops_are_counted(name: str) -> None:
    layer = getattr(rnnkit, name)(I, H, 2, bidirectional=True)
    weights = sum(p.numel() for key, p in layer.named_parameters() if key.startswith("weight"))
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(T, B, I, requires_grad=True))[0].sum().backward()
    assert counter.get_total_flops() == 3 * 2 * T * B * weights  # the backward has two products for each of the forward


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", [lambda o: o.relu_(), lambda o: o.add_(1)])
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_an_output_may_be_changed_where_torch_allows_it(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], compiled: bool
) -> None:
    theirs, ours = getattr(nn, name)(I, H), getattr(rnnkit, name)(I, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I)
    gradients = []
    for layer in (theirs, ours):
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled and layer is ours else layer
        leaf = x.clone().requires_grad_()
        output = run(leaf)[0]
        change(output)
        gradients.append(torch.autograd.grad((output * torch.arange(H)).sum(), [leaf, *layer.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", LAYERS)
def test_a_cell_without_units_as_in_torch(name: str) -> None:
    theirs, ours = getattr(nn, f"{name}Cell")(I, 0), getattr(rnnkit, f"{name}Cell")(I, 0)
    torch.testing.assert_close(ours(torch.randn(B, I)), theirs(torch.randn(B, I)))


class Wrapper:
    """No tensor, but passes for one: torch's functions come to it by `__torch_function__`."""

    def __init__(self, data: torch.Tensor, asked: list[str] | None = None) -> None:
        self.data = data
        self.asked: list[str] = [] if asked is None else asked  # the functions, for what was made from it too

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.data, name)
        if not callable(found):
            return found

        def method(*args: Any) -> Any:
            output = found(*args)
            return type(self)(output, self.asked) if isinstance(output, torch.Tensor) else output

        return method

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def bare(v: Any) -> Any:
            if isinstance(v, tuple | list):
                return type(v)(bare(each) for each in v)
            if isinstance(v, cls):
                v.asked.append(func.__name__)
                return v.data
            return v

        output = func(*bare(args), **bare(kwargs or {}))
        return tuple(map(cls, output)) if isinstance(output, tuple) else cls(output)


def data(v: Any) -> Any:
    return tuple(map(data, v)) if isinstance(v, tuple) else v.data


@pytest.mark.parametrize("where", ["input", "hx", "both", "half of hx"])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_no_tensor_is_asked(name: str, cell: bool, unbatched: bool, where: str) -> None:
    """With torch's operator, as from torch.nn's layers."""
    cls = f"{name}Cell" if cell else name
    theirs, ours = getattr(nn, cls)(I, H), getattr(rnnkit, cls)(I, H)
    ours.load_state_dict(theirs.state_dict())
    x, h = (torch.randn(B, I), torch.randn(B, H)) if cell else (torch.randn(T, B, I), torch.randn(1, B, H))
    if unbatched:
        x, h = (x[0], h[0]) if cell else (x[:, 0], h[:, 0])
    answers = []
    for module in (theirs, ours):
        given, state = Wrapper(x), Wrapper(h)
        pair: Any = (h if where == "half of hx" else state, state) if name == "LSTM" else state
        answer = module(given) if where == "input" else module(given if where == "both" else x, pair)
        answers.append((data(answer), given.asked, state.asked))
    torch.testing.assert_close(answers[1][0], answers[0][0])
    assert answers[1][1:] == answers[0][1:] and answers[1][1] + answers[1][2]


@pytest.mark.parametrize("cell", [False, True])
def test_what_is_no_tensor_cannot_ask_for_more_than_torch_has(cell: bool) -> None:
    x = Wrapper(torch.randn(B, I) if cell else torch.randn(T, B, I))
    cls = rnnkit.GRUCell if cell else rnnkit.GRU
    with pytest.raises(TypeError, match=r"Wrapper is no torch\.Tensor.*no reset_after=False; pass tensors"):
        cls(I, H, reset_after=False)(x)
    if not cell:
        with pytest.raises(TypeError, match="no lengths, no return_all_states"):
            cls(I, H)(x, lengths=torch.ones(B, dtype=torch.int64), return_all_states=True)
    assert not x.asked
    with pytest.raises(AttributeError, match="dim"):  # torch.nn's words for an object that does not pass for a tensor
        cls(I, H)(type("Bare", (), {"__torch_function__": classmethod(lambda *_: None)})())
