"""Errors planted in how the C++ engine is called, for each layer and for a whole call: the oracle must see each."""

from __future__ import annotations

from typing import Any

import pytest
from engine import forget
from sequences import EVERYTHING, F32, KINDS, PLACES, Case, check

from rnnkit.backends import BY_NAME, StackInputs


def misused(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ engine called wrongly."""
    cpu = BY_NAME["cpu"]
    right_forward, right_backward = cpu.forward, cpu.backward

    def forward(cell: str, t: Any, o: Any, **how: Any) -> Any:
        if error == "reverse":
            o = o._replace(reverse=not o.reverse)
        return right_forward(cell, t, o, **how)

    def backward(cell: str, t: Any, o: Any, *rest: Any) -> Any:
        if error == "reverse in backward":
            o = o._replace(reverse=not o.reverse)
        if error == "resets in backward":
            t = t._replace(reset=None)
        if error == "lengths in backward":
            t = t._replace(lengths=None)
        every = right_backward(cell, t, o, *rest)
        if error in PLACES:
            at = PLACES.index(error)
            every = [1.001 * g if k == at and g is not None else g for k, g in enumerate(every)]
        return every

    monkeypatch.setattr(cpu, "forward", forward)
    monkeypatch.setattr(cpu, "backward", backward)


def changed(tensors: Any, name: str, change: Any) -> Any:
    at = StackInputs._fields.index(name)
    return (*tensors[:at], change(tensors[at]), *tensors[at + 1 :])


def flipped(x: Any) -> Any:
    return x.flip(0)


def misused_as_one(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of a call whose layers run as one."""
    cpu = BY_NAME["cpu"]
    right_forward, right_backward = cpu.stack_forward, cpu.stack_backward

    def forward(o: Any, needs: bytes, tensors: Any, masks: Any) -> Any:
        return right_forward(o, needs, changed(tensors, "x", flipped) if error == "reverse" else tensors, masks)

    def backward(o: Any, needs: bytes, saved: Any, grads: Any) -> Any:
        if error == "reverse in backward":
            saved = changed(saved, "x", flipped)
        if error == "resets in backward":
            saved = changed(saved, "reset", lambda v: None)
        if error == "lengths in backward":
            saved = changed(saved, "lengths", lambda v: None)
        every = list(right_backward(o, needs, saved, grads))
        at = {"x": 0, "h_0": 1, "h_r": 5, "w_hh": 8}.get(error)
        if at is not None:
            every[at] = 1.001 * every[at]
        return every

    monkeypatch.setattr(cpu, "stack_forward", forward)
    monkeypatch.setattr(cpu, "stack_backward", backward)


MISUSES = ("reverse", "reverse in backward", "resets in backward", "lengths in backward", "x", "w_hh", "h_0", "h_r")


@pytest.mark.skipif(BY_NAME["cpu"].available() is not None, reason="needs the C++ extension")
@pytest.mark.parametrize("error", MISUSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_one", [True, False])
def test_the_engine_misused(kind: str, error: str, as_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setattr(BY_NAME["cpu"], "stacks", as_one and BY_NAME["cpu"].stacks)
    check(Case(kind, **EVERYTHING), "cpu", F32)
    (misused_as_one if BY_NAME["cpu"].stacks else misused)(error, monkeypatch)
    with pytest.raises(AssertionError, match="^y: off by" if error == "reverse" else "^d .*: off by"):
        check(Case(kind, **EVERYTHING), "cpu", F32)
