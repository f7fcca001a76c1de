"""Declaring a cell: what is read off a class, and what is said, in the user's words, of what does not fit."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from custom_layers import GRU, LSTM, Everything
from torch import nn

import rnnkit
from rnnkit.custom import choose, declare, probe
from rnnkit.custom.declare import spec_named, spec_of


def cell(step: Any = lambda a, h: a, base: type = rnnkit.Cell, **members: Any) -> type:
    """A class with this step."""
    known = {"gates": 1, "states": ("h",), "step": staticmethod(step) if callable(step) else step, **members}
    return type("Mine", (base,), {k: v for k, v in known.items() if v is not ...})


def test_what_is_read() -> None:
    spec = spec_of(Everything)
    assert (spec.name, spec.gates, spec.states) == ("Everything", 2, ("h", "m"))
    assert spec.arguments == ("a", "h", "m", "p", "w", "keep", "gap", "act")
    assert spec.units == ("p",) and spec.weights == (("w_hh", 2), ("w", 2))
    assert spec.steps == (("keep", "unit", False), ("gap", "row", True))
    assert spec.options == {"act": torch.tanh}
    assert spec_of(Everything) is spec and spec_of(Everything()) is spec
    other = spec_of(Everything(act="relu"))
    assert other.options == {"act": torch.relu} and other.key != spec.key and spec_named(other.key) is other
    assert copy.deepcopy(other) is other and pickle.loads(pickle.dumps(other)) is other


def test_a_step_without_h_has_no_recurrent_weight() -> None:
    spec = spec_of(cell(lambda gx, h, u: torch.tanh(gx + u * h), u=rnnkit.per_unit()))
    assert spec.weights == () and not spec.recurrent
    layer = rnnkit.Custom(spec.cell, 3, 4)
    assert list(layer.state_dict()) == ["weight_ih_l0", "bias_ih_l0", "u_l0"]


def test_one_declaration_under_three_names_is_three_parameters_and_a_subclass_may_change_them() -> None:
    p = rnnkit.per_unit()
    base = cell(lambda a, h, p_i, p_f: a * p_i + p_f, p_i=p, p_f=p)
    assert spec_of(base).units == ("p_i", "p_f")
    less = cell(lambda a, h, p_i: a * p_i, base, p_f=None)
    assert spec_of(less).units == ("p_i",)
    assert spec_of(base).key != spec_of(less).key  # which have one name


MISTAKES: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "no gates": (lambda: cell(gates=...), TypeError, ["Mine.gates", "number of blocks"]),
    "gates of no number": (lambda: cell(gates="4"), TypeError, ["Mine.gates", "'4'"]),
    "no states": (lambda: cell(states=...), TypeError, ["Mine.states", "tuple of names"]),
    "a state that is no tuple": (lambda: cell(states="h"), TypeError, ['write ("h",)']),
    "twice the same state": (lambda: cell(states=("h", "h")), ValueError, ["differ"]),
    "a state with a taken name": (lambda: cell(states=("gx",)), ValueError, ["'gx'", "taken"]),
    "no step": (lambda: cell(...), TypeError, ["Mine has no step", "@staticmethod"]),
    "a step of an instance": (lambda: cell(step=property()), TypeError, ["static", "@staticmethod"]),
    "an argument nobody declared": (
        lambda: cell(lambda a, h, p_i: a), TypeError, ["'p_i'", "not declared", "rnnkit.per_unit()"]),
    "an argument with a default": (
        lambda: cell(lambda a, h, eps=1e-5: a), TypeError, ["'eps'", "eps = rnnkit.option(1e-05)"]),
    "any argument": (lambda: cell(lambda a, h, **more: a), TypeError, ["**more", "by name"]),
    "a declaration nobody uses": (lambda: cell(p=rnnkit.per_unit()), TypeError, ["declares p", "step does not name"]),
    "a step that sees no input": (lambda: cell(lambda gh, h: gh), TypeError, ["never sees the input"]),
    "a parameter called as torch's": (
        lambda: cell(lambda a, weight_ih: a, weight_ih=rnnkit.per_unit()), ValueError, ["weight_ih", "choose another"]),
    "an input called as a keyword": (
        lambda: cell(lambda a, lengths: a, lengths=rnnkit.per_step()), ValueError, ["lengths", "choose another"]),
    "a module in the step": (
        lambda: cell(lambda a, bn: a, bn=rnnkit.module(nn.BatchNorm1d)), TypeError, ["bn", "project"]),
    "a module for nobody": (lambda: cell(bn=rnnkit.module(nn.BatchNorm1d)), TypeError, ["bn", "project"]),
    "an option nobody declared": (lambda: Everything(keeps=1), TypeError, ["keeps=1", "options act"]),
    "an option of a cell without": (lambda: GRU(act="tanh"), TypeError, ["declares no rnnkit.option"]),
    "an unknown activation": (lambda: Everything(act="tan"), ValueError, ["'tan'", "tanh", "relu"]),
    "an init that is none": (lambda: rnnkit.per_unit(init="zeros"), TypeError, ["'zeros'", "function"]),
    "a weight of no blocks": (lambda: rnnkit.weight(0), ValueError, ["at least 1", "0"]),
    "an input of no kind": (lambda: rnnkit.per_step("column"), ValueError, ['"unit"', '"row"', "'column'"]),
    "a module that is not made": (lambda: rnnkit.module(nn.Linear(2, 2).weight), TypeError, ["function of gates"]),
    "no cell": (lambda: nn.LSTM, TypeError, ["subclass of rnnkit.Cell", "LSTM"]),
    "the base": (lambda: rnnkit.Cell, TypeError, ["has no step"]),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named(what: str) -> None:
    make, kind, words = MISTAKES[what]
    with pytest.raises(kind) as caught:
        rnnkit.Custom(make(), 3, 4)
    for word in words:
        assert word in str(caught.value)


class Scaled(rnnkit.Cell):
    gates, states = 1, ("h",)
    size = rnnkit.option(1.0)

    @staticmethod
    def step(a, size):  # type: ignore[no-untyped-def]
        return a * (size if isinstance(size, int | float) else 1.0)


ALIKE: list[tuple[Any, Any]] = [
    (0.0, -0.0),
    (1, 1.0),
    (1, True),
    ((1,), (1.0,)),
    ((1,), (True,)),
    (((0.0,), 2), ((-0.0,), 2)),
    (frozenset({1}), frozenset({1.0})),
    (0j, complex(-0.0, 0.0)),
]


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=str)
def test_options_that_python_calls_equal_are_distinct(one: Any, other: Any) -> None:
    """A step may trace differently with the two; and a saved program finds neither in the other's place."""
    assert one == other
    a, b = spec_of(Scaled(size=one)), spec_of(Scaled(size=other))
    assert a is not b and repr(a.options) != repr(b.options)
    assert a.key.partition("#")[0] != b.key.partition("#")[0]
    assert spec_of(Scaled(size=one)) is a and spec_of(Scaled(size=other)) is b
    assert pickle.loads(pickle.dumps(b)) is b


SAID = """
import enum, functools
import torch, torch.nn.functional as F
import rnnkit
class Kind(enum.Enum):
    A, B = 1, 2
class Config:
    kind = Kind.A
    def scaled(self, x): return x * {k}
def helper(x, by=FACTOR, *, words=frozenset("one two three four five".split())):
    return x * by if x in ("one", "two") or x in {{"three", "four"}} else again
def again(x): return helper(x)
def closed(k): return lambda x: x * k
def nested(x): return (lambda y: (lambda z: z * {k})(y))(x)
class C(rnnkit.Cell):
    gates, states = 1, ("h",)
    f = rnnkit.option(None)
    @staticmethod
    def step(a, h, f): return f(a)
f = {f}
key = rnnkit.Custom(C(f=f), 2, 4)._spec.key.partition("@")[2].partition("#")[0]
"""
SAYS = {
    "a closure": "closed({k})",
    "code in code": "nested",
    "a default": "lambda x, k={k}: x * k",
    "a default by name": "lambda x, *, k={k}: x * k",
    "a helper's default": "lambda x: again(x)",
    "a global": "lambda x: x * FACTOR",
    "a class": "lambda x: Config().scaled(x)",
    "a method": "Config().scaled",
    "a list": "[{k}, Kind.B]",
    "bound": "functools.partial(F.elu, alpha={k})",
    "a module": "torch.nn.LeakyReLU({k})",
    "all": "lambda x: (helper(x), Config.kind, torch.tanh(F.relu(x)), closed(Kind)(nested(x)))",
}


def _said(f: str, k: float) -> str:
    space: dict[str, Any] = {"FACTOR": k, "__name__": "said"}
    exec(SAID.format(f=f.format(k=k), k=k), space)
    key: str = space["key"]
    return key


@pytest.mark.parametrize("what", SAYS)
def test_cells_that_compute_differently_have_other_keys(what: str) -> None:
    assert _said(SAYS[what], 2.0) == _said(SAYS[what], 2.0) != _said(SAYS[what], 3.0)


def test_a_key_is_the_same_in_every_process() -> None:
    source = SAID.format(f=SAYS["all"], k=2.0)
    run = f"space = {{'FACTOR': 2.0, '__name__': 'said'}}\nexec({source!r}, space)\nprint(space['key'])"
    for seed in "1", "2":
        found = subprocess.run(
            [sys.executable, "-c", run], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        assert found.stdout.strip() == _said(SAYS["all"], 2.0), found.stderr


def test_an_option_shows_where_it_differs() -> None:
    class Zero(Scaled):
        size = rnnkit.option(0.0)

    assert repr(Zero(size=-0.0)) == "Zero(size=-0.0)" and repr(Zero(size=0.0)) == "Zero()"
    nan = float("nan")
    assert spec_of(Zero(size=nan)) is spec_of(Zero(size=float("nan")))


def test_options_made_anew_do_not_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer has, or a compiled program names, is found whatever came since; the rest is forgotten."""

    class Mine(Scaled):
        @staticmethod
        def step(a, size):  # type: ignore[no-untyped-def]
            return size(a)

    monkeypatch.setattr(declare, "_KEPT", 4)
    monkeypatch.setattr(probe, "_KEPT", 4)
    x = torch.randn(2, 3, 2)
    held, named = rnnkit.Custom(Mine(size=lambda a: a + 1), 2, 4), rnnkit.Custom(Mine(size=lambda a: a + 2), 2, 4)
    key, wanted = named._spec.key, named(x)[0].detach()
    torch.compile(named, backend="eager", fullgraph=True)(x)
    specs = []
    for k in range(20):
        layer = rnnkit.Custom(Mine(size=lambda a, k=k: a * k), 2, 4, backend="reference")
        probe.probe(layer._spec, 4, torch.float32)
        specs.append(weakref.ref(layer._spec))
    del layer
    flat = named._pieces()[0]
    del named
    choose._chosen.clear()
    torch.compiler.reset()
    gc.collect()
    assert sum(spec() is not None for spec in specs) <= 8
    assert spec_of(held.cell) is held._spec and spec_named(held._spec.key) is held._spec
    again = pickle.loads(pickle.dumps(rnnkit.Custom(Scaled(size=3.0), 2, 4)))
    assert again._spec is spec_of(Scaled(size=3.0))
    there = [True, True, True, True, True, True, False, False]
    given = [x, torch.zeros(3, 4), flat.w_ih, flat.b_ih, flat.b_hh, *flat.weights]
    found = torch.ops.rnnkit.custom_forward(key, "cpu", False, False, False, 1, False, there, given)
    assert torch.equal(found[0], wanted)


def test_what_hangs_on_a_class_and_its_step_can_be_pickled() -> None:
    """As cloudpickle does with a class and a function of a notebook: by what their __dict__ holds."""
    rnnkit.Custom(Scaled, 2, 4)(torch.zeros(2, 1, 2))
    hung = [v for k, v in vars(Scaled).items() if k.startswith("_") and not k.startswith("__")]
    hung += vars(Scaled.step).values()
    assert len(hung) == 2
    for one in hung:
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is type(one) and not any(vars(again).values())


def test_options_are_fixed_and_shown() -> None:
    mine = Everything(act="relu")
    assert mine.act == "relu" and repr(mine) == "Everything(act='relu')" and repr(Everything()) == "Everything()"
    with pytest.raises(AttributeError, match="fixed"):
        mine.act = "tanh"
    assert rnnkit.Custom(mine, 3, 4)._spec.options["act"] is torch.relu


def test_a_cell_of_another_process_is_asked_for() -> None:
    with pytest.raises(RuntimeError, match=r"custom cell somewhere\.Cell.*import its class"):
        spec_named("somewhere.Cell")


def test_initial_values_and_names_are_as_torch_has_them() -> None:
    for ours, theirs in ((LSTM, nn.LSTM), (GRU, nn.GRU)):
        torch.manual_seed(1)
        a = rnnkit.Custom(ours, 3, 4, 2, bidirectional=True)
        torch.manual_seed(1)
        b = theirs(3, 4, 2, bidirectional=True)
        assert list(a.state_dict()) == list(b.state_dict())
        for v, w in zip(a.parameters(), b.parameters()):
            assert torch.equal(v, w)
    own = cell(lambda a, h, p, q, w: a, p=rnnkit.per_unit(1.5), q=rnnkit.per_unit(nn.init.ones_), w=rnnkit.weight(2, 0))
    layer = rnnkit.Custom(own, 3, 4)
    assert list(layer.state_dict())[-3:] == ["w_l0", "p_l0", "q_l0"]
    assert layer.w_l0.shape == (8, 4) and not layer.w_l0.any()
    assert layer.p_l0.eq(1.5).all() and layer.q_l0.eq(1).all()


def test_arguments_of_the_layer() -> None:
    said = repr(rnnkit.Custom(Everything(act="relu"), 3, 4, 2, bidirectional=True, dropout=0.5, heads=2))
    assert said == ("Custom(Everything(act='relu'), 3, 4, num_layers=2, dropout=0.5, bidirectional=True, heads=2)")
    with pytest.raises(ValueError, match="multiple of heads"):
        rnnkit.Custom(LSTM, 3, 4, heads=3)
    with pytest.raises(ValueError, match="num_layers"):
        rnnkit.Custom(LSTM, 3, 4, 0)
    with pytest.raises(ValueError, match="backend of a custom cell must be one of auto, cpu, triton, reference"):
        rnnkit.Custom(LSTM, 3, 4, backend="onednn")
    with pytest.warns(UserWarning, match="does nothing"):
        rnnkit.Custom(LSTM, 3, 4, dropout=0.5)
