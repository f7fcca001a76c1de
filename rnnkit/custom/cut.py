"""From a step's graph to a program: its derivative, and what the forward keeps for it, by a minimum cut.

Whatever the backward needs and the forward can compute is either kept or computed again. Free are the states before
and after a step, parameters, inputs of the step and constants; a product, a row's sum or maximum and gx are never
computed again. Of the cheapest cuts the one nearest to the uses is taken, so that results of expensive functions are
kept and not their arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence

from rnnkit.custom.graph import POINTWISE, ROW_SUMS, UNIT, CellProgram, Graph, Product
from rnnkit.custom.rules import differentiate
from rnnkit.custom.term import leaf_of, result_of

_UNIT_COST, _ROW_COST, _INFINITE = 1000, 1, 1 << 40


class Network:
    """Capacities between nodes; the minimum cut nearest to the sink."""

    def __init__(self) -> None:
        self.room: dict[Hashable, dict[Hashable, int]] = {}

    def edge(self, a: Hashable, b: Hashable, capacity: int) -> None:
        self.room.setdefault(a, {})
        self.room[a][b] = self.room[a].get(b, 0) + capacity
        self.room.setdefault(b, {}).setdefault(a, 0)

    def _path(self, source: Hashable, sink: Hashable) -> list[tuple[Hashable, Hashable]] | None:
        """A shortest one with room left."""
        came: dict[Hashable, Hashable] = {source: source}
        queue = deque([source])
        while queue:
            a = queue.popleft()
            for b, room in self.room[a].items():
                if room and b not in came:
                    came[b] = a
                    if b == sink:
                        path = []
                        while b != source:
                            path.append((came[b], b))
                            b = came[b]
                        return path
                    queue.append(b)
        return None

    def cut(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """The nodes on the sink's side."""
        if source not in self.room or sink not in self.room:
            return {sink}
        while path := self._path(source, sink):
            flow = min(self.room[a][b] for a, b in path)
            for a, b in path:
                self.room[a][b] -= flow
                self.room[b][a] += flow
        side, queue = {sink}, deque([sink])
        while queue:
            b = queue.popleft()
            for a in self.room[b]:
                if a not in side and self.room[a][b]:
                    side.add(a)
                    queue.append(a)
        return side


def _keep(graph: Graph, roots: Iterable[int], tangents: set[int], free: Callable[[int], bool]) -> list[int]:
    """The nodes that the forward keeps."""
    roots = set(roots)
    needed = sorted(graph.reach(roots))
    behind: set[int] = set()  # what depends on an arriving gradient, so that the forward cannot know it
    for n in needed:
        if n in tangents or any(x in behind for x in graph.operands(n)):
            behind.add(n)
    used = {x for n in behind for x in graph.operands(n)} | roots
    network = Network()
    for n in needed:
        if n in behind or free(n):
            continue
        op = graph.nodes[n].op
        network.edge((n, "in"), (n, "out"), _UNIT_COST if graph.kind(n) == UNIT else _ROW_COST)
        if op in ("input", "product") or op in ROW_SUMS:
            network.edge("source", (n, "in"), _INFINITE)
        else:
            for x in graph.operands(n):
                if not free(x):
                    network.edge((x, "out"), (n, "in"), _INFINITE)
        if n in used:
            network.edge((n, "out"), "sink", _INFINITE)
    side = network.cut("source", "sink")
    return [n for n in needed if (n, "out") in side and (n, "in") in network.room and (n, "in") not in side]


def _copy(
    graph: Graph, roots: Iterable[int], stands: Callable[[int, Graph], int | None]
) -> tuple[Graph, dict[int, int]]:
    """What `roots` need in a graph of its own; `stands` says for which nodes a leaf stands there. A stop is its value:
    the derivative has been taken."""
    into, seen, stack = Graph(), set(), list(roots)
    probe = Graph()
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            if stands(n, probe) is None:
                stack.extend(graph.operands(n))
    number: dict[int, int] = {}
    for n in sorted(seen):
        leaf = stands(n, into)
        if leaf is not None:
            number[n] = leaf
            continue
        node = graph.nodes[n]
        if node.op == "product":
            which, block = result_of(node)
            old = graph.products[which]
            operands = tuple(number[x] for x in old.operands)
            number[n] = into.product(Product(old.weight, old.blocks, operands, old.transposed, old.bias))[block]
        elif node.op == "stop":
            number[n] = number[node.args[0]]
        elif node.op in POINTWISE:
            number[n] = into.point(node.op, *(number[x] for x in node.args))
        else:
            number[n] = into.make(node.op, tuple(number[x] for x in node.args), node.data)
    return into, number


def make_program(
    name: str,
    graph: Graph,
    new: Sequence[int],
    *,
    hidden: int,
    gates: int,
    states: tuple[str, ...],
    units: tuple[str, ...],
    weights: tuple[tuple[str, int], ...],
    steps: tuple[tuple[str, str, bool], ...],
) -> CellProgram:
    """The program of a traced step."""
    tangents = [graph.input("d_" + s) for s in states]
    derivative = differentiate(graph, new, tangents, hidden, frozenset(n for n, _, grad in steps if not grad))

    def gradient(leaf: str, block: int = 0, kind: str = UNIT) -> int | None:
        return derivative.leaves.get(graph.input(leaf, block, kind))

    found: list[list[int | None]] = [
        [gradient(s) for s in states],
        [gradient("gx", k) for k in range(gates)],
        [gradient(u) for u in units],
        [gradient(s, 0, kind) if grad else None for s, kind, grad in steps],
    ]
    products = [(graph.products[k], list(derivative.products[k])) for k in sorted(derivative.products)]
    found += [[*product.operands, *ds] for product, ds in products]
    graph, plain = _copy(
        graph, {n for ns in (new, tangents, *found) for n in ns if n is not None}, lambda n, into: None
    )
    new, tangents = [plain[n] for n in new], [plain[n] for n in tangents]
    found = [[None if n is None else plain[n] for n in ns] for ns in found]
    roots = [n for ns in found for n in ns if n is not None]

    after: dict[int, str] = {}
    for s, n in zip(states, new, strict=True):
        if graph.kind(n) == UNIT and graph.nodes[n].op != "input":
            after.setdefault(n, s)

    def free(n: int) -> bool:
        node = graph.nodes[n]
        return n in after or node.op == "const" or (node.op == "input" and leaf_of(node).name != "gx")

    kept = _keep(graph, roots, set(tangents), free)
    saved = [n for n in kept if graph.kind(n) == UNIT]
    saved_rows = [n for n in kept if graph.kind(n) != UNIT]

    forward, forward_number = _copy(graph, [*new, *kept], lambda n, into: None)

    def leaf(n: int, into: Graph) -> int | None:
        if n in after:
            return into.input("new_" + after[n])
        if n in saved:
            return into.input("saved", saved.index(n))
        if n in saved_rows:
            return into.input("saved_row", saved_rows.index(n), "row")
        return None

    backward, number = _copy(graph, roots, leaf)

    at = [tuple(None if n is None else number[n] for n in ns) for ns in found]
    read = {leaf_of(node).name for node in backward.nodes if node.op == "input"}
    return CellProgram(
        name=name,
        hidden=hidden,
        gates=gates,
        states=states,
        units=units,
        weights=weights,
        steps=steps,
        forward=forward,
        new=tuple(forward_number[n] for n in new),
        saved=tuple(forward_number[n] for n in saved),
        saved_rows=tuple(forward_number[n] for n in saved_rows),
        backward=backward,
        d_states=at[0],
        d_gx=at[1],
        d_units=at[2],
        d_steps=at[3],
        d_products=tuple(
            (product.weight, tuple(ds), operand)
            for (product, _), (operand, *ds) in zip(products, at[4:], strict=True)
            if operand is not None
        ),
        needs=tuple(s for s in states if s in read or "new_" + s in read),
    )
