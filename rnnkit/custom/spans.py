"""The schedule of a graph for the CPU engine: which values are made between which products, and in which registers.

A graph is cut into spans at its products. Inside a span values live in registers (a block of rows in the first-level
cache), which are shared by values that do not live at the same time. A value that a later span reads crosses in memory,
unless a few additions and multiplications make it again. What is read from memory or written to it is used where it
stands.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch

from .graph import CONST, ROW, ROW_SUMS, UNIT, Graph, Input


class Spot(NamedTuple):
    """Where a number stands: a place of csrc/cpu/program.h, `parameter` (one of those per unit), or a register: `unit`,
    `row`, `const`."""

    place: str
    number: int
    block: int = 0


class Store(NamedTuple):
    """A root of a graph: its node, and where the value goes."""

    node: int
    spot: Spot
    also: int = -1
    """Memory that it is written to as well."""
    adds: bool = False
    """To what stands there."""


class Instruction(NamedTuple):
    op: str
    to: Spot
    args: tuple[Spot, ...]
    row: bool = False
    """On values per row."""


@dataclass
class Operand:
    """Memory that a span reads or writes."""

    load: bool = False
    store: bool = False
    also: int = -1


@dataclass
class Span:
    """What lies between two products: those that it begins with, memory, instructions."""

    products: list[int] = field(default_factory=list)
    operands: dict[Spot, Operand] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)


ROW_PLACES = ("row", "memory_row", "crossing_row")
REGISTERS = ("unit", "row")
_CHEAP = ("add", "sub", "mul", "neg")
_TO_THE_BIT = ("lt", "le", "gt", "ge", "eq", "ne", "rowmax")
"""What a backward asks again of values that it makes again: they must be those of the forward to the last bit, or the
largest of a row is found nowhere. So nothing that they are made of is fused, in neither direction."""


def levels_of(g: Graph, roots: Iterable[int]) -> dict[int, int]:
    """The span in which each node can be made: one more than what a product takes."""
    levels: dict[int, int] = {}
    for n in sorted(g.reach(roots)):
        below = [levels[x] for x in g.operands(n)]
        levels[n] = max(below, default=0) + (g.nodes[n].op == "product")
    return levels


def constant_value(g: Graph, n: int, hidden: int) -> float:
    """Of a node that depends on constants alone."""
    node = g.nodes[n]
    if node.op == "const":
        return float(node.data)  # type: ignore[arg-type]
    if node.op == "stop":
        return constant_value(g, node.args[0], hidden)
    if node.op in ROW_SUMS:
        return constant_value(g, node.args[0], hidden) * (hidden if node.op == "rowsum" else 1)
    args = [torch.tensor(constant_value(g, x, hidden), dtype=torch.float64) for x in node.args]
    if node.op == "where":
        args[0] = args[0].bool()
    return float(getattr(torch, node.op)(*args))


class Schedule:
    """The spans of a graph, its registers and constants.

    inputs: where the leaves stand; folded: sums with a product's result that its end makes; bias: parameters that are
    added to the blocks of `gx` where they are read; numbers: those of the graph's products in the program; products:
    the span of each, by that number.
    """

    def __init__(
        self,
        g: Graph,
        hidden: int,
        inputs: dict[Input, Spot],
        stores: list[Store],
        folded: dict[int, tuple[int, int]],
        bias: dict[Input, Spot],
        numbers: dict[int, int],
        products: dict[int, int],
    ) -> None:
        self.g, self.hidden, self.inputs, self.folded, self.bias = g, hidden, inputs, folded, bias
        self.numbers = numbers
        self.constants: list[float] = []
        self.crossings: dict[int, int] = {}
        self.row_crossings: dict[int, int] = {}
        self.most = {"unit": 0, "row": 0}
        self.levels = levels_of(g, [s.node for s in stores])
        self.exact = g.reach([x for n in self.levels if g.nodes[n].op in _TO_THE_BIT for x in g.nodes[n].args])
        self.spans = self._spans(stores, products)

    # Which values a span makes.

    def _made(self, n: int) -> bool:
        """Whether instructions make it."""
        node = self.g.nodes[n]
        return node.op not in ("input", "const", "product") and n not in self.folded and self.g.kind(n) != CONST

    def _cheap(self, n: int, depth: int = 2) -> bool:
        """Whether a later span makes it again. Not from a state's gradient, which is overwritten."""
        node = self.g.nodes[n]
        if node.op == "input" and self.inputs[node.data].place == "d_state":  # type: ignore[index]
            return False
        if not self._made(n):
            return True
        return depth > 0 and node.op in _CHEAP and all(self._cheap(x, depth - 1) for x in node.args)

    def _spans(self, stores: list[Store], products: dict[int, int]) -> list[Span]:
        """products: the span of each product."""
        count = 1 + max([*products.values(), *(self.levels[s.node] for s in stores), 0])
        read_until = self._read_until()
        due: list[list[Store]] = [[] for _ in range(count)]
        for store in stores:
            due[max(self.levels[store.node], read_until.get(store.spot, 0))].append(store)
        made: list[set[int]] = [set() for _ in range(count)]
        crossing: list[set[int]] = [set() for _ in range(count)]
        crossed: list[set[int]] = [set() for _ in range(count)]
        for k in reversed(range(count)):
            stack = [s.node for s in due[k]] + list(crossing[k])
            while stack:
                n = stack.pop()
                if n in made[k] or n in crossed[k]:
                    continue
                if self._made(n) and self.levels[n] < k and not self._cheap(n):
                    crossed[k].add(n)
                    crossing[self.levels[n]].add(n)
                    continue
                made[k].add(n)
                if self._made(n):
                    stack.extend(self.g.nodes[n].args)
        spans = []
        for k in range(count):
            span = Span(products=sorted(p for p, at in products.items() if at == k))
            _Emitter(self, span, made[k], crossed[k], due[k], sorted(crossing[k])).run()
            if span.products or span.code:
                spans.append(span)
        return spans

    def _read_until(self) -> dict[Spot, int]:
        """The last span that reads a place which is written too: the gradient of a state."""
        found: dict[Spot, int] = {}
        for n in self.levels:
            for x in self.g.nodes[n].args:
                leaf = self.g.nodes[x]
                if leaf.op == "input" and self.inputs[leaf.data].place == "d_state":  # type: ignore[index]
                    spot = self.inputs[leaf.data]  # type: ignore[index]
                    found[spot] = max(found.get(spot, 0), self.levels[n])
        return found

    def constant(self, value: float) -> Spot:
        bits = struct.pack("<d", value)
        for k, other in enumerate(self.constants):
            if struct.pack("<d", other) == bits:
                return Spot("const", k)
        self.constants.append(value)
        return Spot("const", len(self.constants) - 1)

    def cross(self, n: int) -> Spot:
        row = self.g.kind(n) == ROW
        table = self.row_crossings if row else self.crossings
        return Spot("crossing_row" if row else "crossing", table.setdefault(n, len(table)))


class _Emitter:
    """The instructions of one span."""

    def __init__(
        self, schedule: Schedule, span: Span, made: set[int], crossed: set[int], due: list[Store], crossing: list[int]
    ) -> None:
        self.s, self.g, self.span, self.crossed = schedule, schedule.g, span, crossed
        self.order = sorted(made | crossed)
        self.stores: dict[int, list[Store]] = {}
        for store in due:
            self.stores.setdefault(store.node, []).append(store)
        for n in crossing:
            self.stores.setdefault(n, []).append(Store(n, schedule.cross(n)))
        self.args: dict[int, tuple[int, ...]] = {
            n: self.g.nodes[n].args if n in made and schedule._made(n) else () for n in self.order
        }
        self.ops: dict[int, str] = {n: self.g.nodes[n].op for n in self.order}
        self._fuse()
        self.last = {x: n for n in self.order for x in self.args[n]}
        self.where: dict[int, Spot] = {}
        self.spread: dict[int, Spot] = {}
        self.free: dict[str, list[int]] = {"unit": [], "row": []}
        self.count = {"unit": 0, "row": 0}
        self.at_end: list[tuple[Store, Spot]] = []

    def _fuse(self) -> None:
        """a b + c and c - a b in one instruction, where nobody else wants a b."""
        uses: dict[int, int] = {}
        for n in self.order:
            for x in self.args[n]:
                uses[x] = uses.get(x, 0) + 1
        for n in self.order:
            if self.ops[n] not in ("add", "sub") or not self.args[n] or n in self.s.exact:
                continue
            a, b = self.args[n]
            for factor, other in ((b, a), (a, b)) if self.ops[n] == "add" else ((b, a),):
                inner = self.ops.get(factor) == "mul" and len(self.args.get(factor, ())) == 2 and uses[factor] == 1
                if inner and factor not in self.stores and self.g.kind(factor) == self.g.kind(n):
                    self.args[n] = (*self.args[factor], other)
                    self.ops[n] = "muladd" if self.ops[n] == "add" else "nmuladd"
                    self.args[factor] = ()
                    self.ops[factor] = "inside"
                    break

    def run(self) -> None:
        for n in self.order:
            if self.ops[n] != "inside":
                self._node(n)
                for store in self.stores.get(n, ()):
                    self._store(store)
                if n not in self.last and not any(s.node == n for s, _ in self.at_end):
                    self._release(self.where[n])
        for store, place in self.at_end:
            self._copy(store, place)

    def _operand(self, spot: Spot) -> Operand:
        return self.span.operands.setdefault(spot, Operand())

    def _register(self, kind: str) -> Spot:
        if self.free[kind]:
            return Spot(kind, self.free[kind].pop())
        self.count[kind] += 1
        self.s.most[kind] = max(self.s.most[kind], self.count[kind])
        return Spot(kind, self.count[kind] - 1)

    def _release(self, spot: Spot) -> None:
        if spot.place in REGISTERS:
            self.free[spot.place].append(spot.number)

    def _add(self, op: str, to: Spot, args: tuple[Spot, ...], row: bool = False) -> None:
        self.span.code.append(Instruction(op, to, args, row))

    def _loaded(self, spot: Spot) -> Spot:
        self._operand(spot).load = True
        return spot

    def _node(self, n: int) -> None:
        node, kind = self.g.nodes[n], self.g.kind(n)
        if kind == CONST:
            self.where[n] = self.s.constant(constant_value(self.g, n, self.s.hidden))
        elif n in self.crossed:
            self.where[n] = self._loaded(self.s.cross(n))
        elif n in self.s.folded:
            self.where[n] = self._loaded(Spot("product", *self.s.folded[n]))
        elif node.op == "product":
            result = cast(tuple[int, int], node.data)
            self.where[n] = self._loaded(Spot("product", self.s.numbers[result[0]], result[1]))
        elif node.op == "input":
            leaf = cast(Input, node.data)
            spot = self.s.inputs[leaf]
            self.where[n] = spot if spot.place == "parameter" else self._loaded(spot)
            if leaf in self.s.bias:
                self.where[n] = self._register("unit")
                self._add("add", self.where[n], (spot, self.s.bias[leaf]))
        else:
            self._compute(n, kind)

    def _compute(self, n: int, kind: str) -> None:
        args, op = self.args[n], self.ops[n]
        places = [self.where[x] for x in args]
        if op in ROW_SUMS:
            if self.g.kind(args[0]) == UNIT:
                op = "row_sum" if op == "rowsum" else "row_max"
            else:  # H equal numbers
                places.append(self.s.constant(float(self.s.hidden) if op == "rowsum" else 1.0))
                op = "mul"
        elif kind == UNIT:
            places = [self._over_units(x) if self.g.kind(x) == ROW else self.where[x] for x in args]
        for x in set(args):
            if self.last[x] == n and not any(s.node == x for s, _ in self.at_end):
                self._release(self.where[x])
                if x in self.spread:
                    self._release(self.spread.pop(x))
        target = self._target(n) if kind == UNIT else None
        self.where[n] = target or self._register("unit" if kind == UNIT else "row")
        self._add("copy" if op == "stop" else op, self.where[n], tuple(places), kind == ROW and op[:4] != "row_")

    def _over_units(self, x: int) -> Spot:
        if x not in self.spread:
            self.spread[x] = self._register("unit")
            self._add("spread", self.spread[x], (self.where[x],))
        return self.spread[x]

    def _is_read_later(self, spot: Spot, n: int) -> bool:
        """Whether an instruction after that of node n still wants what stands there now."""
        later = (m for m in self.order if self.g.nodes[m].op == "input" and self.last.get(m, -1) > n)
        return any(self.s.inputs[cast(Input, self.g.nodes[m].data)] == spot for m in later)

    def _target(self, n: int) -> Spot | None:
        """Memory where the result may be written at once."""
        for store in self.stores.get(n, ()):
            if not store.adds and not self._is_read_later(store.spot, n):
                self._operand(store.spot).store = True
                return store.spot
        return None

    def _store(self, store: Store) -> None:
        place = self.where[store.node]
        entry = self._operand(store.spot)
        entry.store = True
        entry.also = max(entry.also, store.also)
        if place == store.spot:
            return
        if self._is_read_later(store.spot, store.node):
            self.at_end.append((store, place))
        else:
            self._copy(store, place)

    def _copy(self, store: Store, place: Spot) -> None:
        to, row = store.spot, store.spot.place in ROW_PLACES
        if store.adds:
            self._operand(to).load = True
            if place.place in ROW_PLACES:
                wide = self._register("unit")
                self._add("spread", wide, (place,))
                self._add("add", to, (to, wide))
                self._release(wide)
            else:
                self._add("add", to, (to, place))
        elif place.place in ROW_PLACES and not row:
            self._add("spread", to, (place,))
        else:
            self._add("copy", to, (place,), row)
