"""A value of a graph as one writes mathematics: rules and composite functions read as their formulas by this."""

from __future__ import annotations

from typing import Union

from rnnkit.custom.graph import UNIT, Graph, Input, Node

Number = Union["Term", float]


def leaf_of(node: Node) -> Input:
    """What an input stands for."""
    assert isinstance(node.data, Input)
    return node.data


def result_of(node: Node) -> tuple[int, int]:
    """The product that a node is a result of, and which result."""
    assert isinstance(node.data, tuple)
    return node.data


class Term:
    """A node of a graph, on which Python's operators make further nodes."""

    __slots__ = ("graph", "n")

    def __init__(self, graph: Graph, n: int) -> None:
        self.graph, self.n = graph, n

    def point(self, op: str, *others: Number) -> Term:
        return Term(self.graph, self.graph.point(op, self.n, *(self.like(x).n for x in others)))

    def like(self, x: Number) -> Term:
        return x if isinstance(x, Term) else Term(self.graph, self.graph.const(x))

    def negated(self) -> Term | None:
        """What this is the negative of, if it is one: x + (-y) is x - y."""
        node = self.graph.nodes[self.n]
        return Term(self.graph, node.args[0]) if node.op == "neg" else None

    def __add__(self, x: Number) -> Term:
        opposite = self.like(x).negated()
        return self.point("add", x) if opposite is None else self.point("sub", opposite)

    def __radd__(self, x: float) -> Term:
        return self.like(x).point("add", self)

    def __sub__(self, x: Number) -> Term:
        opposite = self.like(x).negated()
        return self.point("sub", x) if opposite is None else self.point("add", opposite)

    def __rsub__(self, x: float) -> Term:
        return self.like(x).point("sub", self)

    def __mul__(self, x: Number) -> Term:
        return self.point("mul", x)

    def __rmul__(self, x: float) -> Term:
        return self.like(x).point("mul", self)

    def __truediv__(self, x: Number) -> Term:
        return self.point("div", x)

    def __rtruediv__(self, x: float) -> Term:
        return self.like(x).point("div", self)

    def __neg__(self) -> Term:
        return self.point("neg")

    def __lt__(self, x: Number) -> Term:
        return self.point("lt", x)

    def __le__(self, x: Number) -> Term:
        return self.point("le", x)

    def __gt__(self, x: Number) -> Term:
        return self.point("gt", x)

    def __ge__(self, x: Number) -> Term:
        return self.point("ge", x)

    def same(self, x: Number) -> Term:
        return self.point("eq", x)

    def where(self, a: Number, b: Number) -> Term:
        """a where this is not 0, else b."""
        return self.point("where", a, b)

    def rowsum(self, hidden: int) -> Term:
        """Over the units of a row; H times what is the same in every unit."""
        if self.graph.kind(self.n) == UNIT:
            return Term(self.graph, self.graph.make("rowsum", (self.n,)))
        return self * float(hidden)

    def rowmax(self) -> Term:
        if self.graph.kind(self.n) == UNIT:
            return Term(self.graph, self.graph.make("rowmax", (self.n,)))
        return self
