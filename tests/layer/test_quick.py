"""The quick way past the checks, for backends whose operators check everything: it may only ever be quicker.

No such backend is there on every machine, so the stand-in of engine.py takes the place of `cpu`. Held against the
ordinary way: results, bit by bit, and the words of every error. And that it is not taken where a call is not plain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine import KINDS, NAMES, B, H, I, T, flat, same, state_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkit
from rnnkit import checks, ops
from rnnkit.backends import LayerSpec, cached_backend, record, select, select_backend


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the kind and the words of its exception."""
    try:
        return [v.detach().clone() for v in flat(call())]
    except Exception as error:
        return type(error), str(error)


def both_ways(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    quick = outcome(call)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "quick_layer", lambda *_: None)
        patch.setattr(ops, "quick_step", lambda *_: None)
        return quick, outcome(call)


# The same results.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize(("name", "options"), KINDS)
@torch.no_grad()
def test_a_step_is_bitwise_the_same(name, options, hx, bias, engine, monkeypatch):
    cell, x = getattr(rnnkit, f"{name}Cell")(I, H, bias=bias, **options), torch.randn(B, I)
    state = state_of(name, B, H) if hx else None
    first = outcome(lambda: cell(x, state))
    assert engine.went == ["layer"]  # nothing is known yet
    engine.went.clear()
    quick, checked = both_ways(lambda: cell(x, state), monkeypatch)
    assert engine.went == ["step", "layer"]
    assert same(quick, checked) and same(first, checked)
    row = None if state is None else tuple(v[0] for v in state) if name == "LSTM" else state[0]
    assert same(*both_ways(lambda: cell(x[0], row), monkeypatch))  # unbatched
    assert same(*both_ways(lambda: cell(x.T.contiguous().T, state), monkeypatch))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "shape", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}]
)
@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_a_layer_is_bitwise_the_same(name, options, hx, shape, train, engine, monkeypatch):
    layer, x = getattr(rnnkit, name)(I, H, **options, **shape), torch.randn(T, B, I)
    count = 4 if "num_layers" in shape else 1
    state = state_of(name, count, T if "batch_first" in shape else B, H) if hx else None

    def call() -> Any:
        leaf = x.clone().requires_grad_(train)
        results = flat(layer(leaf, state))
        grads = (
            torch.autograd.grad(sum(v.square().sum() for v in results), [leaf, *layer.parameters()]) if train else ()
        )
        return [*results, *grads]

    with torch.set_grad_enabled(train):
        first = outcome(call)
        asked = []
        monkeypatch.setattr(checks, "layer", lambda *args: asked.append(args) or right(*args))
        quick = outcome(call)
        assert asked == []  # no check was made twice
        monkeypatch.setattr(ops, "quick_layer", lambda *_: None)
        assert same(quick, outcome(call)) and same(first, quick)
        assert len(asked) == count


right = checks.layer


# The same errors.

GOOD = torch.linspace(-1, 1, B * I).view(B, I)


def ruined(name: str) -> list[Callable[[nn.Module], Any]]:
    """Calls with one mistake each; several differ from the good one in nothing that a choice depends on."""
    good = state_of(name, B, H)
    wrong = [
        state_of(name, B + 1, H),
        state_of(name, B, H + 1),
        state_of(name, H),
        state_of(name, 1, B, H),
        "hx",
        (torch.zeros(B, H),) * 3,
        [torch.zeros(B, H)],
        tuple(v.double() for v in good) if name == "LSTM" else good.double(),
        tuple(v.long() for v in good) if name == "LSTM" else good.long(),
        (torch.zeros(B, H), None),
    ]
    calls: list[Callable[[nn.Module], Any]] = [lambda cell, hx=hx: cell(GOOD, hx) for hx in wrong]
    inputs = [GOOD[:, :2], GOOD[None], GOOD.double(), GOOD.long(), "x", None, GOOD[0, 0], GOOD.to_sparse()]
    return calls + [lambda cell, x=x: cell(x, good) for x in inputs]


def broken(cell: nn.Module, which: str, change: Callable[[Tensor], Any]) -> nn.Module:
    cell._parameters[which] = change(getattr(cell, which).detach())
    return cell


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_mistake_says_the_same(name, engine, monkeypatch):
    cell = getattr(rnnkit, f"{name}Cell")(I, H)
    for _ in range(2):
        cell(GOOD, state_of(name, B, H))
    for k, call in enumerate(ruined(name)):
        quick, checked = both_ways(lambda call=call: call(cell), monkeypatch)
        assert same(quick, checked) and type(quick) is type(checked), (k, quick, checked)
        assert isinstance(quick, tuple) or k >= 2, k
    changes = [lambda w: w[:-1], lambda w: w.double(), lambda w: w[..., :-1], lambda w: None, lambda w: w[None]]
    for which in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        for change in changes:
            cell = broken(getattr(rnnkit, f"{name}Cell")(I, H), which, change)
            quick, checked = both_ways(lambda cell=cell: cell(GOOD), monkeypatch)
            assert same(quick, checked), (which, quick, checked)


@pytest.mark.parametrize("name", NAMES)
def test_a_layers_mistake_says_the_same(name, engine, monkeypatch):
    layer, x = getattr(rnnkit, name)(I, H), torch.randn(T, B, I)
    for _ in range(2):
        layer(x)
    inputs = [x[..., :2], x[None], x.double(), x.long(), "x", None, x[:0], x[:, :0]]
    states = [state_of(name, 2, B, H), state_of(name, 1, B + 1, H), state_of(name, B, H), "h", [torch.zeros(1, B, H)]]
    for k, args in enumerate([(v, None) for v in inputs] + [(x, hx) for hx in states]):
        quick, checked = both_ways(lambda args=args: layer(*args), monkeypatch)
        assert same(quick, checked), (k, quick, checked)
    for which in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        for change in (lambda w: w[:-1], lambda w: w.double(), lambda w: w[..., :-1], lambda w: None):
            layer = broken(getattr(rnnkit, name)(I, H), which, change)
            quick, checked = both_ways(lambda layer=layer: layer(x), monkeypatch)
            assert isinstance(quick, tuple) and quick == checked, (which, quick, checked)


@torch.no_grad()
def test_arguments_of_the_functions_say_the_same(engine, monkeypatch):
    h, x = torch.randn(B, H), torch.randn(T, B, I)
    gru, lstm = ([p.detach() for p in getattr(rnnkit, n)(I, H).parameters()] for n in ("GRU", "LSTM"))
    for _ in range(2):
        ops.step("gru", GOOD, h, None, gru), ops.layer("gru", x, h, None, gru), ops.layer("lstm", x, h, h, lstm)
    mistakes: list[Callable[[], Any]] = [
        lambda: ops.step("gru", GOOD, h, h, gru),
        lambda: ops.step("gru", GOOD, h, None, iter(gru)),
        lambda: ops.step("gru", GOOD, h, None, [*gru[:2], None, None]),
        lambda: ops.step("gru", GOOD, h, None, [*gru[:3], None]),
        lambda: ops.step("gru", GOOD, h, None, gru[:1]),
        lambda: ops.step("gru", GOOD, h, None, gru[:3]),
        lambda: ops.step("gru", GOOD, h, None, []),
        lambda: ops.step("gru", GOOD, h, None, [None, *gru[1:]]),
        lambda: ops.step("gru", GOOD, h, None, [*gru, gru[0]]),
        lambda: ops.step("gru", GOOD, h, None, [gru[0], gru[2], *gru[2:]]),
        lambda: ops.step("gru", GOOD, h, None, [0, *gru[1:]]),
        lambda: ops.step("elman", GOOD, h, None, gru),
        lambda: ops.step("gru", GOOD, h, None, gru, backend="gpu"),
        lambda: ops.step("gru", x, h, None, gru),
        lambda: ops.layer("gru", GOOD, h, None, gru),
        lambda: ops.layer("gru", x, h, h, gru),
        lambda: ops.layer("gru", x, h, None, gru, reverse=0),
        lambda: ops.layer("gru", x, h, None, gru, reverse=None),
        lambda: ops.layer("gru", x, h, None, gru, recompute=0),
        lambda: ops.layer("gru", x, h, None, gru, all_states=0),
        lambda: ops.layer("gru", x, h, None, gru, backend="cuda"),
        lambda: ops.layer("lstm", x, h, h, [*lstm[:2], None, None]),
    ]
    for k, call in enumerate(mistakes):
        quick, checked = both_ways(call, monkeypatch)
        assert isinstance(quick, tuple) and quick == checked, (k, quick, checked)
    for given in ((h, None), (None, h)):  # half a state is allowed here
        assert same(*both_ways(lambda given=given: ops.layer("lstm", x, *given, lstm)[:3], monkeypatch))


# The choice.


@torch.no_grad()
def test_a_remembered_choice_yields_to_use_backend_record_and_explain(engine):
    cell, layer = rnnkit.GRUCell(I, H), rnnkit.GRU(I, H)
    calls = [(cell, GOOD), (layer, torch.randn(T, B, I))]
    for module, x in calls:
        for _ in range(2):
            module(x)
        engine.went.clear()
        with rnnkit.use_backend("reference"):
            module(x), module(x)
            assert engine.went == []
            with rnnkit.use_backend("cpu"):
                module(x), module(x)
                assert len(engine.went) == 2
        module(x)
        assert len(engine.went) == 3
        with record() as met:
            module(x)
        assert [(asked, name) for _, asked, name in met] == [("auto", "cpu")]
        assert [c.backend for c in rnnkit.explain(module, x).choices] == ["cpu"]
        module.backend = "reference"
        engine.went.clear()
        with record() as met:
            module(x), module(x)
        assert [name for *_, name in met] == ["reference"] * 2 and engine.went == []
        module(x)
        assert engine.went == []
        with rnnkit.use_backend("cuda"), pytest.raises(NotImplementedError, match="'cuda'"):
            module(x)


def test_a_choice_is_remembered_for_its_problem_and_for_onednn(engine, monkeypatch):
    asked = []
    right = select.preference
    monkeypatch.setattr(select, "preference", lambda problem: asked.append(problem) or right(problem))
    layer = rnnkit.GRU(I, H)
    for _ in range(3):
        layer(torch.randn(T, B, I))
    assert len(asked) == 1
    layer(torch.randn(T, B + 1, I))
    assert len(asked) == 2
    with torch.no_grad():
        layer(torch.randn(T, B, I))
    assert len(asked) == 3
    with torch.backends.mkldnn.flags(enabled=not torch._C._get_mkldnn_enabled()):
        layer(torch.randn(T, B, I))
    assert len(asked) == 4
    layer(torch.randn(T, B, I))
    assert len(asked) == 4


def test_few_choices_are_remembered(engine, monkeypatch):
    monkeypatch.setattr(select, "CACHE_SIZE", 4)
    for steps in range(1, 12):
        problem = LayerSpec("gru", "cpu", torch.float32, steps, B, I, H, 0, True)
        assert select_backend("auto", problem) is cached_backend("auto", problem) is engine
        assert cached_backend("auto", tuple(problem)) is engine
        assert len(select._selected) <= 4


# Weights of this moment.


def with_norm(cell: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(cell, "weight_hh")
    cell.weight_hh_g.data *= 2


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


CHANGES: list[Callable[[nn.Module], Any]] = [
    lambda cell: setattr(cell, "weight_hh", nn.Parameter(torch.ones_like(cell.weight_hh))),
    lambda cell: setattr(cell.weight_hh, "data", torch.ones_like(cell.weight_hh)),
    lambda cell: cell.weight_hh.data.add_(1),
    lambda cell: parametrize.register_parametrization(cell, "weight_hh", Twice()),
    lambda cell: cell.load_state_dict({k: v + 1 for k, v in cell.state_dict().items()}, assign=True),
    with_norm,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_changed_weights_are_seen_at_once(name, change, engine):
    cell, hx = getattr(rnnkit, f"{name}Cell")(I, H), state_of(name, B, H)
    before = [cell(GOOD, hx) for _ in range(2)][1]
    change(cell)
    after = cell(GOOD, hx)
    with rnnkit.use_backend("reference"):
        truth = cell(GOOD, hx)
    assert engine.went[1:] == ["step", "step"] and same(flat(after), flat(truth))
    assert not same(flat(before), flat(after))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_layers_parametrization_and_functional_call(name, engine):
    layer, x = getattr(rnnkit, name)(I, H), torch.randn(T, B, I)
    first = [layer(x)[0] for _ in range(2)][1]
    given = {k: 2 * v for k, v in layer.named_parameters()}
    doubled = torch.func.functional_call(layer, given, (x,))[0]
    assert not torch.equal(first, doubled) and torch.equal(first, layer(x)[0])
    for key in given:
        parametrize.register_parametrization(layer, key, Twice())
    assert torch.equal(layer(x)[0], doubled)
    for key in given:
        parametrize.remove_parametrizations(layer, key, leave_parametrized=False)
    assert torch.equal(layer(x)[0], first)


@torch.no_grad()
def test_hooks_still_fire(engine):
    cell, seen = rnnkit.LSTMCell(I, H), []
    cell(GOOD)
    cell.register_forward_pre_hook(lambda _, args: seen.append("before"))
    cell.register_forward_hook(lambda _, args, result: (result[0] + 1, result[1]))
    plain = cell.forward(GOOD)
    h, _ = cell(GOOD)
    assert engine.went == ["layer", "step", "step"] and seen == ["before"] and torch.equal(h, plain[0] + 1)


# What is not plain.


class Sub(Tensor):
    """A subclass that looks like a tensor in every way."""


class Watched(TorchDispatchMode):
    """A mode that lets everything pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Opaque(nn.Parameter):
    """A subclass that turns __torch_function__ off."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def test_autocast_of_another_device_changes_no_path(engine):
    layer, x = rnnkit.GRU(I, H), torch.randn(T, B, I)
    torch.set_autocast_enabled("cuda", True)
    try:
        y, _ = layer(x)
        hx = rnnkit.GRUCell(I, H)(x[0])
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert type(y.grad_fn) is type(layer(x)[0].grad_fn) and y.dtype == hx.dtype == torch.float32


def test_subclasses_and_modes_do_not_go_the_quick_way(engine):
    cell, x, h = rnnkit.GRUCell(I, H), torch.randn(B, I), torch.randn(B, H)
    layer, xs = rnnkit.GRU(I, H), torch.randn(T, B, I)
    before = rnnkit.GRUCell(I, H, reset_after=False)

    def quick(call: Callable[[], Any]) -> bool:
        engine.went.clear()
        asked: list[Any] = []
        right = checks.layer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checks, "layer", lambda *args: asked.append(args) or right(*args))
            call()
        return not asked

    with torch.no_grad():
        for call in (lambda: cell(x, h), lambda: layer(xs), lambda: before(x, h)):
            call()
            assert quick(call)
        assert not quick(lambda: cell(x.as_subclass(Sub), h))
        assert not quick(lambda: cell(x, h.as_subclass(Sub)))
        with Watched():
            assert not quick(lambda: cell(x, h)) and not quick(lambda: layer(xs))
        with torch.autocast("cpu"):
            assert not quick(lambda: cell(x, h)) and not quick(lambda: layer(xs))
        assert not quick(lambda: torch.func.vmap(cell)(x[None]))
        assert not quick(lambda: torch.func.grad(lambda v: cell(v, h).sum())(x))
        with forward_ad.dual_level():
            assert not quick(lambda: cell(x, h)) and not quick(lambda: layer(xs))
        engine.went.clear()
        for traced in (cell, before):
            torch.jit.trace(traced, (x, h), check_trace=False)
        torch.compile(cell, backend="eager", fullgraph=True)(x, h)
        assert "step" not in engine.went
        assert quick(lambda: cell(x, h)) and engine.went == ["step"]
        cell.weight_hh = Opaque(cell.weight_hh.detach())
        assert not quick(lambda: cell(x, h))
    cell = rnnkit.GRUCell(I, H)
    cell(x, h), cell(x, h)
    assert "step" not in engine.went  # a gradient is wanted
    cell.requires_grad_(False)
    cell(x, h), cell(x, h)
    assert engine.went[-1] == "step"
    cell(x, h.clone().requires_grad_())
    assert engine.went[-1] == "layer"
