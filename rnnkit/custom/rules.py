"""Every operator of a graph once: what torch computes by it, and its derivative next to it.

A rule takes the gradient `d` of the result `y` and the arguments, and says the gradient of each argument; None is an
argument from which no gradient goes on. At edges the rules follow torch: relu and abs have derivative 0 at 0,
equals share in maximum, minimum and rowmax. `where` and not a product by 0 shuts a gradient out: 0 · inf is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkit.custom.graph import CONST, ROW_SUMS, UNIT, Graph, Product
from rnnkit.custom.term import Term, leaf_of, result_of


class Rule(NamedTuple):
    forward: Callable[..., Tensor]
    derivative: Callable[..., tuple[Term | None, ...]]


def _product(d: Term, y: Term, a: Term, b: Term) -> tuple[Term, Term | None]:
    """Of a square at once."""
    return (d * 2 * a, None) if a.n == b.n else (d * b, d * a)


def _larger(d: Term, y: Term, a: Term, b: Term) -> tuple[Term, Term]:
    """Equals get half each."""
    half = d * 0.5
    return (a < b).where(0, a.same(b).where(half, d)), (b < a).where(0, a.same(b).where(half, d))


def _smaller(d: Term, y: Term, a: Term, b: Term) -> tuple[Term, Term]:
    half = d * 0.5
    return (a > b).where(0, a.same(b).where(half, d)), (b > a).where(0, a.same(b).where(half, d))


def _power(d: Term, y: Term, a: Term, b: Term) -> tuple[Term, None]:
    """The exponent is a constant, of which the tracer makes sure; it is neither 0 nor 1."""
    exponent = a.graph.value(b.n)
    assert exponent is not None
    return d * exponent * a.point("pow", exponent - 1), None


def _compared(compare: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """1 or 0 in the arguments' dtype; no gradient goes on."""

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return compare(a, b).to(torch.result_type(a, b))

    return Rule(forward, lambda d, y, a, b: (None, None))


RULES: dict[str, Rule] = {
    "add": Rule(torch.add, lambda d, y, a, b: (d, d)),
    "sub": Rule(torch.sub, lambda d, y, a, b: (d, -d)),
    "mul": Rule(torch.mul, _product),
    "div": Rule(torch.div, lambda d, y, a, b: (d / b, -(d / b) * y)),
    "pow": Rule(torch.pow, _power),
    "maximum": Rule(torch.maximum, _larger),
    "minimum": Rule(torch.minimum, _smaller),
    "lt": _compared(torch.lt),
    "le": _compared(torch.le),
    "gt": _compared(torch.gt),
    "ge": _compared(torch.ge),
    "eq": _compared(torch.eq),
    "ne": _compared(torch.ne),
    "where": Rule(
        lambda c, a, b: torch.where(c != 0, a, b),
        lambda d, y, c, a, b: (None, c.where(d, 0), c.where(0, d)),
    ),
    "neg": Rule(torch.neg, lambda d, y, a: (-d,)),
    "abs": Rule(torch.abs, lambda d, y, a: (d * ((a > 0) - (a < 0)),)),
    "sigmoid": Rule(torch.sigmoid, lambda d, y, a: (d * (1 - y) * y,)),
    "tanh": Rule(torch.tanh, lambda d, y, a: (d * (1 - y * y),)),
    "relu": Rule(torch.relu, lambda d, y, a: ((y <= 0).where(0, d),)),
    "exp": Rule(torch.exp, lambda d, y, a: (d * y,)),
    "expm1": Rule(torch.expm1, lambda d, y, a: (d * (y + 1),)),
    "log": Rule(torch.log, lambda d, y, a: (d / a,)),
    "log1p": Rule(torch.log1p, lambda d, y, a: (d / (a + 1),)),
    "sqrt": Rule(torch.sqrt, lambda d, y, a: (d / (y * 2),)),
    "rsqrt": Rule(torch.rsqrt, lambda d, y, a: (d * -0.5 * (y * y * y),)),
    "reciprocal": Rule(torch.reciprocal, lambda d, y, a: (-d * (y * y),)),
    "sin": Rule(torch.sin, lambda d, y, a: (d * a.point("cos"),)),
    "cos": Rule(torch.cos, lambda d, y, a: (-d * a.point("sin"),)),
    "erf": Rule(torch.erf, lambda d, y, a: (d * (2 / math.sqrt(math.pi)) * (-(a * a)).point("exp"),)),
    "round": Rule(torch.round, lambda d, y, a: (None,)),
    "floor": Rule(torch.floor, lambda d, y, a: (None,)),
    "stop": Rule(lambda a: a, lambda d, y, a: (None,)),
    "rowsum": Rule(lambda a: a.sum(-1, keepdim=True), lambda d, y, a: (d,)),
    "rowmax": Rule(lambda a: a.amax(-1, keepdim=True), lambda d, y, a: ()),  # shared by equals: see _row_maximum
}


def _row_maximum(d: Term, y: Term, a: Term, hidden: int) -> tuple[Term]:
    """Equals share evenly."""
    largest = a.same(y)
    return (largest.where(d / largest.rowsum(hidden), 0),)


class _Gradients:
    """What has arrived at each value. At a value per row what comes from units is summed over them once, at the end."""

    def __init__(self, graph: Graph, hidden: int) -> None:
        self.graph, self.hidden = graph, hidden
        self.units: dict[int, Term] = {}
        self.rows: dict[int, Term] = {}

    def add(self, n: int, d: Term, per_unit: bool) -> None:
        """`per_unit`: one gradient for each unit that used the value, though they may be equal."""
        into = self.units if per_unit or self.graph.kind(n) == UNIT else self.rows
        into[n] = into[n] + d if n in into else d

    def at(self, n: int) -> Term | None:
        units, rows = self.units.get(n), self.rows.get(n)
        if units is None:
            return rows
        if self.graph.kind(n) == UNIT:
            return units
        total = units.rowsum(self.hidden)
        return total if rows is None else rows + total


class Derivative(NamedTuple):
    leaves: dict[int, int]
    """Of an input's node: its gradient."""
    products: dict[int, tuple[int | None, ...]]
    """Of a product's number: the gradients of its results."""


def differentiate(
    graph: Graph, new: Sequence[int], d_new: Sequence[int], hidden: int, constant: frozenset[str]
) -> Derivative:
    """Adds to the graph the gradients of everything, given those of `new`; inputs named in `constant` have none."""
    last = len(graph.nodes)
    active = [False] * last  # does a gradient go through this node?
    for n in range(last):
        node = graph.nodes[n]
        if node.op == "input":
            active[n] = leaf_of(node).name not in constant
        elif node.op == "product":
            active[n] = True
        elif node.op in ROW_SUMS or (node.op != "const" and _passes(node.op)):
            active[n] = any(active[x] for x in node.args)

    gradients = _Gradients(graph, hidden)
    for n, d in zip(new, d_new, strict=True):
        if graph.kind(n) != CONST:
            gradients.add(n, Term(graph, d), per_unit=True)
    leaves: dict[int, int] = {}
    products: dict[int, tuple[int | None, ...]] = {}
    for n in reversed(range(last)):
        if not active[n]:
            continue
        node = graph.nodes[n]
        if node.op == "product":
            number, block = result_of(node)
            if block == 0:  # the first of its results, so the last that is seen
                found = [gradients.at(x) for x in graph.product(graph.products[number])]
                if any(found):
                    products[number] = tuple(x.n if x else None for x in found)
                    _back(graph, graph.products[number], products[number], active, gradients)
            continue
        arrived = gradients.at(n)
        if arrived is None:
            continue
        if node.op == "input":
            leaves[n] = arrived.n
            continue
        y = Term(graph, n)
        terms = [Term(graph, x) for x in node.args]
        if node.op == "rowmax":
            parts: tuple[Term | None, ...] = _row_maximum(arrived, y, terms[0], hidden)
        else:
            parts = RULES[node.op].derivative(arrived, y, *terms)
        per_unit = graph.kind(n) == UNIT
        for x, part in zip(node.args, parts, strict=True):
            if part is not None and active[x]:
                gradients.add(x, part, per_unit)
    return Derivative(leaves, products)


def _passes(op: str) -> bool:
    return op not in ("lt", "le", "gt", "ge", "eq", "ne", "round", "floor", "stop")


def _back(graph: Graph, product: Product, d: tuple[int | None, ...], active: list[bool], gradients: _Gradients) -> None:
    """Through a product: the transposed weight times the gradients of its results."""
    (operand,) = product.operands
    if active[operand]:
        operands = tuple(graph.const(0.0) if x is None else x for x in d)
        (back,) = graph.product(Product(product.weight, product.blocks, operands, transposed=True))
        gradients.add(operand, Term(graph, back), per_unit=True)
