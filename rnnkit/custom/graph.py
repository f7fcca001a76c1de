"""A step as a graph of values: what a user's step is traced to, what is differentiated, cut and made into kernels.

A value is one number per unit and row ([B, H], kind UNIT), per row ([B, 1], kind ROW), or a constant (CONST). A tensor
[B, m·H] of the step is m values. Two kinds of node cut a step into stages: a product with a weight, and a sum or a
maximum over a row's units. Nodes that say the same are one node, and a node's arguments always come before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

UNIT, ROW, CONST = "unit", "row", "const"

POINTWISE = {
    # operator: number of arguments
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "pow": 2,
    "maximum": 2,
    "minimum": 2,
    "lt": 2,
    "le": 2,
    "gt": 2,
    "ge": 2,
    "eq": 2,
    "ne": 2,
    "where": 3,
    "neg": 1,
    "abs": 1,
    "sigmoid": 1,
    "tanh": 1,
    "relu": 1,
    "exp": 1,
    "expm1": 1,
    "log": 1,
    "log1p": 1,
    "sqrt": 1,
    "rsqrt": 1,
    "reciprocal": 1,
    "sin": 1,
    "cos": 1,
    "erf": 1,
    "round": 1,
    "floor": 1,
    "stop": 1,  # the value, from which no gradient goes on
}
"""As torch's functions of these names. Comparisons give 1 and 0; `where` takes any number but 0 for true."""
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
ROW_SUMS = ("rowsum", "rowmax")
"""Over the H units of a row; a value per row is taken for H equal ones."""


class Input(NamedTuple):
    """What a leaf stands for: block `block` of the input `name`.

    Forward: `gx` (the projected input with its bias, `gates` blocks), the states before the step, parameters per unit,
    inputs of the step. Backward also: `new_<state>` after the step, `d_<state>` the gradient that has arrived,
    `saved` (blocks per unit) and, per row, saved_row, which the forward keeps.
    """

    name: str
    block: int
    kind: str


class Node(NamedTuple):
    """`op` is of POINTWISE or ROW_SUMS, or one of input (data: Input), const (data: float), product (data: (number of
    the product, block of its result))."""

    op: str
    args: tuple[int, ...] = ()
    data: object = None


@dataclass(frozen=True)
class Product:
    """Values times a weight [blocks·H, H].

    Forward: one operand, `blocks` results, weight[k·H:(k+1)·H] @ operand + bias. Transposed: `blocks` operands, the
    gradients of those results, and one result, the gradient of that operand; no bias.
    """

    weight: str
    blocks: int
    operands: tuple[int, ...]
    transposed: bool = False
    bias: str | None = None

    @property
    def results(self) -> int:
        return 1 if self.transposed else self.blocks


@dataclass
class Graph:
    """The nodes of a step, arguments first, and its products."""

    nodes: list[Node] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    _index: dict[Node, int] = field(default_factory=dict)
    _kinds: list[str] = field(default_factory=list)

    def make(self, op: str, args: Iterable[int] = (), data: object = None) -> int:
        """The node that says this, as it stands."""
        key = Node(op, tuple(args), repr(data) if isinstance(data, float) else data)  # -0.0 is not 0.0, NaN is NaN
        if key not in self._index:
            self._index[key] = len(self.nodes)
            self.nodes.append(Node(op, key.args, data))
            self._kinds.append(self._kind(self.nodes[-1]))
        return self._index[key]

    def input(self, name: str, block: int = 0, kind: str = UNIT) -> int:
        return self.make("input", (), Input(name, block, kind))

    def const(self, value: float) -> int:
        return self.make("const", (), float(value))

    def product(self, product: Product) -> list[int]:
        """Its results."""
        if product not in self.products:
            self.products.append(product)
        number = self.products.index(product)
        return [self.make("product", (), (number, k)) for k in range(product.results)]

    def index_of(self, data: Input) -> int | None:
        """The leaf that stands for this input, where there is one."""
        return self._index.get(Node("input", (), data))

    def index_of_product(self, number: int, block: int) -> int | None:
        return self._index.get(Node("product", (), (number, block)))

    def copy(self) -> Graph:
        """One that may be added to."""
        return Graph(list(self.nodes), list(self.products), dict(self._index), list(self._kinds))

    def value(self, n: int) -> float | None:
        """Of a constant, else None."""
        return self.nodes[n].data if self.nodes[n].op == "const" else None  # type: ignore[return-value]

    def kind(self, n: int) -> str:
        return self._kinds[n]

    def _kind(self, node: Node) -> str:
        if node.op == "const":
            return CONST
        if node.op == "input":
            return node.data.kind  # type: ignore[attr-defined]
        if node.op in ROW_SUMS:
            return ROW
        if node.op == "product":
            return UNIT
        kinds = {self._kinds[x] for x in node.args}
        return UNIT if UNIT in kinds else ROW if ROW in kinds else CONST

    def operands(self, n: int) -> tuple[int, ...]:
        """What a node needs first; of a product's result the product's operands."""
        node = self.nodes[n]
        return self.products[node.data[0]].operands if node.op == "product" else node.args  # type: ignore[index]

    def reach(self, roots: Iterable[int]) -> set[int]:
        """The nodes that `roots` need, and they."""
        seen: set[int] = set()
        stack = list(roots)
        while stack:
            n = stack.pop()
            if n not in seen:
                seen.add(n)
                stack.extend(self.operands(n))
        return seen

    def point(self, op: str, *args: int) -> int:
        """A pointwise node, or what it is the same as, with every rounding and every NaN: x + 0 may be x, x · 0 is
        not 0."""
        values = [self.value(x) for x in args]
        a, b = (*args, args[0])[:2]
        if op in ("add", "sub") and values[1] == 0:
            return a
        if op == "add" and values[0] == 0:
            return b
        if op == "sub" and values[0] == 0:
            return self.point("neg", b)
        if op in ("mul", "div") and values[1] == 1:
            return a
        if op == "mul" and values[0] == 1:
            return b
        if op == "mul" and values[1] == -1:
            return self.point("neg", a)
        if op == "mul" and values[0] == -1:
            return self.point("neg", b)
        if op == "neg" and self.nodes[a].op == "neg":
            return self.nodes[a].args[0]
        if None not in values and op in _FOLDED:
            return self.const(_FOLDED[op](*values))
        if op in ("add", "mul", "eq", "ne", "maximum", "minimum"):
            args = tuple(sorted(args))
        return self.make(op, args)


def _divide(a: float, b: float) -> float:
    return a / b if b else math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)


_FOLDED: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _divide,
    "neg": lambda a: -a,
    "stop": lambda a: a,
}


@dataclass(frozen=True)
class CellProgram:
    """A step and its derivative, ready for kernels: for one cell and one H (reductions hold it as a constant).

    The forward graph gives the new states and what is saved. The backward graph's leaves are the states before and
    after the step, parameters, inputs of the step, what was saved, and d_<state>; its roots give the gradients. A root
    None is a gradient that is zero.
    """

    name: str
    hidden: int
    gates: int
    states: tuple[str, ...]
    units: tuple[str, ...]
    """Parameters [H]."""
    weights: tuple[tuple[str, int], ...]
    """Names and blocks of the weights that the recurrence multiplies by; `w_hh`, whose bias is `b_hh`, comes first."""
    steps: tuple[tuple[str, str, bool], ...]
    """Inputs of each step: name, UNIT or ROW, whether a gradient may be wanted."""

    forward: Graph
    new: tuple[int, ...]
    """The states after the step."""
    saved: tuple[int, ...]
    """Of the forward graph: what is kept per unit, besides the states."""
    saved_rows: tuple[int, ...]

    backward: Graph
    d_states: tuple[int | None, ...]
    d_gx: tuple[int | None, ...]
    d_units: tuple[int | None, ...]
    d_steps: tuple[int | None, ...]
    d_products: tuple[tuple[str, tuple[int | None, ...], int], ...]
    """For each product of the forward: its weight, the gradients of its results, and its operand. The weight's
    gradient is their outer product, summed over rows and time; a weight may stand here more than once."""
    needs: tuple[str, ...]
    """The states whose values, before the step or after it, the backward reads."""
