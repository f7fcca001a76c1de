"""Each derivative rule against autograd of the function next to it: at random points, at 0, at equals, far out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rnnkit.custom.evaluate import evaluate
from rnnkit.custom.graph import COMPARISONS, POINTWISE, ROW_SUMS, Graph
from rnnkit.custom.rules import RULES, differentiate

HIDDEN = 12
EDGES = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, 2.0, 80.0, -80.0, 1e-30, -3.0, 0.5, 0.5], dtype=torch.float64)
POSITIVE = ("log", "sqrt", "rsqrt")


def _arguments(op: str) -> list[Tensor]:
    """Two rows: a random one, one of edges, against themselves in other orders, so that some are equal."""
    random = torch.Generator().manual_seed(7)
    out = []
    for k in range(POINTWISE.get(op, 1)):
        x = torch.stack([torch.randn(HIDDEN, generator=random, dtype=torch.float64), EDGES.roll(k)])
        if op in POSITIVE:
            x = x.abs() + 1e-3
        if op == "log1p":
            x = x.abs()
        if op in ("exp", "expm1"):
            x = x.clamp(-80, 50)
        if op == "where" and k == 0:
            x = (x > 0).double()
        if op in ("div", "reciprocal"):
            x = torch.where(x == 0, 0.25, x)
        out.append(x)
    return out


def _by_rules(op: str, xs: list[Tensor], d: Tensor, exponent: float | None = None) -> list[Tensor]:
    g = Graph()
    leaves = [g.input(f"x{k}") for k in range(len(xs))]
    args = leaves if exponent is None else [leaves[0], g.const(exponent)]
    y = g.make(op, args)
    found = differentiate(g, [y], [g.input("d")], HIDDEN, frozenset())
    roots = [found.leaves[n] if n in found.leaves else g.const(0.0) for n in leaves]
    values = {f"x{k}": x for k, x in enumerate(xs)} | {"d": d}
    return [x.expand(xs[0].shape) for x in evaluate(g, roots, lambda leaf: values[leaf.name], {}, HIDDEN, like=xs[0])]


def _hold(have: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("op", [op for op in POINTWISE if op not in ("pow", *COMPARISONS, "round", "floor", "stop")])
def test_pointwise(op: str) -> None:
    xs = [x.requires_grad_() for x in _arguments(op)]
    y = RULES[op].forward(*xs)
    d = torch.linspace(0.5, 2.0, y.numel(), dtype=torch.float64).view(y.shape)
    want = torch.autograd.grad((y * d).sum(), xs, allow_unused=True)
    with torch.no_grad():
        _hold(_by_rules(op, xs, d), [torch.zeros_like(x) if w is None else w for x, w in zip(xs, want)])


@pytest.mark.parametrize("op", [*COMPARISONS, "round", "floor", "stop"])
def test_those_from_which_no_gradient_goes_on(op: str) -> None:
    xs = _arguments(op)
    _hold(_by_rules(op, xs, torch.ones_like(xs[0])), [torch.zeros_like(x) for x in xs])


@pytest.mark.parametrize("exponent", [1.7, -1.3, 5.0, -3.0, 0.3])
def test_powers(exponent: float) -> None:
    x = (_arguments("log")[0] + 0.1).requires_grad_()
    y = x**exponent
    want = torch.autograd.grad(y.sum(), [x])
    with torch.no_grad():
        _hold(_by_rules("pow", [x], torch.ones_like(x), exponent), list(want))


@pytest.mark.parametrize("op", ROW_SUMS)
def test_over_rows(op: str) -> None:
    """The edges' row has its maximum twice."""
    x = torch.where(_arguments(op)[0] == -80, 80.0, _arguments(op)[0]).requires_grad_()
    y = RULES[op].forward(x)
    (want,) = torch.autograd.grad((y.expand_as(x) * 1.5).sum(), [x])
    with torch.no_grad():
        _hold(_by_rules(op, [x], torch.full_like(x, 1.5)), [want])


def test_every_operator_has_a_rule() -> None:
    assert set(RULES) == {*POINTWISE, *ROW_SUMS}


def test_not_a_number_goes_through_as_in_torch() -> None:
    x = torch.full((1, HIDDEN), float("nan"), dtype=torch.float64).requires_grad_()
    for op in ("relu", "maximum", "minimum", "abs"):
        xs = [x, torch.zeros_like(x).requires_grad_()][: POINTWISE[op]]
        want = torch.autograd.grad(RULES[op].forward(*xs).sum(), xs)
        with torch.no_grad():
            _hold(_by_rules(op, xs, torch.ones_like(x)), list(want))
