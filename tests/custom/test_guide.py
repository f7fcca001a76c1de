"""The errors that docs/custom-cells.md tells of are those that one meets, in the words that stand there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

import rnnkit
from rnnkit.custom import check

PAGE = Path(__file__).resolve().parents[2] / "docs" / "custom-cells.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="a wheel carries no docs")
OUTSIDE, LIST = torch.ones(4), [1.0]


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
}


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
    layer = rnnkit.Custom(WARNED[words](), 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, _ = layer(torch.zeros(2, 3, 2))
    assert y.isfinite().all()
    found = check.program_of(layer._spec, 4)
    assert found.program is None and words in found.reason
