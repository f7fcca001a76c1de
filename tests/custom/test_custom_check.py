"""The self-check finds what would be silently wrong, and a step's author is told what is wrong in words.

Planted: a wrong derivative, a detach that is lost, a cast that is dropped, a state that changes between calls.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from custom_cells import CELLS, StepSpec, spec_of
from torch import Tensor

from rnnkit.custom import calls, check, cut, rules
from rnnkit.custom.check import program_of, warn_once
from rnnkit.custom.errors import StepError

HIDDEN = 8


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program of another test, nor one of a planted fault for others."""
    monkeypatch.setattr(check, "_cache", {})
    monkeypatch.setattr(check, "_warned", set())


def _reason(spec: StepSpec) -> str:
    checked = program_of(spec, HIDDEN)
    assert checked.program is None and checked.reason is not None
    return checked.reason


# --- planted faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["tanh", "sigmoid", "mul", "add"])
def test_a_wrong_rule(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules.RULES[op]

    def wrong(d: Any, y: Any, *args: Any) -> Any:
        first, *rest = right.derivative(d, y, *args)
        return (first * 1.001, *rest)

    monkeypatch.setitem(rules.RULES, op, right._replace(derivative=wrong))
    assert "another derivative" in _reason(CELLS["lstm"])


def test_a_rule_that_is_wrong_at_an_edge_only(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules.RULES["relu"]
    monkeypatch.setitem(rules.RULES, "relu", right._replace(derivative=lambda d, y, a: ((a < 0).where(0, d),)))
    assert "another derivative" in _reason(CELLS["indrnn"])


def test_a_lost_detach(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(a: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (a * torch.sigmoid(a).detach(),)

    assert program_of(spec_of(step, 1, ("h",)), HIDDEN).reason is None
    check._cache.clear()
    monkeypatch.setitem(calls._HANDLERS, "detach", lambda t, x: x)
    assert "another derivative" in _reason(spec_of(step, 1, ("h",)))


def test_a_dropped_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(a: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (torch.tanh(a.bfloat16().float()),)

    monkeypatch.setitem(calls._HANDLERS, "bfloat16", lambda t, x: x)
    assert "gives the state h as" in _reason(spec_of(step, 1, ("h",)))


def test_a_kept_value_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the forward keeps in the wrong order."""
    right = cut.make_program

    def wrong(*args: Any, **kwargs: Any) -> Any:
        program = right(*args, **kwargs)
        return replace(program, saved=program.saved[::-1])

    monkeypatch.setattr(check, "make_program", wrong)
    assert "another derivative" in _reason(CELLS["lstm"])


def test_a_wrong_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calls._POINTWISE, "tanh", calls._POINTWISE["sin"])
    assert "gives the state h as" in _reason(CELLS["lstm"])


# --- errors of the step's author -------------------------------------------------------------------------------------


def _in_place(a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    c += torch.tanh(a)
    return torch.tanh(c), c


def _in_place_of_a_part(a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    a.chunk(1, -1)[0].mul_(2)
    return a, c


def _raises(a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    raise KeyError("own words")


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "too few": (lambda a, h, c: (a,), StepError, r"step returned 1 values, but the cell has 2 states: return h, c"),
    "one tensor": (lambda a, h, c: a, StepError, r"step returned Tensor; it has to return the states.*return h, c"),
    "nothing": (lambda a, h, c: None, StepError, r"step returned NoneType"),
    "shape": (lambda a, h, c: (a, c[:, :1]), StepError, r"step returned \[B, 1\] for the state c, which is \[B, 8\]"),
    "truths": (lambda a, h, c: (a, c > 0), StepError, r"step returned torch.bool for the state c"),
    "number": (lambda a, h, c: (a, 1.0), StepError, r"step returned float for the state c"),
    "undeclared": (
        lambda a, h, c, k: (a, c), StepError,
        r"\.step names 'k', which is neither a, gx, gh nor a state \(h, c\), and is not declared: write k ="),
    "in place": (_in_place, StepError, r"step changes its argument c in place: write a new value, as c = c \+ "),
    "part in place": (_in_place_of_a_part, StepError, r"step changes its argument a in place"),
    "own": (_raises, KeyError, r"own words"),
    "shapes": (lambda a, h, c: (a + torch.cat([c, c], -1), c), RuntimeError, r"size of tensor"),
}  # fmt: skip


@pytest.mark.parametrize("step, kind, words", ERRORS.values(), ids=ERRORS)
def test_errors(step: Any, kind: type[Exception], words: str) -> None:
    for _ in range(2):  # an error is not kept
        with pytest.raises(kind, match=words):
            program_of(StepSpec("cell", step, 1, ("h", "c"), weights=(("w_hh", 1),)), HIDDEN)


def test_one_state_may_come_alone() -> None:
    def step(a: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(a)

    assert program_of(spec_of(step, 1, ("h",)), HIDDEN).reason is None


def test_one_unit_is_left_to_the_reference() -> None:
    assert "hidden_size 1" in str(program_of(CELLS["lstm"], 1).reason)


# --- where it is called ----------------------------------------------------------------------------------------------


def test_under_what_surrounds_a_first_call() -> None:
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert program_of(CELLS["gru"], HIDDEN).reason is None
    with torch.no_grad(), torch.device("meta"):
        assert program_of(CELLS["cifg"], HIDDEN).reason is None

    def inside(x: Tensor) -> Tensor:
        assert program_of(CELLS["slstm"], HIDDEN).reason is None
        return x.sum()

    torch.func.vmap(torch.func.grad(inside))(torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), state), "the user's generator is left alone"


def test_the_warning_comes_once() -> None:
    with pytest.warns(RuntimeWarning, match="Cell runs by the reference, right but slow: cumsum"):
        warn_once("Cell", "cumsum")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_once("Cell", "cumsum")
