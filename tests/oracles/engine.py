"""A stand-in for an engine whose operators check everything: the reference's mathematics behind checks that raise
RuntimeError, as an operator's do. It takes the name and the place of `cpu`, and counts its calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rnnkit.backends import BY_NAME, LayerInputs, LayerSpec, Result, select
from rnnkit.backends.reference import Reference
from rnnkit.cells import CELLS
from rnnkit.layer import stack

I, H, T, B = 3, 4, 5, 2
NAMES = ("RNN", "LSTM", "GRU")
KINDS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False})]

# What the extension's stack_forward takes of an RNN without a bias.
TENSORS = (torch.ones(T, B, H), *[None] * 6, torch.eye(H), torch.eye(H))
WHOLE = (0, 1, 1, 0, 0, False, False, 0.0, b"", TENSORS, ())


def with_tensor(at: int, v: Any) -> tuple[Any, ...]:
    """WHOLE with another tensor in one place."""
    return (*WHOLE[:9], (*TENSORS[:at], v, *TENSORS[at + 1 :]), ())


class Checking(Reference):
    """The reference as an engine: takes None for zeros, and trusts nobody."""

    name = "cpu"
    takes_none_states = True

    def __init__(self) -> None:
        self.went: list[str] = []

    def unsupported(self, problem: LayerSpec) -> list[str]:
        return [] if problem.device == "cpu" else ["runs on the CPU"]

    def forward(self, cell: str, t: Any, o: Any, *, train: bool, graph: bool = False) -> Result:
        expect(cell, t)
        self.went.append("layer")
        return super().forward(cell, t.with_zero_states(CELLS[cell].has_c), o, train=train)

    def backward(self, cell: str, t: Any, o: Any, y: Any, result: Any, grads: Any, needs: list[bool]) -> Any:
        every = super().backward(cell, t.with_zero_states(CELLS[cell].has_c), o, y, result, grads, needs)
        return [g if need else None for g, need in zip(every, needs, strict=True)]


def expect(cell: str, t: LayerInputs) -> None:
    """What an operator checks of a layer without lengths and resets, in its own words."""
    rows = t.w_hh.shape[0]
    hidden = rows // CELLS[cell].gates
    wanted = {
        "x": (*t.x.shape[:2], t.w_ih.shape[1]),
        "h_0": (t.x.shape[1], t.w_hh.shape[1]),
        "c_0": (t.x.shape[1], hidden),
        "w_ih": (rows, t.w_ih.shape[1]),
        "w_hh": (CELLS[cell].gates * hidden, hidden),
        "b_ih": (rows,),
        "b_hh": (rows,),
    }
    for name, sizes in wanted.items():
        v = getattr(t, name)
        if v is not None and (v.shape != sizes or v.dtype != t.x.dtype or not v.dtype.is_floating_point):
            raise RuntimeError(f"operator: {name}")


def install(monkeypatch: pytest.MonkeyPatch) -> Checking:
    """The stand-in, in the place of `cpu` and first in every order."""
    stand_in = Checking()
    monkeypatch.setitem(BY_NAME, "cpu", stand_in)
    others = [b for b in select.BACKENDS if b.name != "cpu"]
    monkeypatch.setattr(select, "BACKENDS", (stand_in, *others))
    monkeypatch.setattr(select, "preference", lambda problem: select.BACKENDS)
    forget(monkeypatch)
    return stand_in


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice is remembered from an earlier call, nor this one's for a later test."""
    monkeypatch.setattr(select, "_selected", {})
    monkeypatch.setattr(stack, "_plans", {})


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [v for item in result for v in flat(item)]


def same(a: Any, b: Any) -> bool:
    if any(isinstance(v, tuple) and isinstance(v[0], type) for v in (a, b)):
        return a == b
    return len(a) == len(b) and all(torch.equal(v, w) for v, w in zip(a, b, strict=True))


def state_of(name: str, *shape: int) -> Any:
    h = torch.randn(shape)
    return (h, torch.randn(shape)) if name.startswith("LSTM") else h


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the kind and the words of its exception."""
    try:
        return [v.detach().clone() for v in flat(call())]
    except Exception as error:
        return type(error), str(error)


class Sub(Tensor):
    """A subclass that looks like a tensor in every way."""


class Watched(TorchDispatchMode):
    """A mode that lets everything pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))
