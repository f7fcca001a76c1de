"""Whole problems of custom cells, and the plainest loop that runs them: one row, one step, one direction at a time,
over a step of one row. Lengths, resets and states are told in Python's words, not in masks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from variant_cells import Function, Oracle, Values, logistic

import rnnkit
from rnnkit.backends.cpu import extension

BACKENDS = ["reference", *["cpu"] * extension.available()]
"""That run custom cells here."""
F64 = torch.float64
SUFFIXES = ("_l0", "_l0_reverse")


@dataclass(frozen=True)
class Problem:
    """One layer of a cell. resets: (t, b) of each."""

    bidirectional: bool = True
    bias: bool = True
    heads: int = 1
    steps: int = 5
    rows: int = 3
    inputs: int = 4
    hidden: int = 6
    lengths: tuple[int, ...] | None = None
    resets: tuple[tuple[int, int], ...] | None = None
    reset_state: bool = False
    hx: bool = True
    seed: int = 0

    @property
    def count(self) -> int:
        return 1 + self.bidirectional

    def valid(self, b: int) -> int:
        return self.steps if self.lengths is None else self.lengths[b]


PLAIN = Problem()
RAGGED = Problem(lengths=(4, 0, 5), resets=((0, 2), (2, 0), (2, 2), (3, 2)), reset_state=True)
PROBLEMS = {
    "plain": PLAIN,
    "ragged": RAGGED,
    "zeros": Problem(hx=False, bias=False, resets=((1, 1), (3, 0)), seed=1),
    "heads": Problem(heads=3, lengths=(5, 2, 3), seed=2),
}
SMALL = Problem(steps=3, rows=2, inputs=1, hidden=3, lengths=(2, 3), resets=((1, 1),), reset_state=True)


@dataclass
class Given:
    """A layer, and what it is called with; `leaves` may have gradients, `fixed` may not."""

    layer: rnnkit.Custom
    states: tuple[str, ...]
    leaves: Values = field(default_factory=dict)
    fixed: Values = field(default_factory=dict)

    def some(self, prefix: str) -> list[Tensor]:
        return [self.leaves[f"{prefix}{name}"] for name in self.states if f"{prefix}{name}" in self.leaves]


def draw(oracle: Oracle, problem: Problem, dtype: torch.dtype = F64, **options: Any) -> Given:
    """The same numbers whatever the dtype. options: of `Custom`."""
    g = torch.Generator().manual_seed(problem.seed)
    p, cell = problem, oracle.cell
    sizes = {"bidirectional": p.bidirectional, "bias": p.bias, "heads": p.heads, "dtype": dtype}
    layer = rnnkit.Custom(cell, p.inputs, p.hidden, **sizes, **options)
    with torch.no_grad():
        for v in layer.parameters():
            v.copy_((torch.rand(v.shape, generator=g) * 2 - 1) * 0.8)
    given = Given(layer, tuple(cell.states))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    given.leaves["x"] = normal(p.steps, p.rows, p.inputs)
    for prefix in ["0 "] * p.hx + ["r "] * p.reset_state:
        for name in given.states:
            v = normal(p.count, p.rows, p.hidden)
            given.leaves[prefix + name] = v.abs() + 0.5 if name == "n" else v  # a normaliser is above 0
    for name, kind in oracle.given.items():
        if kind in ("keep", "drop", "once"):  # 0 or 1; of dropout 0 or 1.25, for φ(0 v) may be 0 φ(v)
            drawn = torch.rand((1 if kind == "once" else p.steps, p.rows, p.hidden), generator=g) < 0.5
            given.fixed[name] = drawn.to(dtype) * (1.0 if kind == "keep" else 1.25)
        else:
            given.leaves[name] = normal(p.steps, p.rows, p.hidden)[(..., 0) if kind == "row" else ...].sigmoid()
    given.leaves = {name: v.requires_grad_() for name, v in given.leaves.items()}
    return given


def marks(problem: Problem) -> dict[str, Tensor]:
    """`lengths` and `reset` as a call has them."""
    found = {}
    if problem.lengths is not None:
        found["lengths"] = torch.tensor(problem.lengths)
    if problem.resets is not None:
        found["reset"] = torch.zeros(problem.steps, problem.rows, dtype=torch.bool)
        for t, b in problem.resets:
            found["reset"][t, b] = True
    return found


def call(oracle: Oracle, problem: Problem, given: Given) -> Values:
    """What rnnkit gives: y, the last states and every state after every step, by name."""
    one = len(given.states) == 1
    hx, again = ((v[0] if one and v else tuple(v) or None) for v in (given.some("0 "), given.some("r ")))
    more = {name: v for name, v in {**given.leaves, **given.fixed}.items() if name in oracle.given}
    y, last, every = given.layer(
        given.leaves["x"], hx, **marks(problem), reset_state=again, return_all_states=True, **more
    )
    last, every = ((v,) if one else v for v in (last, every))
    found = {"y": y}
    for name, a, b in zip(given.states, last, every, strict=True):
        found |= {f"last {name}": a, f"all {name}": b}
    return found


def loop(
    oracle: Oracle, problem: Problem, given: Given, phi: Function | None = None, sigma: Function = logistic
) -> Values:
    """The same by the oracle's step."""
    p, leaves, names = problem, given.leaves, given.states
    phi = phi or oracle.phi
    extra = {name: v for name, v in {**leaves, **given.fixed}.items() if name in oracle.given}
    zeros = torch.zeros(p.count, p.rows, p.hidden, dtype=leaves["x"].dtype)
    start = given.some("0 ") or [zeros] * len(names)
    again = given.some("r ") or [zeros] * len(names)
    grids, finals = [], []
    for d, suffix in enumerate(SUFFIXES[: p.count]):
        own = parameters(given.layer, suffix)
        x = leaves["x"]
        if oracle.before is not None:
            x = oracle.before(x, own, [p.valid(b) for b in range(p.rows)])
        grid = [[[zeros[0, 0]] * len(names) for _ in range(p.rows)] for _ in range(p.steps)]
        final = []
        for b in range(p.rows):
            s, valid = [v[d, b] for v in start], p.valid(b)
            for t in reversed(range(valid)) if d else range(valid):
                border = t + 1 if d else t  # a reset at t lies between t - 1 and t, whichever comes first
                if border < valid and (border, b) in (p.resets or ()):
                    s = [v[d, b] for v in again]
                now = {name: v[t if v.shape[0] > 1 else 0, b] for name, v in extra.items()}
                s = list(oracle.step(x[t, b], s, own, now, phi, sigma))
                grid[t][b] = s
            final.append(s)
        grids.append(grid)
        finals.append(final)
    found = {}
    for k, name in enumerate(names):
        every = torch.stack([torch.stack([torch.stack([row[k] for row in line]) for line in grid]) for grid in grids])
        found[f"all {name}"] = every
        found[f"last {name}"] = torch.stack([torch.stack([row[k] for row in final]) for final in finals])
    found["y"] = torch.cat(list(found[f"all {names[0]}"]), -1)
    return found


def parameters(layer: torch.nn.Module, suffix: str) -> Values:
    """Those of one direction, by the names that they have in the cell."""
    found = {}
    for name, v in layer.named_parameters():
        match = re.fullmatch(rf"(\w+?){suffix}(\.\w+)?", name)
        if match:
            found[match[1] + (match[2] or "")] = v
    return found


def with_gradients(results: Values, given: Given) -> Values:
    """The results, and the gradient of every leaf for a loss that weighs each number differently."""
    g = torch.Generator().manual_seed(7)
    weighed = [(v * torch.randn(v.shape, generator=g).to(v.dtype)).sum() for _, v in sorted(results.items())]
    leaves = {**given.leaves, **dict(given.layer.named_parameters())}
    found = torch.autograd.grad(sum(weighed), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {**results, **{f"d {name}": v for name, v in zip(leaves, found, strict=True)}}


def check(oracle: Oracle, problem: Problem, backend: str = "reference", tolerance: float = 1e-11) -> None:
    """rnnkit against the loop, values and gradients, in float64."""
    given = draw(oracle, problem, backend=backend)
    found = with_gradients(call(oracle, problem, given), given)
    expected = with_gradients(loop(oracle, problem, given), given)
    assert found.keys() == expected.keys()
    for name, v in found.items():
        torch.testing.assert_close(v, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def function_of(oracle: Oracle, problem: Problem, given: Given) -> tuple[Callable[..., Any], list[Tensor]]:
    """The layer as a function of its leaves and parameters, for gradcheck."""
    names = list(given.leaves)
    own = [name for name, _ in given.layer.named_parameters()]
    values = [given.leaves[n] for n in names] + [v for _, v in given.layer.named_parameters()]

    def run(*v: Tensor) -> tuple[Tensor, ...]:
        again = Given(_Bound(given.layer, dict(zip(own, v[len(names) :]))), given.states)  # type: ignore[arg-type]
        again.leaves, again.fixed = dict(zip(names, v[: len(names)])), given.fixed
        return tuple(call(oracle, problem, again).values())

    return run, values


class _Bound:
    """A layer with other parameters."""

    def __init__(self, layer: torch.nn.Module, own: Values) -> None:
        self.layer, self.own = layer, own

    def __call__(self, *args: Any, **options: Any) -> Any:
        return torch.func.functional_call(self.layer, self.own, args, options)


def without_suffix(names: Sequence[str]) -> set[str]:
    return {re.sub(r"_l0(_reverse)?", "", name) for name in names}
