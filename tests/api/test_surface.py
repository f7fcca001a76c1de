"""What a layer or cell is, beside what it computes: it passes for torch.nn's wherever a program looks. Parameters,
initialisation, printing, copies, hooks, parametrizations, subclasses, the same mistakes answered in the same words.

Where a behaviour could be argued about, torch.nn's own module of the same arguments is the answer.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import flat, no_worse
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkit

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
I, H = 3, 4

ARGUMENTS: dict[str, tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]] = {
    "RNN": (
        ((I, H), {}),
        ((I, H, 2, "relu", False, True, 0.5, True), {}),
        # torch.nn.RNN hands its tail to RNNBase, where proj_size stands before device.
        ((I, H, 1, "tanh", True, False, 0.0, False, 0, "cpu", torch.float64), {}),
        ((I, H), {"nonlinearity": "relu", "bidirectional": True}),
    ),
    "LSTM": (
        ((I, H), {}),
        ((I, H, 2, False, True, 0.5, True, 2), {}),
        ((I, H, 1, True, False, 0.0, False, 0, "cpu", torch.float64), {}),
        ((I, H), {"proj_size": 1, "bidirectional": True, "num_layers": 3}),
    ),
    "GRU": (
        ((I, H), {}),
        ((I, H, 2, False, True, 0.5, True), {}),
        ((I, H, 1, True, False, 0.0, False, 0, "cpu", torch.float64), {}),
        ((I, H), {"bias": False, "dtype": torch.bfloat16}),
    ),
    "RNNCell": (((I, H), {}), ((I, H, False, "relu"), {}), ((I, H, True, "tanh", "cpu", torch.float64), {})),
    "LSTMCell": (((I, H), {}), ((I, H, False), {}), ((I, H, True, "cpu", torch.float64), {})),
    "GRUCell": (((I, H), {}), ((I, H, False), {}), ((I, H, True, "cpu", torch.float64), {})),
}
MADE = [(name, args, kwargs) for name, each in ARGUMENTS.items() for args, kwargs in each]
made = pytest.mark.parametrize(("name", "args", "kwargs"), MADE, ids=[f"{n}-{k}" for k, (n, _, _) in enumerate(MADE)])
names = pytest.mark.parametrize("name", LAYERS + CELLS)


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours, made with the same words after the same seed."""
    modules = []
    for place in (nn, rnnkit):
        torch.manual_seed(7)
        modules.append(getattr(place, name)(*(args or (I, H)), **kwargs))
    return modules[0], modules[1]


def input_for(module: nn.Module) -> Tensor:
    shape = (3, I) if isinstance(module, nn.RNNCellBase) else (2, 3, I)
    return torch.randn(shape, dtype=next(module.parameters()).dtype)


def same(a: nn.Module, b: nn.Module, x: Tensor | None = None) -> None:
    """Both give the same for the same input, up to rounding, and so do the gradients of their parameters."""
    x = input_for(a) if x is None else x
    if x.dtype == torch.bfloat16:  # torch.nn itself is further from the truth than two roundings
        return no_worse(a, b, x)
    torch.testing.assert_close(flat(a(x)), flat(b(x)))
    grads = []
    for module in (a, b):
        loss = sum(v.sin().sum() for v in flat(module(x)))
        wanted = [p for p in module.parameters() if p.requires_grad]
        assert loss.requires_grad == bool(wanted)
        grads.append(torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ())
    for u, v in zip(*grads, strict=True):
        torch.testing.assert_close(u, v)


# What it holds and what it prints.


@made
def test_parameters_init_and_repr(name: str, args: tuple, kwargs: dict) -> None:
    theirs, mine = pair(name, *args, **kwargs)
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in mine.named_parameters()]
    for u, v in zip(theirs.parameters(), mine.parameters(), strict=True):
        assert u.dtype == v.dtype and torch.equal(u, v)
    assert repr(theirs) == repr(mine)
    assert theirs.extra_repr() == mine.extra_repr()
    assert list(theirs.state_dict()) == list(mine.state_dict())
    assert theirs.__constants__ == mine.__constants__
    for key in theirs.__constants__:
        assert getattr(theirs, key) == getattr(mine, key)
    theirs.load_state_dict(mine.state_dict())
    assert str(mine.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    same(theirs.eval(), mine.eval())


@made
def test_flat_weights(name: str, args: tuple, kwargs: dict) -> None:
    theirs, mine = pair(name, *args, **kwargs)
    if name in CELLS:
        assert (mine.bias_ih is None) == (theirs.bias_ih is None)
        return
    assert theirs._flat_weights_names == mine._flat_weights_names
    assert theirs._all_weights == mine._all_weights
    assert all(u is v for u, v in zip(mine._flat_weights, mine.parameters(), strict=True))
    assert all(u is v for u, v in zip([p for w in mine.all_weights for p in w], mine.parameters(), strict=True))
    assert [len(weights) for weights in mine.all_weights] == [len(weights) for weights in theirs.all_weights]
    assert mine.mode == theirs.mode
    assert mine.flatten_parameters() is None


@names
def test_kind_doc_and_place(name: str) -> None:
    cls = getattr(rnnkit, name)
    assert issubclass(cls, nn.RNNCellBase if name in CELLS else nn.RNNBase)
    assert cls.__doc__ and f"torch.nn.{name}" in cls.__doc__
    assert getattr(importlib.import_module(cls.__module__), cls.__qualname__) is cls
    assert cls.forward.__doc__
    for key, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if key in ("backend", "recompute", "reset_after"):
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@names
def test_extra_arguments_are_printed_only_when_given(name: str) -> None:
    extras: dict[str, Any] = {"backend": "reference"}
    extras |= {"reset_after": False} if name.startswith("GRU") else {}
    extras |= {} if name in CELLS else {"recompute": True}
    assert all(f", {k}={v!r}" in repr(getattr(rnnkit, name)(I, H, **extras)) for k, v in extras.items())


@names
def test_reset_parameters(name: str) -> None:
    theirs, mine = pair(name)
    for module in (theirs, mine):
        torch.manual_seed(11)
        module.reset_parameters()
    assert all(torch.equal(u, v) for u, v in zip(theirs.parameters(), mine.parameters(), strict=True))


# Copies.

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": lambda m: saved(m),
}
CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as made": lambda m: m,
    "double": lambda m: m.double(),
    "meta": lambda m: m.to("meta"),
    "frozen": lambda m: m.requires_grad_(False),
}


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@names
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("change", CHANGES)
def test_copies(name: str, way: str, change: str) -> None:
    kwargs = {"backend": "reference"} | ({"reset_after": False} if name.startswith("GRU") else {})
    for extra in ({}, kwargs):
        module = CHANGES[change](getattr(rnnkit, name)(I, H, **extra).eval())
        twin = COPIES[way](module)
        assert type(twin) is type(module) and repr(twin) == repr(module) and not twin.training
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert p is not q and p.device == q.device and p.dtype == q.dtype
            assert p.requires_grad == q.requires_grad
        if change != "meta":
            same(module, twin)
            with torch.no_grad():  # the copy reads its own weights
                for q in twin.parameters():
                    q.zero_()
            assert all(not v.any() for v in flat(twin(input_for(module))))
            assert any(v.any() for v in flat(module(input_for(module))))


@names
def test_to_empty_then_loaded(name: str) -> None:
    source = getattr(rnnkit, name)(I, H)
    module = getattr(rnnkit, name)(I, H, device="meta").to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    same(source, module)


# Weights are read at every call.


def assigned(module: nn.Module, key: str, value: Tensor) -> None:
    setattr(module, key, nn.Parameter(value))


def by_data(module: nn.Module, key: str, value: Tensor) -> None:
    getattr(module, key).data = value


def registered(module: nn.Module, key: str, value: Tensor) -> None:
    module.register_parameter(key, nn.Parameter(value))


def deleted_first(module: nn.Module, key: str, value: Tensor) -> None:
    delattr(module, key)
    module.register_parameter(key, nn.Parameter(value))


def loaded(module: nn.Module, key: str, value: Tensor) -> None:
    module.load_state_dict({**module.state_dict(), key: value}, assign=True)


def in_place(module: nn.Module, key: str, value: Tensor) -> None:
    with torch.no_grad():
        getattr(module, key).copy_(value)


@names
@pytest.mark.parametrize("change", [assigned, by_data, registered, deleted_first, loaded, in_place])
def test_a_new_weight_takes_effect_at_once(name: str, change: Callable[..., None]) -> None:
    module = getattr(rnnkit, name)(I, H)
    x = input_for(module)
    before = flat(module(x))[0]
    for key, weight in dict(module.named_parameters()).items():
        value = torch.randn_like(weight)
        change(module, key, value.clone())
        assert torch.equal(getattr(module, key), value)
    fresh = getattr(rnnkit, name)(I, H)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(flat(module(x))[0], flat(fresh(x))[0])
    assert not torch.equal(flat(module(x))[0], before)


@names
def test_functional_call(name: str) -> None:
    theirs, mine = pair(name)
    values = {key: torch.randn_like(p).requires_grad_() for key, p in mine.named_parameters()}
    x = input_for(mine)
    results = [torch.func.functional_call(m, values, (x,)) for m in (theirs, mine)]
    for u, v in zip(*map(flat, results), strict=True):
        torch.testing.assert_close(u, v)
    grads = [torch.autograd.grad(flat(r)[0].sum(), list(values.values())) for r in results]
    for u, v in zip(*grads, strict=True):
        torch.testing.assert_close(u, v)
    same(theirs, mine)  # and the module's own weights are back


# Parametrizations, pruning, hooks.


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def old(function: Callable[..., nn.Module]) -> Callable[[nn.Module, str], nn.Module]:
    def apply(module: nn.Module, key: str) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates it, and people use it
            return function(module, key)

    return apply


REWEIGHTED: dict[str, Callable[[nn.Module, str], Any]] = {
    "doubled": lambda m, key: parametrize.register_parametrization(m, key, Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old(nn.utils.weight_norm),
    "old spectral_norm": old(nn.utils.spectral_norm),
    "pruned": lambda m, key: prune.l1_unstructured(m, key, 0.5),
    "pruned for good": lambda m, key: prune.remove(prune.random_unstructured(m, key, 0.3), key),
}


@names
@pytest.mark.parametrize("how", REWEIGHTED)
def test_reweighted(name: str, how: str) -> None:
    """Parametrized, normed or pruned: the same numbers as torch.nn, also after a step of training."""
    modules = pair(name)
    x = input_for(modules[0])
    for module in modules:
        torch.manual_seed(3)
        for key in [k for k, _ in module.named_parameters() if "weight" in k]:
            REWEIGHTED[how](module, key)
        # in training each look at the weight is one more power iteration, and torch.nn takes several looks a call
        module.train(how != "spectral_norm")
    same(*modules, x)
    for module in modules:
        flat(module(x))[0].sin().sum().backward()
        with torch.no_grad():
            for p in module.parameters():
                p -= 0.5 * p.grad
    same(*modules, x)
    assert list(modules[0].state_dict()) == list(modules[1].state_dict())


@names
def test_a_parametrization_is_computed_once_a_call(name: str) -> None:
    module, seen = getattr(rnnkit, name)(I, H), []
    key = next(k for k, _ in module.named_parameters() if "weight_hh" in k)
    counted = Doubled()
    parametrize.register_parametrization(module, key, counted)
    counted.register_forward_hook(lambda *a: seen.append(a))
    module(input_for(module))
    assert len(seen) == 1


@names
def test_parametrizations_come_off(name: str) -> None:
    theirs, mine = pair(name)
    key = next(k for k, _ in mine.named_parameters() if "weight_hh" in k)
    for module in (theirs, mine):
        parametrize.register_parametrization(module, key, Doubled())
        with parametrize.cached():
            flat(module(input_for(module)))
        parametrize.remove_parametrizations(module, key)
    assert type(mine) is getattr(rnnkit, name) and repr(theirs) == repr(mine)
    same(theirs, mine)


@names
def test_hooks(name: str) -> None:
    module = getattr(rnnkit, name)(I, H)
    x, seen = input_for(module).requires_grad_(), []
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    module.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs)), with_kwargs=True)
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go)))
    module.register_state_dict_pre_hook(lambda *a: seen.append("saved"))
    bare = copy.deepcopy(module)
    bare._forward_pre_hooks.clear()
    bare._backward_hooks.clear()
    out = flat(module(x))
    torch.testing.assert_close(out[0], flat(bare(2 * x))[0])
    assert torch.equal(seen[0][0][0], 2 * x) and seen[0][1] == {}
    out[0].sum().backward()
    gi, go = seen[-1]
    assert gi[0].shape == x.shape and go[0].shape == out[0].shape
    module.state_dict()
    assert seen[-1] == "saved"


@names
def test_subclass_and_super(name: str) -> None:
    class Twice(getattr(rnnkit, name)):  # type: ignore[misc]
        """A user's own."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(self.scale * input, hx)

    theirs, _ = pair(name)
    torch.manual_seed(7)
    mine = Twice(I, H)
    x = input_for(theirs)
    for u, v in zip(flat(theirs(2 * x)), flat(mine(x)), strict=True):
        torch.testing.assert_close(u, v)
    assert [k for k, _ in mine.named_parameters()] == [*(k for k, _ in theirs.named_parameters()), "scale"]
    assert repr(copy.deepcopy(mine)).startswith("Twice(")


# The same mistakes, answered alike.

BAD_LAYER: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((I,), {}),
    ((0, H), {}),
    ((I, 0), {}),
    ((-1, H), {}),
    ((I, -2), {}),
    ((1.5, H), {}),
    ((I, "4"), {}),
    ((I, H, 0), {}),
    ((I, H), {"num_layers": -1}),
    ((I, H), {"num_layers": "2"}),
    ((I, H), {"dropout": 1.5}),
    ((I, H), {"dropout": -0.1}),
    ((I, H), {"dropout": True}),
    ((I, H), {"dropout": "high"}),
    ((I, H), {"dropout": 0.5}),  # a warning: nothing to drop
    ((I, H, 2), {"dropout": 0.5}),
    ((I, H), {"bias": 1}),
    ((I, H), {"bias": None}),
    ((I, H), {"batch_first": "no"}),
    ((I, H), {"bidirectional": 1}),
    ((I, H), {"proj_size": 2}),
    ((I, H), {"proj_size": -1}),
    ((I, H), {"proj_size": H}),
    ((I, H), {"proj_size": 9}),
    ((I, H), {"nonlinearity": "sigmoid"}),
    ((I, H, 1, "sigmoid"), {}),
    ((I, H, 1, "relu"), {"nonlinearity": "tanh"}),
    ((I, H), {"device": "nowhere"}),
    ((I, H), {"dtype": torch.int64}),
    ((I, H), {"mode": "LSTM"}),
    ((I, H, 1, True, False, 0.0, False, 0, "cpu", torch.float32, 1), {}),
]
BAD_CELL: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((I,), {}),
    ((-1, H), {}),
    ((I, -1), {}),
    ((I, 0), {}),
    ((1.5, H), {}),
    ((I, H), {"bias": None}),
    ((I, H), {"nonlinearity": "sigmoid"}),
    ((I, H), {"dtype": torch.int64}),
    ((I, H), {"device": "nowhere"}),
    ((I, H), {"unknown": 1}),
    ((I, H, True, "tanh", "cpu", torch.float32, 1), {}),
]


def answer(call: Callable[[], Any]) -> tuple[str, ...]:
    """The error's type and message, or how often what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return type(error).__name__, str(error).replace("rnnkit.nn.", "")
    return tuple(f"{w.category.__name__}: {w.message}" for w in caught)


@names
def test_constructor_mistakes(name: str) -> None:
    for args, kwargs in BAD_CELL if name in CELLS else BAD_LAYER:
        theirs, mine = (answer(lambda p=p: getattr(p, name)(*args, **kwargs)) for p in (nn, rnnkit))  # noqa: B023
        assert theirs == mine, (args, kwargs)


@pytest.mark.parametrize("kwargs", [{"backend": "cudnn"}, {"backend": None}])
@names
def test_an_unknown_backend(name: str, kwargs: dict) -> None:
    with pytest.raises(ValueError, match="backend must be one of auto"):
        getattr(rnnkit, name)(I, H, **kwargs)


Z = torch.zeros
BAD_CALLS: dict[str, list[tuple[Any, Callable[[bool], Any]]]] = {
    "layer": [
        (Z(2, 3, I + 1), lambda pair: None),
        (Z(2, 3, 3, I), lambda pair: None),
        (Z(I), lambda pair: None),
        (Z(0, 3, I), lambda pair: None),
        (Z(2, 3, I).double(), lambda pair: None),
        (Z(2, 3, I).long(), lambda pair: None),
        (None, lambda pair: None),
        ([[0.0] * I], lambda pair: None),
        (Z(2, 3, I), lambda pair: (Z(1, 3, H + 1),) * 2 if pair else Z(1, 3, H + 1)),
        (Z(2, 3, I), lambda pair: (Z(2, 3, H),) * 2 if pair else Z(2, 3, H)),
        (Z(2, 3, I), lambda pair: (Z(1, 4, H),) * 2 if pair else Z(1, 4, H)),
        (Z(2, 3, I), lambda pair: (Z(1, H),) * 2 if pair else Z(1, H)),
        (Z(2, I), lambda pair: (Z(1, 1, H),) * 2 if pair else Z(1, 1, H)),
        (Z(2, 3, I), lambda pair: (Z(1, 3, H), Z(1, H)) if pair else Z(3, H)),
        (Z(2, 3, I), lambda pair: (Z(1, 3, H), Z(1, 3, H + 1)) if pair else 7),
        (Z(2, 3, I), lambda pair: (Z(1, 3, H).double(),) * 2 if pair else Z(1, 3, H).double()),
    ],
    "cell": [
        (Z(3, I + 1), lambda pair: None),
        (Z(2, 3, I), lambda pair: None),
        (Z(()), lambda pair: None),
        (None, lambda pair: None),
        (Z(3, I).double(), lambda pair: None),
        (Z(3, I), lambda pair: (Z(3, H + 1),) * 2 if pair else Z(3, H + 1)),
        (Z(3, I), lambda pair: (Z(2, H),) * 2 if pair else Z(2, H)),
        (Z(3, I), lambda pair: (Z(H),) * 2 if pair else Z(H)),
        (Z(I), lambda pair: (Z(1, H),) * 2 if pair else Z(1, H)),
        (Z(3, I), lambda pair: (Z(1, 3, H),) * 2 if pair else Z(1, 3, H)),
    ],
}


@names
def test_call_mistakes(name: str) -> None:
    theirs, mine = pair(name)
    for x, hx in BAD_CALLS["cell" if name in CELLS else "layer"]:
        state = hx("LSTM" in name)
        expected = answer(lambda: theirs(x, state))  # noqa: B023
        assert expected, "torch.nn takes this: it belongs elsewhere"
        assert answer(lambda: mine(x, state)) == expected, (x, state)  # noqa: B023
