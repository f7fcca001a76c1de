"""A CellProgram as the words that the CPU engine reads: csrc/layer/program.h and csrc/cpu/program.h say what they mean.

Four programs are made of a cell: the forward with what it saves and without, and the backward for types that products
read as they are stored and for half types, whose products read float32.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from .graph import ROW, UNIT, CellProgram, Graph, Input
from .spans import Schedule, Spot, Store, levels_of

OPS = (
    *(
        "add",
        "sub",
        "mul",
        "div",
        "pow",
        "maximum",
        "minimum",
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
        "where",
        "neg",
        "abs",
    ),
    *("sigmoid", "tanh", "relu", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "erf"),
    *("round", "floor", "copy", "muladd", "nmuladd", "spread", "row_sum", "row_max"),
)
"""In the order of RNNKIT_PROGRAM_OPS."""
PLACES = (
    *("state_in", "state_out", "product", "crossing", "crossing_row", "operand", "memory", "memory_row", "before"),
    *("d_state", "d_unit"),
)
"""In the order of Place."""
_OP = {name: k for k, name in enumerate(OPS)}
_PLACE = {name: k for k, name in enumerate(PLACES)}
B_IH, B_HH = 1, 2  # biases, as bits


@dataclass
class _Product:
    """As ProgramProduct: -1 for none."""

    weight: int
    blocks: int
    transposed: bool
    state: int = -1
    memory: int = -1
    adds: int = -1
    added: int = 0
    bias: int = -1
    into: int = -1
    accumulates: bool = False


@dataclass
class _WeightGrad:
    weight: int
    dy: int
    state: int = -1
    memory: int = -1


@dataclass
class _Words:
    """What is told of a program beside its spans."""

    saved: int = 0
    saved_rows: int = 0
    keep_first: bool = False
    units: list[tuple[bool, int]] = field(default_factory=list)
    biases: list[tuple[bool, int]] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)
    memories: int = 0
    dys: int = 0
    operands: int = 0
    grads: list[_WeightGrad] = field(default_factory=list)
    needs: tuple[bool, ...] = ()
    padded: list[int] = field(default_factory=list)

    def unit(self, bias: bool, index: int) -> Spot:
        """The parameter per unit, which is asked for."""
        if (bias, index) not in self.units:
            self.units.append((bias, index))
        return Spot("parameter", self.units.index((bias, index)))

    def bias(self, b_hh: bool, b_ih: int) -> int:
        """The bias of a product: b_hh or nothing, and blocks of b_ih as bits."""
        if not b_hh and not b_ih:
            return -1
        if (b_hh, b_ih) not in self.biases:
            self.biases.append((b_hh, b_ih))
        return self.biases.index((b_hh, b_ih))


def _step_memories(p: CellProgram, first: int) -> dict[Input, Spot]:
    return {
        Input(name, 0, kind): Spot("memory_row" if kind == ROW else "memory", first + k)
        for k, (name, kind, _) in enumerate(p.steps)
    }


def _product_levels(g: Graph, levels: dict[int, int], numbers: dict[int, int]) -> dict[int, int]:
    """The span of each product, by its number in the program."""
    return {new: 1 + max(levels[x] for x in g.products[old].operands) for old, new in numbers.items()}


def _used_products(g: Graph, levels: dict[int, int]) -> list[int]:
    return sorted({g.nodes[n].data[0] for n in levels if g.nodes[n].op == "product"})  # type: ignore[index]


@functools.lru_cache(maxsize=256)
def forward_words(key: ProgramKey, save: bool, biases: int, keep_first: bool = False) -> bytes:
    """The forward; with `save` it keeps what the backward wants. `biases`: which the layer has, B_IH and B_HH as bits.
    `keep_first`: the first state in the compute type too, where y rounds it to a half type."""
    return _encode(key.program, *_forward(key.program, save, biases, keep_first))


def _forward(p: CellProgram, save: bool, biases: int, keep_first: bool = False) -> tuple[_Words, Schedule]:
    g, w = p.forward, _Words()
    saved, saved_rows = (p.saved, p.saved_rows) if save else ((), ())
    w.saved, w.saved_rows = len(saved), len(saved_rows)
    steps = p.gates
    after = steps + len(p.steps)
    kept = after + len(p.states)
    kept_rows = kept + len(saved)
    w.memories = kept_rows + len(saved_rows) + keep_first
    w.keep_first = keep_first
    w.padded = [after + k for k in range(len(p.states))]
    roots = [*p.new, *saved, *saved_rows]
    levels = levels_of(g, roots)
    used = _used_products(g, levels)
    number = {name: k for k, (name, _) in enumerate(p.weights)}
    state_of = {g.index_of(Input(s, 0, UNIT)): k for k, s in enumerate(p.states)}
    folded = _folded(p, levels, used)
    stores = []
    numbers = {old: new for new, old in enumerate(used)}
    for old in used:
        product = g.products[old]
        (operand,) = product.operands
        made = _Product(number[product.weight], product.blocks, False, state=state_of.get(operand, -1))
        added = sum(1 << k for q, k in folded.values() if q == numbers[old])
        if added:
            made.adds, made.added = 0, added
        made.bias = w.bias(bool(product.bias and biases & B_HH), added if biases & B_IH else 0)
        if made.state < 0:
            stores.append(Store(operand, Spot("operand", numbers[old])))
        w.products.append(made)
    for k, n in enumerate(p.new):
        stores.append(Store(n, Spot("state_out", k), also=after + k))
    stores += [Store(n, Spot("memory", kept + k)) for k, n in enumerate(saved)]
    stores += [Store(n, Spot("memory_row", kept_rows + k)) for k, n in enumerate(saved_rows)]
    if keep_first:
        stores.append(Store(p.new[0], Spot("memory", w.memories - 1)))
    gx = {Input("gx", k, UNIT): Spot("memory", k) for k in range(p.gates)}
    inputs = {**gx, **_step_memories(p, steps)}
    inputs |= {Input(s, 0, UNIT): Spot("state_in", k) for k, s in enumerate(p.states)}
    inputs |= {Input(s, 0, UNIT): w.unit(False, k) for k, s in enumerate(p.units) if _reads(g, levels, s)}
    alone = {x for n in levels if n not in folded for x in g.nodes[n].args} | {s.node for s in stores}
    read = [i for i in gx if g.index_of(i) in alone]
    biased = {i: w.unit(True, i.block) for i in read} if biases & B_IH else {}
    at = _product_levels(g, levels, numbers)
    return w, Schedule(g, p.hidden, inputs, stores, folded, biased, numbers, at)


def _reads(g: Graph, levels: dict[int, int], name: str, block: int = 0) -> bool:
    n = g.index_of(Input(name, block, UNIT))
    return n is not None and n in levels


def _folded(p: CellProgram, levels: dict[int, int], used: list[int]) -> dict[int, tuple[int, int]]:
    """The sums of a block of gx and one of a product where nobody wants that product alone: its end makes them."""
    g = p.forward
    readers: dict[int, list[int]] = {}
    for n in levels:
        for x in g.nodes[n].args:
            readers.setdefault(x, []).append(n)
    roots = {*p.new, *p.saved, *p.saved_rows} | {x for product in g.products for x in product.operands}
    folded: dict[int, tuple[int, int]] = {}
    for new, old in enumerate(used):
        for k in range(p.gates if g.products[old].blocks == p.gates else 0):
            result, gx = g.index_of_product(old, k), g.index_of(Input("gx", k, UNIT))
            sums = readers.get(result, []) if result is not None else []
            if gx is None or len(sums) != 1 or result in roots or sums[0] in folded:
                continue
            node = g.nodes[sums[0]]
            if node.op == "add" and set(node.args) == {gx, result}:
                folded[sums[0]] = new, k
    return folded


@functools.lru_cache(maxsize=256)
def backward_words(key: ProgramKey, half: bool) -> bytes:
    """The backward. `half`: whether what is stored has another type than what products read."""
    return _encode(key.program, *_backward(key.program, half))


def _backward(p: CellProgram, half: bool) -> tuple[_Words, Schedule]:
    g, w = p.backward.copy(), _Words()
    w.saved, w.saved_rows = len(p.saved), len(p.saved_rows)
    kept = len(p.steps)
    kept_rows = kept + len(p.saved)
    after = kept_rows + len(p.saved_rows)
    dgx = after + len(p.states)
    dsteps = dgx + p.gates
    dys = dsteps + len(p.steps)
    zero = g.const(0)
    d_gx = tuple(zero if n is None else n for n in p.d_gx)
    number = {name: k for k, (name, _) in enumerate(p.weights)}
    stores = [Store(n, Spot("memory", dgx + k)) for k, n in enumerate(d_gx)]
    memory_of = {d_gx: dgx}  # where blocks of gradients stand, side by side
    for name, given, operand in p.d_products:
        dy = tuple(zero if n is None else n for n in given)
        if dy not in memory_of:
            memory_of[dy] = dys + w.dys
            w.dys += len(dy)
        grad = _WeightGrad(number[name], memory_of[dy])
        leaf = g.nodes[operand]
        if leaf.op == "input" and leaf.data.name in p.states and not (half and leaf.data.name != p.states[0]):  # type: ignore[attr-defined]
            grad.state = p.states.index(leaf.data.name)  # type: ignore[attr-defined]
        w.grads.append(grad)
    first_operand = dys + w.dys
    for grad, (_, _, operand) in zip(w.grads, p.d_products, strict=True):
        if grad.state < 0:
            grad.memory = first_operand + w.operands
            stores.append(Store(operand, Spot("memory", grad.memory)))
            w.operands += 1
    w.memories = first_operand + w.operands
    roots = [s.node for s in stores]
    roots += [n for n in (*p.d_states, *p.d_units, *p.d_steps) if n is not None]
    roots += [n for dy in memory_of for n in dy]
    levels = levels_of(g, roots)
    used = _used_products(g, levels)
    numbers = {old: new for new, old in enumerate(used)}
    at = _product_levels(g, levels, numbers)
    held = {dy for dy in memory_of if dy != d_gx}
    for old in used:
        product = g.products[old]
        made = _Product(number[product.weight], product.blocks, True)
        where = memory_of.get(product.operands)
        if where is not None and not half:
            made.memory = where
        else:
            for k, n in enumerate(product.operands):
                stores.append(Store(n, Spot("operand", numbers[old], k)))
        w.products.append(made)
    for dy in held:
        stores += [Store(n, Spot("memory", memory_of[dy] + k)) for k, n in enumerate(dy)]
    others = {x for dy in memory_of for x in dy} | {n for n in (*p.d_units, *p.d_steps) if n is not None}
    stores += _state_gradients(p, g, w, levels, at, numbers, others)
    stores += [
        Store(n, Spot("memory_row" if kind == ROW else "memory", dsteps + k))
        for k, (n, (_, kind, _)) in enumerate(zip(p.d_steps, p.steps, strict=True))
        if n is not None
    ]
    inputs = _step_memories(p, 0)
    inputs |= {Input(s, 0, UNIT): Spot("before", k) for k, s in enumerate(p.states)}
    inputs |= {Input(f"new_{s}", 0, UNIT): Spot("memory", after + k) for k, s in enumerate(p.states)}
    inputs |= {Input(f"d_{s}", 0, UNIT): Spot("d_state", k) for k, s in enumerate(p.states)}
    inputs |= {Input("saved", k, UNIT): Spot("memory", kept + k) for k in range(len(p.saved))}
    inputs |= {Input("saved_row", k, ROW): Spot("memory_row", kept_rows + k) for k in range(len(p.saved_rows))}
    for k, s in enumerate(p.units):
        if _reads(g, levels, s) or p.d_units[k] is not None:
            inputs[Input(s, 0, UNIT)] = w.unit(False, k)
    for k, d in enumerate(p.d_units):
        if d is not None:
            stores.append(Store(d, Spot("d_unit", w.unit(False, k).number), adds=True))
    w.needs = tuple(s in p.needs for s in p.states)
    w.padded = [*range(dgx, dgx + p.gates), *range(dys, first_operand)]
    w.padded += [-1 - (dsteps + k) if kind == ROW else dsteps + k for k, (_, kind, _) in enumerate(p.steps)]
    stores = [_copied(g, inputs, store) for store in stores]
    return w, Schedule(g, p.hidden, inputs, stores, {}, {}, numbers, at)


def _copied(g: Graph, inputs: dict[Input, Spot], store: Store) -> Store:
    """A state's gradient that goes elsewhere as it arrived is copied, for a store is no read: another would overwrite
    it first."""
    node = g.nodes[store.node]
    spot = inputs[node.data] if node.op == "input" else store.spot  # type: ignore[index]
    if spot.place != "d_state" or spot == store.spot:
        return store
    return store._replace(node=g.make("stop", (store.node,)))


def _state_gradients(
    p: CellProgram,
    g: Graph,
    w: _Words,
    levels: dict[int, int],
    at: dict[int, int],
    numbers: dict[int, int],
    others: set[int],
) -> list[Store]:
    """Where the gradients of the states before the step go. One that is a product, or a sum with one, that product
    writes itself, if nobody else wants it and nobody reads the gradient that arrived any more."""
    readers: dict[int, list[int]] = {}
    for n in levels:
        for x in g.nodes[n].args:
            readers.setdefault(x, []).append(n)
    stores = []
    for s, given in enumerate(p.d_states):
        root = g.const(0) if given is None else given
        levels.setdefault(root, 0)
        node, spot = g.nodes[root], Spot("d_state", s)
        arrived = g.index_of(Input(f"d_{p.states[s]}", 0, UNIT))
        until = max((levels[n] for n in readers.get(arrived, [])), default=0) if arrived is not None else 0
        wanted = p.d_states.count(given) > 1 or root in readers or root in others
        parts = () if wanted else (root,) if node.op == "product" else node.args if node.op == "add" else ()
        for product in parts:
            if (
                g.nodes[product].op != "product"
                or product in others
                or (product != root and product in p.d_states)
                or len(readers.get(product, [])) > (product != root)
            ):
                continue
            number = numbers[g.nodes[product].data[0]]  # type: ignore[index]
            rest = [x for x in parts if x != product]
            early = all(levels[x] < at[number] and g.kind(x) == UNIT for x in rest) and until < at[number]
            if early and w.products[number].into < 0:
                w.products[number].into, w.products[number].accumulates = s, bool(rest)
                stores += [Store(x, spot) for x in rest]
                break
        else:
            stores.append(Store(root, spot))
    return stores


def _encode(p: CellProgram, w: _Words, schedule: Schedule) -> bytes:
    words: list[int] = [p.gates, len(p.states), len(p.units), len(p.weights)]
    words += [blocks for _, blocks in p.weights]
    words += [bool(p.weights) and p.weights[0][0] == "w_hh"]
    words += [len(p.steps), *(kind == ROW for _, kind, _ in p.steps)]
    words += [w.saved, w.saved_rows, w.keep_first, len(w.units), *(x for unit in w.units for x in unit)]
    words += [len(w.biases), *(x for bias in w.biases for x in bias), w.dys, w.operands, len(w.grads)]
    for grad in w.grads:
        words += [grad.weight, grad.dy, grad.state, grad.memory]
    words += [*(w.needs or (False,) * len(p.states)), len(w.padded), *w.padded]

    units, rows = schedule.most["unit"], schedule.most["row"]
    words += [len(p.states), len(p.weights), len(w.biases), len(w.units), w.memories]
    words += [len(schedule.crossings), len(schedule.row_crossings), units, rows]
    words += [len(schedule.constants), *(struct.unpack("<q", struct.pack("<d", v))[0] for v in schedule.constants)]
    words += [len(w.products)]
    for q in w.products:
        words += [q.weight, q.blocks, q.transposed, q.state, q.memory, q.adds, q.added, q.bias, q.into, q.accumulates]
    words += [len(schedule.spans)]
    own = units + rows + len(schedule.constants) + len(w.units)
    first = {"unit": 0, "row": units, "const": units + rows, "parameter": units + rows + len(schedule.constants)}
    for span in schedule.spans:
        words += [len(span.products), *span.products, len(span.operands)]
        places = {spot: own + k for k, spot in enumerate(span.operands)}
        for spot, operand in span.operands.items():
            words += [_PLACE[spot.place], spot.number, spot.block, operand.load, operand.store, operand.also]
        words += [len(span.code)]
        for i in span.code:
            found = [places.get(s, first.get(s.place, 0) + s.number) for s in (i.to, *i.args)]
            words += [_OP[i.op], *found, *(found[1],) * (4 - len(found)), i.row]
    return struct.pack(f"<{len(words)}q", *(int(v) for v in words))


class Counts(NamedTuple):
    """One step of a program in numbers."""

    instructions: int
    products: int
    """With a weight of the recurrence, whatever its blocks."""
    row_sums: int
    """Sums and maxima over the units of a row."""
    barriers: int
    """Where the threads of the engine wait for one another: as a step begins, and behind each span."""


def counts(p: CellProgram, biases: int, half: bool = False) -> tuple[Counts, Counts]:
    """Of the forward that a training step runs and of its backward, as the CPU engine is given them."""
    return _counted(*_forward(p, True, biases)), _counted(*_backward(p, half))


def _counted(w: _Words, schedule: Schedule) -> Counts:
    code = [i.op for span in schedule.spans for i in span.code]
    sums = sum(op in ("row_sum", "row_max") for op in code)
    return Counts(len(code), len(w.products), sums, 1 + len(schedule.spans))


class ProgramKey:
    """A program as the key of what is made of it: by identity, since it never changes."""

    __slots__ = ("program",)

    def __init__(self, program: CellProgram) -> None:
        self.program = program

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProgramKey) and other.program is self.program

    def __hash__(self) -> int:
        return id(self.program)
