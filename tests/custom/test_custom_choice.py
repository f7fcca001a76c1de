"""Which backend runs a custom layer: by name, by `auto`, with reasons; and steps that no backend runs, in words."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from custom_layers import LSTM
from torch import Tensor

import rnnkit
from rnnkit.custom import choose, reference
from rnnkit.custom.choose import Asked
from rnnkit.custom.declare import spec_of
from rnnkit.custom.inputs import CellOptions

X = torch.randn(4, 2, 3)
ASKED = Asked(5, "cpu", torch.float32, CellOptions())


def cell(step: Any, states: tuple[str, ...] = ("h",), gates: int = 1, **declared: Any) -> type[rnnkit.Cell]:
    return type("Mine", (rnnkit.Cell,), {"gates": gates, "states": states, "step": staticmethod(step), **declared})


def branches(a: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(a) if bool((h == 0).all()) else torch.tanh(a) + h


def kernels(monkeypatch: pytest.MonkeyPatch, reasons: list[str]) -> list[str]:
    """The reference in the place of `cpu`; what it was asked."""
    asked: list[str] = []
    fake: Any = ModuleType("fake")
    fake.name, fake.takes_none_states = "cpu", False

    def unsupported(program: Any, *_: Any) -> list[str]:
        asked.append("before" if program is None else "program")
        return reasons

    fake.unsupported, spec = unsupported, spec_of(LSTM)
    fake.forward = lambda plan, *rest: asked.append("forward") or reference.forward(spec, *rest)
    fake.backward = lambda plan, *rest: asked.append("backward") or reference.backward(spec, *rest)
    monkeypatch.setattr(choose, "backend_named", lambda name: reference if name == "reference" else fake)
    monkeypatch.setattr(choose, "_chosen", {})
    monkeypatch.setattr(choose.kernel_check, "mismatch", lambda *_: None)
    return asked


def test_auto_takes_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = kernels(monkeypatch, [])
    layer = rnnkit.Custom(LSTM, 3, 5)
    for _ in range(2):
        layer(X)[0].sum().backward()
    assert asked == ["before", "program", "forward", "backward", "forward", "backward"]  # the choice is remembered


def test_auto_without_kernels_says_nothing_and_a_named_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, ["it is not built"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.choose(spec_of(LSTM), ASKED, "auto").name == "reference"
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot run LSTM on cpu: it is not built\. backend='auto'"):
        rnnkit.Custom(LSTM, 3, 5, backend="cpu")(X)


def test_a_step_that_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning; the right numbers; backend='cpu' raises the same reason."""
    monkeypatch.setattr(choose.check, "_warned", set())
    mine = cell(branches)
    layer = rnnkit.Custom(mine, 3, 5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = layer(X)[0]
        torch.testing.assert_close(layer(X)[0], y)
    assert len([w for w in said if "Mine runs by the reference" in str(w.message)]) == 1
    torch.testing.assert_close(y, loop_of_branches(layer))
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot run Mine on cpu: .*where"):
        layer.backend = "cpu"
        layer(X)


def loop_of_branches(layer: rnnkit.Custom) -> Tensor:
    """`branches` over time."""
    h, ys = torch.zeros(2, 5), []
    for x in X:
        a = torch.nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
        h = branches(a + torch.nn.functional.linear(h, layer.weight_hh_l0, layer.bias_hh_l0), h)
        ys.append(h)
    return torch.stack(ys)


@pytest.mark.parametrize("name, words", [("torch", "torch.nn's own layers"), ("cuda", "built-in cells")])
def test_backends_that_never_can(name: str, words: str) -> None:
    with pytest.raises(NotImplementedError, match=f"'{name}' cannot run LSTM on cpu: .*{words}"):
        rnnkit.Custom(LSTM, 3, 5, backend=name)(X)
    with rnnkit.use_backend(name), pytest.raises(NotImplementedError, match=words):
        rnnkit.Custom(LSTM, 3, 5)(X)
    with rnnkit.use_backend("reference"):
        rnnkit.Custom(LSTM, 3, 5, backend=name)(X)


SCALE = 1.0


def scaled(a: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(SCALE * a)


def test_a_global_that_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = rnnkit.Custom(cell(scaled), 3, 5)
    first = layer(X)[0]
    monkeypatch.setitem(scaled.__globals__, "SCALE", 0.5)
    half = layer(X)[0]
    layer.backend = "reference"
    torch.testing.assert_close(half, layer(X)[0])
    assert not torch.allclose(half, first)


def raises(a: Tensor, h: Tensor) -> Tensor:
    raise KeyError("mine")


def changes(a: Tensor, h: Tensor) -> Tensor:
    h += a
    return h


MISTAKES: dict[str, tuple[Any, tuple[str, ...], type[Exception], str]] = {
    "it raises": (raises, ("h",), KeyError, "mine"),
    "too few states": (lambda a, h, c: a, ("h", "c"), ValueError, "return h, c"),
    "too many states": (lambda a, h: (a, a), ("h",), ValueError, "2 values.*1 states"),
    "no tensor": (lambda a, h: None, ("h",), ValueError, "NoneType"),
    "another shape": (lambda a, h: a.sum(-1, keepdim=True), ("h",), ValueError, r"\[B, 1\].* h.*\[B, 5\]"),
    "in place": (changes, ("h",), ValueError, "h in place.*h = h"),
    "random numbers": (lambda a, h: a * torch.rand_like(a), ("h",), ValueError, "random numbers.*per_step"),
    "sizes that do not fit": (lambda a, h: a + torch.ones(7), ("h",), RuntimeError, "size"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("what", MISTAKES)
def test_steps_that_cannot_be_one(what: str, backend: str) -> None:
    step, states, kind, words = MISTAKES[what]
    layer = rnnkit.Custom(cell(step, states), 3, 5, backend=backend)
    for _ in range(2):  # and again: nothing is remembered of it
        with pytest.raises(kind, match=words):
            layer(X)
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(Exception, match=words):
        compiled(X)


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "features": ((torch.ones(4, 2, 6),), {}, ValueError, "input_size = 3 features, got 6"),
    "dimensions": ((torch.ones(3),), {}, ValueError, "2 or 3 dimensions, got 1"),
    "no tensor": (([1.0],), {}, TypeError, "input must be a tensor"),
    "no step": ((torch.ones(0, 2, 3),), {}, ValueError, "at least one step"),
    "whole numbers": ((torch.ones(4, 2, 3, dtype=torch.long),), {}, TypeError, "floating dtype"),
    "a dtype": ((X.double(),), {}, TypeError, "float64.*float32"),
    "one state": ((X, torch.zeros(1, 2, 5)), {}, TypeError, r"hx must be \(h, c\)"),
    "a state's shape": ((X, (torch.zeros(1, 2, 5), torch.zeros(1, 2, 4))), {}, ValueError, r"hx\[1\].*\[1, 2, 5\]"),
    "lengths": ((X,), {"lengths": torch.tensor([1, 5])}, ValueError, "T=4.*5 at row 1"),
    "reset": ((X,), {"reset": torch.zeros(2, 4)}, ValueError, r"reset must be \[T, B\]"),
    "reset_state": ((X,), {"reset_state": (X, X)}, ValueError, "needs reset"),
    "all states": ((X,), {"return_all_states": 1}, TypeError, "return_all_states"),
}


@pytest.mark.parametrize("what", CALLS)
def test_calls_that_do_not_fit(what: str) -> None:
    given, how, kind, words = CALLS[what]
    with pytest.raises(kind, match=words):
        rnnkit.Custom(LSTM, 3, 5)(*given, **how)


def test_a_parameter_that_does_not_fit_is_named() -> None:
    layer = rnnkit.Custom(LSTM, 3, 5)
    layer.weight_hh_l0 = torch.nn.Parameter(torch.zeros(20, 4))
    with pytest.raises(ValueError, match=r"w_hh of layer 0 must be .*\[20, 5\], got \[20, 4\]"):
        layer(X)
