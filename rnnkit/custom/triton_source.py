"""A CellProgram as the text of Triton kernels: one kernel for what lies between two products of a step.

The text is made in memory from the checked graph. Every name in it is made here, v0, v1, ... for values and a letter
and a number for memory, so nothing that a user calls anything gets into it. A kernel's program owns whole rows, so sums
over a row stay inside; what a later kernel of the step reads crosses in memory, unless it is cheaply made again. The
functions that the text calls are in rnnkit/kernels/pointwise.py.

Memory, by letter; T and n steps (all, and those of a chunk), B rows, H units, K and R what is saved per unit and row:

    s, short    states [B, H], and again in the type in which products read them
    a, out      states after each step [T, B, H]; the first rounded, where a is not
    h, r        states before the first step, and at a reset
    p, x        parameters per unit [H]; inputs of each step, with their strides xt and xr
    q, o        results of products, operands of products [B, blocks·H]
    e, f        what crosses from one kernel to another [B, ·], per unit and per row
    gx          [n, B, G·H]
    saved, kept [n, B, K·H], [n, B, R]
    Backward: g gradients of a; d of the states; dr of r; y of products' results [n, B, blocks·H], y0 that of gx;
    w products' operands [n, B, H]; du parameters per unit [B, U·H]; dx inputs of each step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .graph import CONST, ROW, ROW_SUMS, UNIT, CellProgram, Graph, Input
from .spans import constant_value, levels_of

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
COMPARED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
CALLED = {
    **{op: f"tl.{op}" for op in ("abs", "exp", "log", "sqrt", "sin", "cos", "erf", "floor")},
    **{op: op for op in ("sigmoid", "tanh", "relu", "expm1", "log1p", "rsqrt", "maximum", "minimum")},
    "round": "nearest",
}
HEAD = '''"""Generated from the step of a cell."""
import triton
import triton.language as tl

from rnnkit.kernels.pointwise import (
    busy, carry, even_power, expm1, give_back, is_cut, length_of, log1p, maximum, minimum, nearest, odd_power, power,
    previous, read, read_product, read_row, read_units, relu, row_max, row_sum, rows, rsqrt, sigmoid, square, tanh,
    write, write_row,
)
'''
SIZES = ("t", "j", "more", "total", "reverse", "B")
CONSTEXPRS = ("HEADS", "F", "BLOCK_B", "BLOCK_H")


@dataclass
class Launch:
    """Products of the graph, by number, and then a kernel, where there is anything to compute."""

    products: list[int]
    kernel: str | None = None


@dataclass
class Side:
    """Of forward or backward: what is launched in a step, and how many values cross between its kernels."""

    launches: list[Launch] = field(default_factory=list)
    crossings: int = 0
    row_crossings: int = 0
    operands: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of a product: the nodes of which its operand is stored."""


@dataclass
class Source:
    """The text of a program's kernels, and how they are called."""

    text: str
    forward: Side
    backward: Side
    of_state: dict[int, int]
    """Of a product of the forward: the state that is its operand, where one is."""
    given: list[tuple[int, ...]]
    """The gradients of products' results, groups of blocks; the first is that of gx."""
    in_place: dict[int, int]
    """Of a product of the backward: the group that is its operand."""
    operands: list[int]
    """Of weights' gradients: nodes of the backward."""
    weight_grads: list[tuple[str, int, int]]
    """A weight, the group and the operand whose product its gradient is."""


def source_of(p: CellProgram) -> Source:
    back = p.backward.copy()
    groups: list[tuple[int, ...]] = [tuple(_or_zero(back, n) for n in p.d_gx)]
    operands: list[int] = []
    grads = []
    for name, given, operand in p.d_products:
        group = tuple(_or_zero(back, n) for n in given)
        groups += [group] if group not in groups else []
        operands += [operand] if operand not in operands else []
        grads.append((name, groups.index(group), operands.index(operand)))
    states = {p.forward.index_of(Input(s, 0, UNIT)): k for k, s in enumerate(p.states)}
    of_state = {k: states[q.operands[0]] for k, q in enumerate(p.forward.products) if q.operands[0] in states}
    in_place = {k: groups.index(q.operands) for k, q in enumerate(back.products) if q.operands in groups}
    forward = _Forward(p, of_state)
    backward = _Backward(p, back, groups, operands)
    text = "\n".join([HEAD, *forward.kernels(), *backward.kernels()])
    return Source(text, forward.side, backward.side, of_state, groups, in_place, operands, grads)


def _or_zero(g: Graph, n: int | None) -> int:
    return g.const(0.0) if n is None else n


_MULTIPLIED = 64
"""The largest whole exponent of which the power is made of squares: each of them doubles the error."""


def _multiplied(x: str, exponent: int) -> str:
    if exponent == 1:
        return x
    half = f"square({_multiplied(x, exponent // 2)})"
    return f"{half} * {x}" if exponent % 2 else half


class _Text:
    """The kernels of one graph. A subclass says where its leaves stand, and writes its roots.

    Span k is what lies behind the products of level k. ends: the states after a step, or their gradients before it.
    """

    way = ""

    def __init__(
        self, p: CellProgram, g: Graph, roots: Iterable[int], ends: Sequence[int], stored: Iterable[int]
    ) -> None:
        """stored: the products whose operands kernels write."""
        self.p, self.g, self.hidden, self.ends = p, g, p.hidden, ends
        self.side = Side()
        self.state = {s: k for k, s in enumerate(p.states)}
        self.unit = {s: k for k, s in enumerate(p.units)}
        self.step = {name: k for k, (name, _, _) in enumerate(p.steps)}
        roots = sorted(set(roots))
        levels = levels_of(g, [*roots, *ends])
        used = sorted({g.nodes[n].data[0] for n in levels if g.nodes[n].op == "product"})  # type: ignore[index]
        self.at = {q: 1 + max(levels[x] for x in g.products[q].operands) for q in used}
        self.last = max(self.at.values(), default=0)
        self.side.operands = {q: g.products[q].operands for q in used if q in set(stored)}
        before = {self.at[q] - 1 for q in self.side.operands}
        self.spans = [k for k in range(self.last + 1) if k in before or k == self.last]
        self.due = {n: self._span(levels[n]) for n in roots}
        """The kernel that writes a root: the first that can."""
        self.end_at = [self._span(levels[n]) for n in ends]
        while self._share_out():
            pass

    def _span(self, level: int) -> int:
        return min(k for k in self.spans if k >= level)

    def _share_out(self) -> bool:
        """Which values each kernel has: what is made goes to the first that wants it; from there it crosses to others,
        if it is not cheap. True: an end has to wait for a kernel that reads what stands there, so all anew."""
        self.home: dict[int, int] = {}
        self.made: dict[int, list[int]] = {}
        self.crossings: dict[int, int] = {}
        self.row_crossings: dict[int, int] = {}
        for k in self.spans:
            stack = [n for q, nodes in self.side.operands.items() if self.at[q] == k + 1 for n in nodes]
            stack += [n for n, due in self.due.items() if due == k]
            stack += [n for n, due in zip(self.ends, self.end_at, strict=True) if due == k]
            seen: set[int] = set()
            while stack:
                n = stack.pop()
                if n in seen or self.g.kind(n) == CONST:
                    continue
                seen.add(n)
                if self._crosses(n, k):
                    table = self.row_crossings if self.g.kind(n) == ROW else self.crossings
                    table.setdefault(n, len(table))
                elif self._computed(n):
                    self.home.setdefault(n, k)
                    stack.extend(self.g.nodes[n].args)
            self.made[k] = sorted(seen)
        late = {s: k for k in self.spans for s in range(len(self.ends)) if self.read_of(s) in self.made[k]}
        self.end_at, before = [max(k, late.get(s, 0)) for s, k in enumerate(self.end_at)], self.end_at
        self.side.crossings, self.side.row_crossings = len(self.crossings), len(self.row_crossings)
        return self.end_at != before

    def _crosses(self, n: int, k: int) -> bool:
        return self.home.get(n, k) < k and not self._cheap(n)

    def _computed(self, n: int) -> bool:
        return self.g.nodes[n].op not in ("input", "product")

    def _cheap(self, n: int, depth: int = 2) -> bool:
        """Whether a later span makes it again."""
        if not self._computed(n) or self.g.kind(n) == CONST:
            return True
        node = self.g.nodes[n]
        return (
            depth > 0 and node.op in ("add", "sub", "mul", "neg") and all(self._cheap(x, depth - 1) for x in node.args)
        )

    def kernels(self) -> list[str]:
        found = []
        for k in range(self.last + 1):
            launch = Launch(sorted(q for q, at in self.at.items() if at == k))
            if k in self.spans:
                launch.kernel = f"{self.way}_{k}"
                found.append(self._kernel(launch.kernel, self._body(k)))
            if launch.products or launch.kernel:
                self.side.launches.append(launch)
        return found

    def _kernel(self, name: str, body: list[str]) -> str:
        text = "\n".join("    " + line for line in body)
        words = set(re.findall(r"\w+", text))
        sizes = [*SIZES, *(m for m in self.strides() if m in words)]
        arguments = [*(m for m in self.memory() if m in words), *sizes, *(f"{c}: tl.constexpr" for c in CONSTEXPRS)]
        return f"\n\n@triton.jit(do_not_specialize={sizes})\ndef {name}({', '.join(arguments)}):\n{text}"

    def memory(self) -> list[str]:
        p, n = self.p, len(self.p.states)
        count = {"s": n, "short": n, "a": n, "h": n, "r": n, "p": len(p.units), "x": len(p.steps)}
        count |= {"q": len(self.g.products), "o": len(self.g.products)}
        found = ["gx", "b_hh", "lengths", "reset", "saved", "kept", "out", "e", "f"]
        return found + [f"{letter}{k}" for letter, many in count.items() for k in range(many)]

    def strides(self) -> list[str]:
        return [f"{name}{k}" for name in ("xt", "xr") for k in range(len(self.p.steps))]

    def _body(self, k: int) -> list[str]:
        """A kernel's lines."""
        h, made = self.hidden, self.made[k]
        values = [f"v{n} = {self._crossing(n) if self._crosses(n, k) else self._value(n)}" for n in made]
        stores = self.stores(k)
        for n in made:
            if n in self.crossings and self.home[n] == k:
                stores.append(f"write(e, {self._crossing_at(n)}, unit, valid, v{n})")
            if n in self.row_crossings and self.home[n] == k:
                stores.append(f"write_row(f, {self._crossing_at(n)}, row < B, v{n})")
        for q, nodes in self.side.operands.items():
            for block, n in enumerate(nodes if self.at[q] == k + 1 else ()):
                at = f"row * {len(nodes) * h} + {block * h}"
                stores.append(f"write(o{q}, {at}, unit, valid, {self.masked(n)})")
        return [
            "row, unit = rows(BLOCK_B), tl.arange(0, BLOCK_H)",
            f"inside = (unit < {h})[None, :]",
            "valid = (row < B)[:, None] & inside",
            "t = tl.full((), 0, tl.int64) + t",
            "at = (tl.full((), 0, tl.int64) + j) * B + row",
            f"now = (t * B + row) * {h}",
            "length = length_of(lengths, row, total, B)",
            "lives = t < length",
            "live = lives[:, None] & inside",
            *self.start(k),
            *values,
            *stores,
        ]

    def _crossing_at(self, n: int) -> str:
        if n in self.row_crossings:
            return f"row * {len(self.row_crossings)} + {self.row_crossings[n]}"
        return f"row * {len(self.crossings) * self.hidden} + {self.crossings[n] * self.hidden}"

    def _crossing(self, n: int) -> str:
        if n in self.row_crossings:
            return f"read_row(f, {self._crossing_at(n)}, row < B, F)"
        return f"read(e, {self._crossing_at(n)}, unit, valid, F)"

    def name(self, n: int) -> str:
        """A value where it is used."""
        return self._number(constant_value(self.g, n, self.hidden)) if self.g.kind(n) == CONST else f"v{n}"

    def masked(self, n: int) -> str:
        """A value as an operand."""
        return self.name(n)

    @staticmethod
    def _number(value: float) -> str:
        return f"tl.full((), {value!r}, F)" if math.isfinite(value) else f'tl.full((), float("{value!r}"), F)'

    def _value(self, n: int) -> str:
        """How a value is loaded or computed."""
        node, g = self.g.nodes[n], self.g
        if node.op == "input":
            return self.leaf(node.data)  # type: ignore[arg-type]
        if node.op == "product":
            q, block = self._result(n)
            bias, blocks = "b_hh" if g.products[q].bias else "None", g.products[q].results
            where = f"row, unit, live, inside, {block}, B, {self.hidden}, {blocks}, HEADS, F"
            return f"read_product(q{q}, {bias}, {where})"
        a = [self.name(x) for x in node.args]
        if node.op in ROW_SUMS:
            if g.kind(node.args[0]) != UNIT:  # H equal numbers
                return f"{a[0]} * {self._number(self.hidden)}" if node.op == "rowsum" else a[0]
            return f"{'row_sum' if node.op == 'rowsum' else 'row_max'}({a[0]}, inside)"
        if node.op in INFIX:
            return f"{a[0]} {INFIX[node.op]} {a[1]}"
        if node.op in COMPARED:
            return f"({a[0]} {COMPARED[node.op]} {a[1]}).to(F)"
        if node.op == "where":
            return f"tl.where({a[0]} != 0, {a[1]}, {a[2]})"
        if node.op == "neg":
            return f"-{a[0]}"
        if node.op == "stop":
            return a[0]
        if node.op == "reciprocal":
            return f"1.0 / {a[0]}"
        if node.op == "pow":
            return self._power(a[0], constant_value(self.g, node.args[1], self.hidden))
        return f"{CALLED[node.op]}({', '.join(a)})"

    def _result(self, n: int) -> tuple[int, int]:
        """A product, and the block of its result."""
        data = self.g.nodes[n].data
        assert isinstance(data, tuple)
        return int(data[0]), int(data[1])

    def _power(self, x: str, exponent: float) -> str:
        if not math.isfinite(exponent) or exponent != int(exponent):
            return f"power({x}, {self._number(exponent)})"
        if abs(exponent) > _MULTIPLIED:
            return f"{'odd' if exponent % 2 else 'even'}_power({x}, {self._number(exponent)})"
        text = _multiplied(x, int(abs(exponent)))
        return text if exponent > 0 else f"1.0 / ({text})"

    def shared_leaf(self, x: Input) -> str | None:
        """Leaves of forward and backward alike."""
        if x.name in self.unit:
            return f"read_units(p{self.unit[x.name]}, unit, inside, F)"
        if x.name in self.step:
            k = self.step[x.name]
            at = f"t * xt{k} + row * xr{k}"
            return f"read_row(x{k}, {at}, lives, F)" if x.kind == ROW else f"read(x{k}, {at}, unit, live, F)"
        return None

    # Of a subclass.

    def read_of(self, s: int) -> int | None:
        """The leaf that reads what an end is written over; None where that is written last anyway."""
        raise NotImplementedError

    def start(self, k: int) -> list[str]:
        raise NotImplementedError

    def stores(self, k: int) -> list[str]:
        raise NotImplementedError

    def leaf(self, x: Input) -> str:
        raise NotImplementedError


class _Forward(_Text):
    way = "forward"

    def __init__(self, p: CellProgram, of_state: dict[int, int]) -> None:
        stored = [k for k in range(len(p.forward.products)) if k not in of_state]
        super().__init__(p, p.forward, [*p.saved, *p.saved_rows], p.new, stored)

    def _share_out(self) -> bool:
        self.end_at = [self.last] * len(self.ends)
        return super()._share_out()

    def read_of(self, s: int) -> int | None:
        return None

    def start(self, k: int) -> list[str]:
        states = range(len(self.ends) if k == self.last else 0)
        return [f"old{s} = read(s{s}, row * {self.hidden}, unit, valid, F)" for s in states]

    def leaf(self, x: Input) -> str:
        h = self.hidden
        if x.name == "gx":
            return f"read(gx, at * {self.p.gates * h} + {x.block * h}, unit, live, F)"
        if x.name in self.state:
            return f"read(s{self.state[x.name]}, row * {h}, unit, live, F)"
        found = self.shared_leaf(x)
        assert found is not None, x
        return found

    def stores(self, k: int) -> list[str]:
        p, h = self.p, self.hidden
        found = []
        for block, n in enumerate(p.saved):
            if self.due[n] == k:
                found.append(f"write(saved, at * {len(p.saved) * h} + {block * h}, unit, live, {self.name(n)})")
        for block, n in enumerate(p.saved_rows):
            if self.due[n] == k:
                found.append(f"write_row(kept, at * {len(p.saved_rows)} + {block}, lives, {self.name(n)})")
        where = f"reset, t, more, row, unit, live, valid, length, B, reverse, {h}, F"
        for s, n in enumerate(p.new if k == self.last else ()):
            found += [
                f"new{s} = tl.broadcast_to({self.name(n)}, BLOCK_B, BLOCK_H)",
                f"after{s} = tl.where(live, new{s}, 0.0)",
                f"write(a{s}, now, unit, valid, after{s})",
                *(["write(out, now, unit, valid, after0)"] if s == 0 else []),
                f"carry(s{s}, short{s}, new{s}, old{s}, r{s}, {where})",
            ]
        return found


class _Backward(_Text):
    way = "backward"

    def __init__(self, p: CellProgram, g: Graph, groups: list[tuple[int, ...]], operands: list[int]) -> None:
        self.groups, self.operands = groups, operands
        roots = [n for n in (*p.d_units, *p.d_steps) if n is not None]
        roots += [*operands, *(n for group in groups for n in group)]
        super().__init__(p, g, roots, [_or_zero(g, n) for n in p.d_states], range(len(g.products)))

    def memory(self) -> list[str]:
        p, n = self.p, len(self.p.states)
        count = {"g": n, "d": n, "dr": n, "y": len(self.groups), "w": len(self.operands), "dx": len(p.steps)}
        found = [*super().memory(), "du", "awake"]
        return found + [f"{letter}{k}" for letter, many in count.items() for k in range(many)]

    def read_of(self, s: int) -> int | None:
        return self.g.index_of(Input(f"d_{self.p.states[s]}", 0, UNIT))

    def start(self, k: int) -> list[str]:
        """What has arrived at each state, and which rows it concerns: the first kernel tells the others."""
        lines, first = [], k == self.spans[0]
        for s in range(len(self.ends)):
            came = first or self.read_of(s) in self.made[k]
            if came or self.end_at[s] == k:
                lines.append(f"old{s} = read(d{s}, row * {self.hidden}, unit, valid, F)")
            if came:
                lines += [
                    f"came{s} = tl.where(live, old{s}, 0.0)",
                    f"if g{s} is not None:",
                    f"    came{s} += read(g{s}, now, unit, live, F)",
                ]
        lines += ["woken = lives", "if lengths is not None or reset is not None:"]
        if first:
            lines.append(f"    woken = lives & ({' | '.join(f'busy(came{s})' for s in range(len(self.ends)))})")
            if len(self.spans) > 1:
                lines.append("    tl.store(awake + row, woken.to(tl.int32), mask=row < B)")
        else:
            lines.append("    woken = tl.load(awake + row, mask=row < B, other=0) != 0")
        return [*lines, "good = woken[:, None] & inside"]

    def leaf(self, x: Input) -> str:
        p, h = self.p, self.hidden
        if x.name in self.state:
            s = self.state[x.name]
            return f"previous(a{s}, h{s}, r{s}, reset, t, row, unit, live, length, B, reverse, {h}, F)"
        if x.name.startswith("new_") and x.name[4:] in self.state:
            return f"read(a{self.state[x.name[4:]]}, now, unit, live, F)"
        if x.name.startswith("d_") and x.name[2:] in self.state:
            return f"came{self.state[x.name[2:]]}"
        found = self.shared_leaf(x)
        if found is not None:
            return found
        if x.name == "saved":
            return f"read(saved, at * {len(p.saved) * h} + {x.block * h}, unit, live, F)"
        return f"read_row(kept, at * {len(p.saved_rows)} + {x.block}, lives, F)"

    def masked(self, n: int) -> str:
        """Zero in rows that no gradient reached."""
        return f"tl.where(good, {self.name(n)}, 0.0)"

    def stores(self, k: int) -> list[str]:
        p, h, found = self.p, self.hidden, []

        def unit(n: int, to: str) -> None:
            if self.due[n] == k:
                found.append(f"write({to}, unit, valid, {self.masked(n)})")

        for i, group in enumerate(self.groups):
            for block, n in enumerate(group):
                unit(n, f"y{i}, at * {len(group) * h} + {block * h}")
        for i, n in enumerate(self.operands):
            unit(n, f"w{i}, at * {h}")
        for i, d in enumerate(p.d_units):
            if d is not None and self.due[d] == k:
                at = f"row * {len(p.units) * h} + {i * h}"
                found.append(f"write(du, {at}, unit, valid, read(du, {at}, unit, valid, F) + {self.masked(d)})")
        for i, (d, (_, kind, _)) in enumerate(zip(p.d_steps, p.steps, strict=True)):
            if d is not None and kind == UNIT:
                unit(d, f"dx{i}, now")
            elif d is not None and self.due[d] == k:
                value = f"tl.where(woken[:, None], {self.name(d)}, 0.0)"
                found.append(f"write_row(dx{i}, t * B + row, row < B, {value})")
        where = f"reset, t, row, unit, live, good, valid, length, B, reverse, {h}, F"
        for s, n in enumerate(self.ends):
            if self.end_at[s] == k:
                found.append(f"give_back(d{s}, dr{s}, {self.name(n)}, old{s}, {where})")
        return found
