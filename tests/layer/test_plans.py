"""What is remembered of a call: a plan may only ever be quicker. Held against the same call layer by layer, in results
and in the words of every error; and whatever changes between two calls has effect at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine import KINDS, NAMES, B, H, I, Sub, T, Watched, flat, forget, outcome, same, state_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import rnnkit
from rnnkit import functional
from rnnkit.backends import BY_NAME, LayerSpec, record, select, select_backend
from rnnkit.backends.cpu import extension
from rnnkit.layer import stack

pytestmark = pytest.mark.skipif(not BY_NAME["cpu"].stacks, reason=extension.reason() or "torch lacks torch._C._aoti")


class Engine:
    """Which way the calls of backend `cpu` went: "whole", or "layer" for each layer."""

    def __init__(self) -> None:
        self.went: list[str] = []


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    forget(monkeypatch)
    found, cpu = Engine(), BY_NAME["cpu"]

    def noted(name: str, right: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **how: Any) -> Any:
            result = right(*args, **how)
            found.went.append(name)
            return result

        return run

    monkeypatch.setattr(cpu, "stack_forward", noted("whole", cpu.stack_forward))
    monkeypatch.setattr(cpu, "forward", noted("layer", cpu.forward))
    monkeypatch.setattr(select, "preference", lambda spec: (cpu, *(b for b in select.BACKENDS if b is not cpu)))
    return found


def both_ways(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    planned = outcome(call)
    with monkeypatch.context() as patch:
        patch.setattr(stack, "run", lambda *_: None)
        return planned, outcome(call)


# The same results.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize(("name", "options"), KINDS)
@torch.no_grad()
def test_a_step_is_bitwise_the_same(name, options, hx, bias, engine, monkeypatch):
    cell, x = getattr(rnnkit, f"{name}Cell")(I, H, bias=bias, **options), torch.randn(B, I)
    state = state_of(name, B, H) if hx else None
    first = outcome(lambda: cell(x, state))
    planned, checked = both_ways(lambda: cell(x, state), monkeypatch)
    assert engine.went == ["whole", "whole", "layer"]
    assert same(planned, checked) and same(first, checked)
    row = None if state is None else tuple(v[0] for v in state) if name == "LSTM" else state[0]
    assert same(*both_ways(lambda: cell(x[0], row), monkeypatch))  # unbatched
    assert same(*both_ways(lambda: cell(x.T.contiguous().T, state), monkeypatch))


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_a_steps_gradients_are_bitwise_the_same(name, options, engine, monkeypatch):
    cell, x = getattr(rnnkit, f"{name}Cell")(I, H, **options), torch.randn(B, I)

    def call() -> Any:
        leaves = [v.requires_grad_() for v in (x.clone(), *flat(state_of(name, B, H)))]
        state = tuple(leaves[1:]) if name == "LSTM" else leaves[1]
        results = flat(cell(leaves[0], state))
        return [*results, *torch.autograd.grad(sum(v.square().sum() for v in results), [*leaves, *cell.parameters()])]

    def repeated() -> Any:
        torch.manual_seed(1)
        return call()

    planned, checked = both_ways(repeated, monkeypatch)
    assert engine.went == ["whole", "layer"] and same(planned, checked)


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
        planned, checked = both_ways(lambda call=call: call(cell), monkeypatch)
        assert same(planned, checked) and type(planned) is type(checked), (k, planned, checked)
        assert isinstance(planned, tuple) or k >= 2, k
    changes = [lambda w: w[:-1], lambda w: w.double(), lambda w: w[..., :-1], lambda w: None, lambda w: w[None]]
    for which in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        for change in changes:
            cell = broken(getattr(rnnkit, f"{name}Cell")(I, H), which, change)
            planned, checked = both_ways(lambda cell=cell: cell(GOOD), monkeypatch)
            assert same(planned, checked), (which, planned, checked)


@pytest.mark.parametrize("name", NAMES)
def test_a_layers_mistake_says_the_same(name, engine, monkeypatch):
    layer, x = getattr(rnnkit, name)(I, H), torch.randn(T, B, I)
    for _ in range(2):
        layer(x)
    inputs = [x[..., :2], x[None], x.double(), x.long(), "x", None, x[:0], x[:, :0]]
    states = [state_of(name, 2, B, H), state_of(name, 1, B + 1, H), state_of(name, B, H), "h", [torch.zeros(1, B, H)]]
    for k, args in enumerate([(v, None) for v in inputs] + [(x, hx) for hx in states]):
        planned, checked = both_ways(lambda args=args: layer(*args), monkeypatch)
        assert same(planned, checked), (k, planned, checked)
    for which in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        for change in (lambda w: w[:-1], lambda w: w.double(), lambda w: w[..., :-1], lambda w: None):
            layer = broken(getattr(rnnkit, name)(I, H), which, change)
            planned, checked = both_ways(lambda layer=layer: layer(x), monkeypatch)
            assert isinstance(planned, tuple) and planned == checked, (which, planned, checked)


@torch.no_grad()
def test_arguments_of_the_functions_say_the_same(engine, monkeypatch):
    h, x = torch.randn(B, H), torch.randn(T, B, I)
    gru, lstm = ([p.detach() for p in getattr(rnnkit, n)(I, H).parameters()] for n in ("GRU", "LSTM"))
    cell, layer = functional.gru_cell, functional.gru
    cell(GOOD, h, gru), layer(x, h[None], gru), functional.lstm(x, (h[None], h[None]), lstm)
    mistakes: list[Callable[[], Any]] = [
        lambda: cell(GOOD, (h, h), gru),
        lambda: cell(GOOD, h, iter(gru)),
        lambda: cell(GOOD, h, [*gru[:2], None, None]),
        lambda: cell(GOOD, h, [*gru[:3], None]),
        lambda: cell(GOOD, h, gru[:1]),
        lambda: cell(GOOD, h, gru[:3]),
        lambda: cell(GOOD, h, []),
        lambda: cell(GOOD, h, [None, *gru[1:]]),
        lambda: cell(GOOD, h, [*gru, gru[0]]),
        lambda: cell(GOOD, h, [gru[0], gru[2], *gru[2:]]),
        lambda: cell(GOOD, h, [0, *gru[1:]]),
        lambda: cell(GOOD, h, gru, backend="gpu"),
        lambda: cell(x, h, gru),
        lambda: layer(GOOD, h, gru),
        lambda: layer(x, (h[None], h[None]), gru),
        lambda: layer(x, None, gru, num_layers=True),
        lambda: layer(x, None, gru, num_layers=0),
        lambda: layer(x, None, gru, num_layers=2),
        lambda: layer(x, None, gru, bidirectional=True),
        lambda: layer(x, None, gru, recompute=0),
        lambda: layer(x, None, gru, return_all_states=0),
        lambda: layer(x, None, gru, dropout=2.0),
        lambda: layer(x, None, gru, dropout="0"),
        lambda: layer(x, None, gru, lengths=torch.tensor([1, T + 1])),
        lambda: layer(x, None, gru, lengths=[1, 2]),
        lambda: layer(x, None, gru, lengths=torch.ones(T, dtype=torch.int64)),
        lambda: layer(x, None, gru, reset=torch.full((T, B), 0.5)),
        lambda: layer(x, None, gru, reset_state=h[None]),
        lambda: layer(x, None, gru, backend="cuda"),
        lambda: functional.lstm(x, None, [*lstm[:2], None, None]),
        lambda: functional.lstm(x, None, lstm, proj_size=2),
        lambda: functional.lstm(x, (h[None], None), lstm),
    ]
    for k, call in enumerate(mistakes):
        planned, checked = both_ways(call, monkeypatch)
        assert isinstance(planned, tuple) and planned == checked, (k, planned, checked)


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
    monkeypatch.setattr(stack, "CACHE_SIZE", 4)
    for steps in range(1, 12):
        problem = LayerSpec("gru", "cpu", torch.float32, steps, B, I, H, 0, True)
        assert select_backend("auto", problem) is select_backend("auto", problem) is BY_NAME["cpu"]
        rnnkit.GRU(I, H)(torch.randn(steps, B, I))
        assert len(select._selected) <= 4 and 0 < len(stack._plans) <= 4


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@torch.no_grad()
def test_what_is_refused_as_one_call_goes_layer_by_layer_through_the_same_backend(backend, engine, monkeypatch):
    """Chosen, and named where `auto` would take another."""
    layer, x, right = rnnkit.GRU(I, H, 2, backend=backend), torch.randn(T, B, I), select.preference
    if backend != "auto":
        monkeypatch.setattr(select, "preference", lambda spec: right(spec)[::-1])
    y, _ = layer(x)

    def refuse(*_: Any) -> None:
        raise extension.Unfit("does not fit")

    monkeypatch.setattr(BY_NAME["cpu"], "stack_forward", refuse)
    assert torch.equal(layer(x)[0], y) and engine.went == ["whole", "layer", "layer"]


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
    assert engine.went == ["whole"] * 3
    torch.testing.assert_close(after, truth)
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
    assert engine.went == ["whole"] * 3 and seen == ["before"] and torch.equal(h, plain[0] + 1)


# What is not plain.


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


def test_subclasses_and_modes_have_no_plan(engine):
    cell, x, h = rnnkit.GRUCell(I, H), torch.randn(B, I), torch.randn(B, H)
    layer, xs = rnnkit.GRU(I, H), torch.randn(T, B, I)
    before = rnnkit.GRUCell(I, H, reset_after=False)

    def planned(call: Callable[[], Any]) -> bool:
        engine.went.clear()
        call()
        return "whole" in engine.went

    with torch.no_grad():
        for call in (lambda: cell(x, h), lambda: layer(xs), lambda: before(x, h)):
            assert planned(call)
        assert not planned(lambda: cell(x.as_subclass(Sub), h))
        assert not planned(lambda: cell(x, h.as_subclass(Sub)))
        with Watched():
            assert not planned(lambda: cell(x, h)) and not planned(lambda: layer(xs))
        with torch.autocast("cpu"):
            assert not planned(lambda: cell(x, h)) and not planned(lambda: layer(xs))
        assert not planned(lambda: torch.func.vmap(cell)(x[None]))
        assert not planned(lambda: torch.func.grad(lambda v: cell(v, h).sum())(x))
        with forward_ad.dual_level():
            assert not planned(lambda: cell(x, h)) and not planned(lambda: layer(xs))
        for traced in (cell, before):
            assert not planned(lambda traced=traced: torch.jit.trace(traced, (x, h), check_trace=False))
        assert not planned(lambda: torch.compile(cell, backend="eager", fullgraph=True)(x, h))
        assert planned(lambda: cell(x, h))
        cell.weight_hh = Opaque(cell.weight_hh.detach())
        assert not planned(lambda: cell(x, h))


# What changes between two calls.

BETWEEN: dict[str, Callable[[nn.Module], Any]] = {
    "a weight": lambda m: setattr(m, "weight_hh_l1", nn.Parameter(torch.ones_like(m.weight_hh_l1))),
    "a frozen layer": lambda m: m.weight_hh_l0.requires_grad_(False),
    "a shape": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(torch.ones(3, 3))),
    "dtype": lambda m: m.double(),
    "device": lambda m: m.to("meta"),
    "evaluation": lambda m: m.eval(),
    "dropout": lambda m: setattr(m, "dropout", 0.75),
    "a parametrization": lambda m: parametrize.register_parametrization(m, "weight_ih_l1", Twice()),
    "a hook": lambda m: m.register_forward_hook(lambda _, args, result: (result[0] + 1, result[1])),
    "recompute": lambda m: setattr(m, "recompute", True),
    "backend": lambda m: setattr(m, "backend", "reference"),
    "layout": lambda m: setattr(m, "batch_first", True),
}


@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("name", NAMES)
def test_a_change_between_two_calls_has_effect_at_once(name, change, engine):
    def module() -> nn.Module:
        torch.manual_seed(2)
        return getattr(rnnkit, name)(I, H, 2, dropout=0.5)

    def call(m: nn.Module) -> Any:
        torch.manual_seed(3)
        kind = next(m.parameters()).dtype
        x = torch.randn(B, B, I).to(kind).requires_grad_()
        y, _ = m(x)
        wanted = [x, *(p for p in m.parameters() if p.requires_grad)]
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    used, fresh = module(), module()
    before = outcome(lambda: call(used))
    BETWEEN[change](used)
    BETWEEN[change](fresh)
    after = outcome(lambda: call(used))
    stack._plans.clear()
    assert same(after, outcome(lambda: call(fresh)))
    if change not in ("a frozen layer", "recompute", "layout"):
        assert not same(before, after) or change == "backend"


def test_threads_and_backends_of_a_block_have_effect_at_once(engine, monkeypatch):
    """The number of threads by the choice: here `auto` takes the reference for three."""
    layer, x, right = rnnkit.GRU(I, H, 2), torch.randn(T, B, I), select.preference

    def preference(spec: LayerSpec) -> tuple[Any, ...]:
        return (BY_NAME["reference"],) if torch.get_num_threads() == 3 else right(spec)

    monkeypatch.setattr(select, "preference", preference)
    y, _ = layer(x)
    with rnnkit.use_backend("reference"):
        layer(x)
    assert engine.went == ["whole"]
    count = torch.get_num_threads()
    try:
        for threads, whole in ((1, 2), (3, 2), (1, 3), (2, 4), (3, 4)):
            torch.set_num_threads(threads)
            found, _ = layer(x)
            torch.testing.assert_close(found, y)
            assert torch.equal(found, y) or threads == 3
            assert engine.went == ["whole"] * whole, threads
    finally:
        torch.set_num_threads(count)
