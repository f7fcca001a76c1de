"""Custom layers for tests: the cells of `custom_cells` as a user would declare them, one cell that has everything, and
what a layer must give, row by row and step by step from the definitions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from custom_cells import CELLS
from torch import Tensor

import rnnkit
from rnnkit.custom.declare import spec_of

F64 = torch.float64


class LSTM(rnnkit.Cell):
    """torch.nn's."""

    gates, states = 4, ("h", "c")

    @staticmethod
    def step(a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = a.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class GRU(rnnkit.Cell):
    """torch.nn's."""

    gates, states = 3, ("h",)

    @staticmethod
    def step(gx: Tensor, gh: Tensor, h: Tensor) -> Tensor:
        xr, xz, xn = gx.chunk(3, -1)
        hr, hz, hn = gh.chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        return (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h


class Everything(rnnkit.Cell):
    """Something of all that a cell may declare, in no paper."""

    gates, states = 2, ("h", "m")
    p = rnnkit.per_unit()
    w = rnnkit.weight(2)
    keep = rnnkit.per_step("unit", grad=False)
    gap = rnnkit.per_step("row")
    act = rnnkit.option("tanh")

    @staticmethod
    def step(a, h, m, p, w, keep, gap, act):  # type: ignore[no-untyped-def]
        u, v = a.chunk(2, -1)
        q, r = F.linear(act(u) * m, w).chunk(2, -1)
        m = gap * torch.sigmoid(v + p * h) + (1 - gap) * m
        return F.layer_norm(keep * act(q + m) + (1 - keep) * h + r / 4, h.shape[-1:]), m


@functools.cache
def cell_class(name: str) -> type[rnnkit.Cell]:
    """A cell of `custom_cells` as a class."""
    spec = CELLS[name]
    members: dict[str, Any] = {"gates": spec.gates, "states": spec.states, "step": staticmethod(spec.step)}
    members |= {unit: rnnkit.per_unit() for unit in spec.units}
    members |= {weight: rnnkit.weight(blocks) for weight, blocks in spec.weights if weight != "w_hh"}
    members |= {step: rnnkit.per_step(kind, grad) for step, kind, grad in spec.steps}
    members |= {option: rnnkit.option(value) for option, value in spec.options.items()}
    return type(name, (rnnkit.Cell,), members)


def per_steps(cell: Any, steps: int, rows: int, hidden: int, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """Inputs of each step: masks of 0 and 1 where no gradient is wanted, else numbers in [0, 1]."""
    found = {}
    for name, kind, grad in spec_of(cell).steps:
        v = torch.rand((steps, rows, hidden) if kind == "unit" else (steps, rows), dtype=dtype)
        found[name] = v.requires_grad_() if grad else (v < 0.7).to(dtype)
    return found


def by_rows(
    layer: rnnkit.Custom,
    x: Tensor,
    hx: Sequence[Tensor],
    lengths: Sequence[int],
    reset: Tensor,
    reset_states: Sequence[Tensor],
    inputs: dict[str, Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One layer, every row and direction by itself: y [T, B, D·H], the last states [D, B, H], all of them
    [D, T, B, H]. hx and reset_states [D, B, H]."""
    spec, (steps, rows, _) = spec_of(layer.cell), x.shape
    ys, lasts, everything = [], [], []
    for d in range(2 if layer.bidirectional else 1):
        own = {n.removesuffix("_reverse"): v for n, v in layer.named_parameters() if n.endswith("_reverse") == (d == 1)}
        each = {name: own[f"{name}_l0"] for name in (*spec.units, *(n for n, _ in spec.weights if n != "w_hh"))}
        columns = []
        for b in range(rows):
            states = [v[d, b : b + 1] for v in hx]
            zeros = [torch.zeros_like(v) for v in states]
            after = [zeros] * steps
            for t in range(lengths[b]) if d == 0 else reversed(range(lengths[b])):
                cut = t if d == 0 else t + 1  # a reset lies between the same two steps in both directions
                if cut < lengths[b] and bool(reset[cut, b]):
                    states = [v[d, b : b + 1] for v in reset_states]
                gx = F.linear(x[t, b : b + 1], own["weight_ih_l0"], own.get("bias_ih_l0"))
                given = {**each, **spec.options, **dict(zip(spec.states, states)), "gx": gx}
                if spec.recurrent:
                    given["gh"] = F.linear(states[0], own["weight_hh_l0"], own.get("bias_hh_l0"))
                    given["a"] = gx + given["gh"]
                given |= {n: v[t, b : b + 1].reshape(1, -1) for n, v in inputs.items()}
                new = spec.step(**{name: given[name] for name in spec.arguments})
                states = after[t] = list(new) if isinstance(new, tuple) else [new]
            columns.append((states, [torch.cat(v) for v in zip(*after)]))
        lasts.append([torch.cat(v) for v in zip(*(c[0] for c in columns))])
        everything.append([torch.stack(v, 1) for v in zip(*(c[1] for c in columns))])
        ys.append(everything[-1][0])
    return torch.cat(ys, -1), [torch.stack(v) for v in zip(*lasts)], [torch.stack(v) for v in zip(*everything)]
