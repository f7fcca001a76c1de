"""The errors that docs/custom-cells.md tells of are those that one meets, in the words that stand there."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

import rnnkit
from rnnkit.backends.cpu import program as cpu
from rnnkit.custom import check
from rnnkit.custom.inputs import CellOptions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "custom-cells.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="a wheel carries no docs")
OUTSIDE, LIST, COUNT = torch.ones(4), [1.0], 0
LINEAR = torch.nn.Linear(4, 4)


def cell(step: Callable[..., Any], states: Any = ("h",), **declared: Any) -> type[rnnkit.Cell]:
    step = step if isinstance(step, _AsItIs) else staticmethod(step)
    body = {"gates": 1, "states": states, "step": getattr(step, "step", step), **declared}
    return type("C", (rnnkit.Cell,), body)


class _AsItIs:
    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step


def in_place(a, h):
    h += a
    return h


def branch(a, h):
    return a if (a > -1e9).all() else h


def no_grad(a):
    with torch.no_grad():
        return torch.tanh(a)


def counts(a):
    global COUNT
    COUNT += 1
    return a


def alone(a, h):
    return a if a.shape[0] > 1 else h


RAISED: dict[str, Callable[[], Any]] = {
    "step names 'p', which is neither a, gx, gh nor a state (h), and is not declared": lambda: cell(lambda a, p: a + p),
    "declares p, but step does not name it": lambda: cell(lambda a: a, p=rnnkit.per_unit()),
    "step must be a static method": lambda: cell(_AsItIs(lambda a: a)),
    "states must be a tuple of names": lambda: cell(lambda a: a, states="h"),
    "step returned Tensor; it has to return the states after it": lambda: cell(lambda a, c: a, states=("h", "c")),
    "step returned [B, 1] for the state c, which is [B, 4]": lambda: cell(
        lambda a, c: (a, a.sum(-1, keepdim=True)), states=("h", "c")
    ),
    "needs pace at every call": lambda: cell(lambda a, pace: a * pace, pace=rnnkit.per_step("row")),
    "step draws random numbers": lambda: cell(lambda a: a + torch.rand_like(a)),
    "step changes its argument h in place": lambda: cell(in_place),
}
WARNED: dict[str, Callable[[], Any]] = {
    "a branch on values": lambda: cell(branch),
    "over the whole tensor, the batch too": lambda: cell(lambda a: a - a.mean()),
    "comes from outside the step": lambda: cell(lambda a: a + OUTSIDE),
    "could change unseen": lambda: cell(lambda a: a + LIST[0]),
    "the step computes something else each time it is run": lambda: cell(lambda a: a + 1e-9 * perf_counter()),
    "a power whose exponent is no number": lambda: cell(lambda a, h: torch.exp(a) ** h),
    "a change of dtype": lambda: cell(lambda a: a.bfloat16().to(a.dtype)),
    "for which no kernel is made": lambda: cell(lambda a: a.cumsum(-1)),
    "torch.no_grad() and its like inside the step": lambda: cell(no_grad),
    "changes the variable": lambda: cell(counts),
    "holds state": lambda: cell(lambda a: LINEAR(a)),
    "hidden_size 1": lambda: cell(lambda a: torch.tanh(a)),
    "the number of rows must not matter": lambda: cell(alone),
    "takes at most 62 gates, states and blocks of a weight": lambda: cell(
        lambda a, h, w: a + torch.nn.functional.linear(h, w).chunk(63, -1)[0], w=rnnkit.weight(63)
    ),
}
HIDDEN = {"hidden_size 1": 1}


def told() -> tuple[list[str], list[str]]:
    """The words of the page's two tables of errors."""
    section = PAGE.read_text(encoding="utf-8").partition("## Errors that one can meet\n")[2]
    first, second = section.split("\n| the words |")[1:]
    return tuple(re.findall(r"^\| `([^`]+)`", table, re.M) for table in (first, second))  # type: ignore[return-value]


def test_every_error_that_is_told_of_is_tried() -> None:
    raised, warned = told()
    assert set(raised) == set(RAISED) and set(warned) == set(WARNED)


@pytest.mark.parametrize("words", RAISED)
def test_it_is_raised(words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        rnnkit.Custom(RAISED[words](), 2, 4)(torch.zeros(2, 3, 2))
    assert words in " ".join(str(raised.value).split())


@pytest.mark.parametrize("words", WARNED)
def test_it_is_warned_of_and_the_reference_runs(words: str) -> None:
    hidden = HIDDEN.get(words, 4)
    layer = rnnkit.Custom(WARNED[words](), 2, hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, _ = layer(torch.zeros(2, 3, 2))
    assert y.isfinite().all()
    found = check.program_of(layer._spec, hidden)
    reason = found.reason
    if found.program is not None:  # but no backend takes it
        reason = cpu.unsupported(found.program, "cpu", torch.float32, CellOptions())[-1]
    assert reason is not None and words in reason


def test_a_lambda_is_not_pickled() -> None:
    assert "The error of `pickle` names a lambda" in PAGE.read_text(encoding="utf-8")
    option = cell(lambda a, act: act(a), act=rnnkit.option("tanh"))
    layer = rnnkit.Custom(option(act=lambda v: v), 2, 4)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError), match="lambda"):
        pickle.dumps(layer.cell._options["act"])
