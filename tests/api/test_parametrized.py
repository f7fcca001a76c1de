"""A weight that a parametrization computes: once a call, and by nothing else. The layer moves like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import rnnkit

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
T, B, I, H = 5, 2, 3, 4
layers = pytest.mark.parametrize("name", LAYERS)
names = pytest.mark.parametrize("name", LAYERS + CELLS)


class LowRank(nn.Module):
    """LoRA: the weight and a product of two thin matrices; counts how often it is computed."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(weight.shape[0], 2))
        self.b = nn.Parameter(torch.randn(2, weight.shape[1]))
        self.computed = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.computed += 1
        return weight + self.a @ self.b


class Noise(nn.Module):
    """A weight with new noise each time it is computed."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def weight_of(name: str) -> str:
    return "weight_ih" if name in CELLS else "weight_hh_l0"  # a cell starts at zero, where its weight_hh does nothing


def input_of(name: str) -> Tensor:
    return torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)


def lora(module: nn.Module, *weights: str) -> list[LowRank]:
    made = [LowRank(getattr(module, w)) for w in weights]
    for weight, low_rank in zip(weights, made, strict=True):
        parametrize.register_parametrization(module, weight, low_rank)
    return made


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else first(value[0])


def another(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.randn_like(weight))


BOOKKEEPING: dict[str, Callable[[Any], Any]] = {
    "double": lambda m: m.double(),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "to the device": lambda m: m.to("cpu"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "to meta": lambda m: m.to("meta"),
    "share_memory": lambda m: m.share_memory(),
    "a bias set": lambda m: setattr(m, "bias_ih_l0", another(m.bias_ih_l0)),
    "flatten_parameters": lambda m: m.flatten_parameters(),
    "deepcopy": copy.deepcopy,
    "repr": repr,
    "state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "assigned": lambda m: m.load_state_dict(m.state_dict(), assign=True),
    "train and eval": lambda m: m.eval().train(),
    "parameters": lambda m: list(m.parameters()),
    "zero_grad": lambda m: m.zero_grad(),
    "requires_grad": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("keep", BOOKKEEPING.values(), ids=BOOKKEEPING)
@layers
def test_bookkeeping_computes_nothing(name: str, keep: Callable[[Any], Any]) -> None:
    layer = getattr(rnnkit, name)(I, H, 2)
    made = lora(layer, "weight_hh_l0", "weight_ih_l1")
    for m in made:
        m.computed = 0
    keep(layer)
    assert [m.computed for m in made] == [0, 0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@layers
def test_a_call_computes_each_once(name: str, recompute: bool, training: bool) -> None:
    layer = getattr(rnnkit, name)(I, H, 2, recompute=recompute).train(training)
    made = lora(layer, "weight_hh_l0", "weight_ih_l1")
    for m in made:
        m.computed = 0
    output = layer(input_of(name))[0]
    if training:
        output.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
    assert [m.computed for m in made] == [1, 1]


@pytest.mark.parametrize("name", CELLS)
def test_a_cells_call_computes_each_once(name: str) -> None:
    cell = getattr(rnnkit, name)(I, H)
    made = lora(cell, "weight_ih", "weight_hh")
    for m in made:
        m.computed = 0
    for x in (torch.randn(B, I), torch.randn(I)):
        cell(x)
    assert [m.computed for m in made] == [2, 2]


@names
def test_a_mistake_computes_each_once(name: str) -> None:
    """Where torch's layer says what is wrong, it is given the weights that were computed already."""
    module = getattr(rnnkit, name)(I, H)
    (made,) = lora(module, weight_of(name))
    made.computed = 0
    with pytest.raises(RuntimeError):
        module(input_of(name)[..., :2])
    assert made.computed == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@names
def test_a_trace_computes_each_once(name: str) -> None:
    module = getattr(rnnkit, name)(I, H)
    (made,) = lora(module, weight_of(name))
    module.requires_grad_(False)  # a trace takes weights of no module for constants
    x = input_of(name)
    made.computed = 0
    torch.jit.trace(lambda x: first(module(x)), x, check_trace=False)
    assert made.computed == 1


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "to": lambda m: m.to("cpu", torch.float64),
    "type": lambda m: m.type(torch.float64),
    "share_memory": lambda m: m.share_memory(),
    "meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
}
WAYS: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "lora": lora,
}


NARROW = ("half and back", "bfloat16 and back")  # torch has no orthogonal matrices there


@pytest.mark.parametrize("born", ["ours", "converted"])
@pytest.mark.parametrize(
    ("how", "way"), [(m, w) for m in MOVES for w in WAYS if not (m in NARROW and w == "orthogonal")]
)
@names
def test_it_moves_as_torchs_does(name: str, how: str, way: str, born: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(nn, name)(I, H)
    ours = copy.deepcopy(theirs) if born == "converted" else getattr(rnnkit, name)(I, H)
    ours.load_state_dict(theirs.state_dict())
    for module in (theirs, ours):
        torch.manual_seed(1)
        WAYS[way](module, weight_of(name))
    if born == "converted":
        rnnkit.convert(ours)
    theirs, ours = (MOVES[how](nn.Sequential(m, nn.Linear(2, 2)))[0].eval() for m in (theirs, ours))
    ours.load_state_dict(theirs.state_dict())
    x = input_of(name).to(next(theirs.parameters()).dtype)
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in theirs.state_dict().items()}
    if not any(v.isnan().any() for v in theirs.state_dict().values()):  # to_empty leaves what memory holds
        torch.testing.assert_close(first(ours(x)), first(theirs(x)), equal_nan=True)


@layers
def test_spectral_norm_steps_once_a_call(name: str) -> None:
    layer = getattr(rnnkit, name)(I, H)
    parametrizations.spectral_norm(layer, "weight_hh_l0")
    norm = layer.parametrizations.weight_hh_l0[0]
    steps: list[int] = []
    power = norm._power_method
    norm._power_method = lambda *args: (steps.append(1), power(*args))[1]
    layer.train()
    layer.flatten_parameters()
    layer.bias_ih_l0 = another(layer.bias_ih_l0)
    layer.double().float()
    assert steps == []
    for _ in range(3):
        layer(input_of(name))
    assert len(steps) == 3


@names
def test_a_random_parametrization_draws_once_a_call(name: str) -> None:
    module = getattr(rnnkit, name)(I, H)
    parametrize.register_parametrization(module, weight_of(name), Noise())
    x = input_of(name)
    shape = getattr(module, weight_of(name)).shape
    torch.manual_seed(3)
    expected = torch.randn(shape)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    module.double().float()
    copy.deepcopy(module)
    assert torch.equal(torch.get_rng_state(), before)
    output = first(module(x))
    after = torch.get_rng_state()
    plain = getattr(rnnkit, name)(I, H)
    state = {k.replace("parametrizations.", "").replace(".original", ""): v for k, v in module.state_dict().items()}
    state[weight_of(name)] = state[weight_of(name)] + expected
    plain.load_state_dict(state)
    torch.testing.assert_close(output, first(plain(x)))
    torch.manual_seed(3)
    torch.randn_like(expected)
    assert torch.equal(torch.get_rng_state(), after)


@layers
def test_a_copy_after_a_call(name: str) -> None:
    """torch.nn keeps what it computed last, which has a graph and cannot be copied."""
    layer = getattr(rnnkit, name)(I, H)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    x = input_of(name)
    expected = layer(x)[0]
    assert len(layer._flat_weights) == 4
    assert torch.equal(copy.deepcopy(layer)(x)[0], expected)
