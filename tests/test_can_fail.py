"""The checks can fail: an error planted in the package turns them red.

A comparison that cannot fail proves nothing. So each error that a recurrent layer is likely to have is planted once,
one at a time, and the very comparison that the other tests use has to complain; without it, the same comparison is
silent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Config, by_lengths, by_reset, in_two, parity
from torch import Tensor

from rnnkit import masks
from rnnkit.backends import REFERENCE, products
from rnnkit.reference import STEPS
from rnnkit.reference.step import Gradients, State, Step, Weights

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
GATED = ("lstm", "gru")
SIZE = (4, 3, 5, 6)


def checked(cell: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> list[str]:
    """The comparison that test_parity makes, on the backend in which errors are planted."""
    return parity(Config(cell, size=SIZE, dtype=dtype), ["reference"], **kwargs)


def lengths_checked(cell: str) -> list[str]:
    return parity(Config(cell, layout="packed_unsorted", size=SIZE), ["reference"], how=by_lengths)


def reset_checked(cell: str) -> list[str]:
    return checked(cell, how=by_reset, torch_how=in_two)


def plant(monkeypatch: pytest.MonkeyPatch, cell: str, step: Any = None, vjp: Any = None) -> None:
    right_step, right_vjp = STEPS[cell]
    monkeypatch.setitem(STEPS, cell, (step or right_step, vjp or right_vjp))


@pytest.mark.parametrize("cell", CELLS)
def test_silent_without_an_error(cell: str) -> None:
    assert checked(cell) == [] and lengths_checked(cell) == [] and reset_checked(cell) == []


@pytest.mark.parametrize("cell", GATED)
def test_two_gates_swapped(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = STEPS[cell][0]

    def step(gx: Tensor, s: State, w: Weights) -> Step:
        def swapped(v: Tensor) -> Tensor:
            blocks = list(v.chunk(4 if cell == "lstm" else 3, -1))
            return torch.cat([blocks[1], blocks[0], *blocks[2:]], -1)

        return right(swapped(gx), s, w._replace(w_hh=swapped(w.w_hh.T).T))

    plant(monkeypatch, cell, step=step)
    found = checked(cell)
    assert any("output is off" in text for text in found) and any("grad of weight_hh" in text for text in found)


@pytest.mark.parametrize("part", Gradients._fields)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("factor", [0.999, 0.0, -1.0])
def test_a_factor_in_a_derivative(cell: str, part: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth is enough; outputs stay right, gradients do not."""
    right = STEPS[cell][1]

    def vjp(*args: Any) -> Gradients:
        g = right(*args)
        value = getattr(g, part)
        return g if value is None else g._replace(**{part: factor * value})

    plant(monkeypatch, cell, vjp=vjp)
    found = checked(cell)
    if part == "dc" and cell != "lstm":
        assert found == []  # there is none
    else:
        assert found and all("grad of" in text for text in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_small_error_in_each_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 units in the last place, in float64 too."""
    right = STEPS["lstm"][0]

    def step(gx: Tensor, s: State, w: Weights) -> Step:
        new = right(gx, s, w)
        return new._replace(h=new.h * (1 + 32 * torch.finfo(dtype).eps))

    plant(monkeypatch, "lstm", step=step)
    assert any("output is off" in text for text in checked("lstm", dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_ignored(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "live", lambda lengths, steps, device: None)
    assert lengths_checked(cell)


@pytest.mark.parametrize("cell", CELLS)
def test_reset_ignored(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "cut", lambda reset, alive, reverse: None)
    assert reset_checked(cell)


@pytest.mark.parametrize("cell", CELLS)
def test_reset_one_step_late(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = masks.cut

    def late(reset: Tensor, alive: Tensor | None, reverse: bool) -> Tensor | None:
        return right(reset.roll(1, 0) if reset is not None else None, alive, reverse)

    monkeypatch.setattr(masks, "cut", late)
    assert reset_checked(cell)


@pytest.mark.parametrize("cell", CELLS)
def test_state_before_the_step_misread(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight gradient taken with the state after each step and not the one before it."""
    monkeypatch.setattr(masks, "previous", lambda states, *rest: states)
    assert any("grad of weight_hh" in text for text in checked(cell))


WEIGHTS = ("x", "h_0", "c_0", "w_ih", "w_hh", "b_ih", "b_hh")


@pytest.mark.parametrize("lost", WEIGHTS)
def test_a_gradient_lost(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of each argument is looked at, the initial states among them."""
    right = products.weight_gradients
    place = ("x", "h_0", "c_0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr").index(lost)

    def without(*args: Any) -> list[Tensor | None]:
        found = right(*args)
        return [g if k != place or g is None else torch.zeros_like(g) for k, g in enumerate(found)]

    monkeypatch.setattr(products, "weight_gradients", without)
    found = checked("lstm")
    assert found and len({text.split(" is off")[0] for text in found}) == 1


@pytest.mark.parametrize("make", [torch.empty_like, lambda v: v.new_empty(v.shape), lambda v: torch.empty(v.shape)])
@pytest.mark.parametrize("cell", CELLS)
def test_memory_that_nobody_wrote(cell: str, make: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets the last row: the poison of conftest shows it, whatever lay there before."""
    right = REFERENCE.scan_forward

    def forgetful(*args: Any, **kwargs: Any) -> tuple:
        y, *rest = right(*args, **kwargs)
        fresh = make(y)
        fresh[:, :-1] = y[:, :-1]
        return fresh, *rest

    monkeypatch.setattr(REFERENCE, "scan_forward", forgetful)
    assert any("output is off by inf" in text for text in checked(cell))
