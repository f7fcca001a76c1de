"""A user's step as a graph: the step is run once on tensors that hold no numbers and note what is asked of them.

Each tensor of the trace has a shape, a dtype and no memory, and knows which values of the graph it is made of: a block
[H] of its last dimension is one value per unit, any other element one value per row. What only moves values (chunk,
slices, cat, expand, ...) is done by torch on numbers that name them, whatever it is called; a result that tears a block
apart is refused.
"""

from __future__ import annotations

import inspect
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rnnkit.custom.errors import NotTraced, StepError
from rnnkit.custom.graph import ROW, UNIT, Graph, Product
from rnnkit.custom.term import Term


@dataclass(frozen=True)
class Traced:
    """A step as a graph."""

    graph: Graph
    new: tuple[int, ...]
    """The states after the step."""
    uses_w_hh: bool


_BATCH, _ROWS = 1 << 40, 1 << 39
_MOST = 64
"""Values per row that a tensor may hold."""


class Value(Tensor):
    """A tensor of the trace. `nodes`: its values, in order; a weight has none."""

    nodes: tuple[int, ...]
    weight: str | None
    turned: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


FEW, MANY = 13, 211
"""Rows of a trace, and of another, which would show a branch on their number."""


class Tracer(TorchFunctionMode):
    """While a step runs under it, what torch is asked becomes nodes of `graph`."""

    def __init__(self, hidden: int, dtype: torch.dtype, rows: int) -> None:
        super().__init__()
        self.graph, self.hidden, self.dtype = Graph(), hidden, dtype
        self.rows = rows  # a prime, so no multiple of H: a shape says which dimension is the batch
        self.products_of: dict[str, tuple[int, str | None]] = {}  # a weight's blocks and bias

    # --- tensors -------------------------------------------------------------------------------------------------

    def tensor(self, shape: Sequence[int], nodes: Sequence[int], dtype: torch.dtype | None = None) -> Value:
        value = torch.zeros((), dtype=dtype or self.dtype).expand(tuple(shape)).as_subclass(Value)
        value.nodes, value.weight, value.turned = tuple(nodes), None, False
        return value

    def weight(self, name: str, blocks: int, bias: str | None = None) -> Value:
        value = self.tensor((blocks * self.hidden, self.hidden), ())
        value.weight = name
        self.products_of[name] = blocks, bias
        return value

    def input(self, name: str, blocks: int, shape: Sequence[int], kind: str = UNIT) -> Value:
        return self.tensor(shape, [self.graph.input(name, k, kind) for k in range(blocks)])

    def as_value(self, x: Any, what: str = "") -> Value:
        if isinstance(x, Value):
            if x.weight is not None:
                raise NotTraced(
                    f"{what} of the weight {x.weight}: a weight may only be multiplied by, as F.linear(v, {x.weight})"
                )
            return x
        if isinstance(x, (bool, int, float)):
            return self.tensor((), [self.graph.const(x)], torch.bool if isinstance(x, bool) else None)
        if isinstance(x, Tensor):
            if x.numel() == 1 and not x.requires_grad:
                dtype = torch.bool if x.dtype == torch.bool else None
                return self.tensor(x.shape, [self.graph.const(x.item())], dtype)
            raise NotTraced(
                f"a tensor {self.shown(x)} from outside the step: declare it (per_unit, weight, per_step) and take it "
                "as an argument"
            )
        raise NotTraced(f"{what} with {type(x).__name__}: a step works on tensors and numbers")

    def names(self, x: Value) -> Tensor:
        """Numbers in the shape of x that name its values: k·H + u for unit u of block k, _ROWS + k for a value per
        row, and _BATCH · (r + 1) more in row r of the batch."""
        rest = x.shape[1:] if self.batched(x) else x.shape
        if self.by_unit(x):
            names = torch.arange(len(x.nodes) * self.hidden).view(rest)
        else:
            names = _ROWS + torch.arange(len(x.nodes)).view(rest)
        return names + self.tags(x.dim()) if self.batched(x) else names

    def tags(self, dimensions: int) -> Tensor:
        return (_BATCH * torch.arange(1, self.rows + 1)).view(self.rows, *[1] * (dimensions - 1))

    def batched(self, x: Tensor) -> bool:
        return x.dim() > 0 and x.shape[0] == self.rows

    def shown(self, x: Tensor) -> str:
        return f"[{', '.join('B' if d == self.rows else str(d) for d in x.shape)}]"

    def by_unit(self, x: Tensor) -> bool:
        return x.dim() > 0 and x.shape[-1] % self.hidden == 0 and not (x.dim() == 1 and self.batched(x))

    def moved(self, names: Tensor, nodes: Sequence[int], what: str, dtype: torch.dtype) -> Value:
        """The tensor whose values `names` names."""
        tag, name = names - names % _BATCH, names % _BATCH
        if self.batched(names):
            own = (tag == 0) | (tag == self.tags(names.dim()))
            if not bool(own.all()) or not bool((name == name[:1]).all()):
                raise NotTraced(f"{what}: it joins different rows of the batch, which a step may not")
            name = name[0]
        elif bool(tag.any()):
            raise NotTraced(f"{what}: its result {self.shown(names)} has not the batch as its first dimension")
        found: list[int] = []
        if self.by_unit(names):
            for block in name.reshape(-1, self.hidden):
                first = int(block[0])
                if first >= _ROWS and bool((block == first).all()):
                    found.append(nodes[first - _ROWS])
                elif first % self.hidden == 0 and torch.equal(block, torch.arange(first, first + self.hidden)):
                    found.append(nodes[first // self.hidden])
                else:
                    raise NotTraced(f"{what}: it takes blocks of H = {self.hidden} units apart; use whole blocks")
        else:
            if name.numel() > _MOST or bool((name < _ROWS).any()):
                raise NotTraced(
                    f"{what}: its result {self.shown(names)} is neither whole blocks of H = {self.hidden} units nor "
                    "one value for each row"
                )
            found = [nodes[int(k) - _ROWS] for k in name.reshape(-1)]
        return self.tensor(names.shape, found, dtype)

    def move(self, func: Callable[..., Any], args: Any, kwargs: Any, what: str) -> Any:
        """What only moves values, whatever its name."""
        nodes: list[int] = []
        dtypes: list[torch.dtype] = []

        def name(x: Any) -> Any:
            if isinstance(x, Tensor):
                x = self.as_value(x, what)
                at = len(nodes)
                nodes.extend(x.nodes)
                dtypes.append(x.dtype)
                names = self.names(x)
                return names + (at * self.hidden if self.by_unit(x) else at)
            if isinstance(x, (list, tuple)):
                return type(x)(name(y) for y in x)
            return x

        out = func(*name(args), **{k: name(v) for k, v in kwargs.items()})
        dtype = dtypes[0] if len(set(dtypes)) == 1 else self.dtype
        if isinstance(out, Tensor):
            return self.moved(out, nodes, what, dtype)
        return tuple(self.moved(x, nodes, what, dtype) for x in out)

    def expanded(self, x: Value, shape: torch.Size) -> tuple[int, ...]:
        """The values of x in a larger shape."""
        if x.shape == shape:
            return x.nodes
        if len(x.nodes) == 1 and x.dim() in (0, len(shape)):  # the same in each block; what follows would find it too
            rest = math.prod(shape[1:] if shape[:1] == (self.rows,) else shape)
            return x.nodes * (rest // self.hidden if shape[-1] % self.hidden == 0 else rest)
        return self.moved(self.names(x).expand(shape), x.nodes, "broadcasting", x.dtype).nodes

    # --- what handlers call ----------------------------------------------------------------------------------------

    def pointwise(self, formula: Callable[..., Term], *tensors: Any, dtype: torch.dtype | None = None) -> Value:
        values = [self.as_value(x, getattr(formula, "__name__", "")) for x in tensors]
        shape = torch.broadcast_tensors(*values)[0].shape  # torch.broadcast_shapes imports sympy
        parts = [self.expanded(v, shape) for v in values]
        made = [formula(*(Term(self.graph, n) for n in ns)).n for ns in zip(*parts, strict=True)]
        return self.tensor(shape, made, dtype)

    def rowwise(self, x: Any, dim: Any, what: str) -> list[list[Term]]:
        """The blocks that a reduction over the last dimension takes together."""
        x = self.as_value(x, what)
        if dim in (None, ()) and x.dim() == 1 and not self.batched(x):
            dim = -1
        if dim is None or dim == ():
            raise NotTraced(f"{what} over the whole tensor, the batch too: only the last dimension, -1, is a row's own")
        dims = [dim] if isinstance(dim, int) else list(dim)
        if {d % x.dim() for d in dims} != {x.dim() - 1}:
            raise NotTraced(f"{what} over dimension {dim} of {self.shown(x)}: only the last one, -1, is a row's own")
        terms = [Term(self.graph, n) for n in x.nodes]
        if not self.by_unit(x):
            raise NotTraced(f"{what} of one value a row, {self.shown(x)}")
        count = x.shape[-1] // self.hidden
        return [terms[k : k + count] for k in range(0, len(terms), count)]

    def reduced(self, x: Any, results: Sequence[Term], keepdim: bool) -> Value:
        shape = (*x.shape[:-1], 1) if keepdim else tuple(x.shape[:-1])
        return self.tensor(shape, [t.n for t in results])

    def product(self, x: Any, w: Value, what: str) -> Value:
        x = self.as_value(x, what)
        if x.shape[-1] != self.hidden or not self.by_unit(x) or len(x.nodes) != 1:
            raise NotTraced(
                f"{what}: {self.shown(x)} times the weight {w.weight} {list(w.shape)}; a product takes one block "
                f"[B, {self.hidden}]"
            )
        assert w.weight is not None
        if self.graph.kind(x.nodes[0]) != UNIT:
            raise NotTraced(f"{what}: the product of {w.weight} with what is the same in every unit")
        blocks, bias = self.products_of[w.weight]
        nodes = self.graph.product(Product(w.weight, blocks, x.nodes, bias=bias))
        return self.tensor((*x.shape[:-1], blocks * self.hidden), nodes)

    # --- torch's calls ---------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from rnnkit.custom.calls import call  # here, for it knows this class

        return call(self, func, args, kwargs or {})


def trace(
    step: Callable[..., Any],
    *,
    hidden: int,
    gates: int,
    states: Sequence[str],
    units: Sequence[str] = (),
    weights: Mapping[str, int] | None = None,
    steps: Mapping[str, tuple[str, bool]] | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    rows: int = FEW,
) -> Traced:
    """The graph of a step. `weights`: blocks of each declared one; `steps`: kind and whether a gradient is wanted.
    `rows`: those of its tensors, a prime."""
    weights, steps, options = dict(weights or {}), steps or {}, options or {}
    if hidden == 1:
        raise NotTraced("hidden_size 1: a value per unit and one per row look the same")
    t = Tracer(hidden, dtype, rows if rows != hidden else rows + 6)  # 13 and 19, 211 and 217: no multiple of the other
    given: dict[str, Any] = {}
    parameters = inspect.signature(step).parameters
    uses_w_hh = "a" in parameters or "gh" in parameters
    wide = (t.rows, gates * hidden)
    gx = t.input("gx", gates, wide)
    for s in states:
        given[s] = t.input(s, 1, (t.rows, hidden))
    for u in units:
        given[u] = t.input(u, 1, (hidden,))
    for name, blocks in weights.items():
        if name != "w_hh" or not uses_w_hh:
            given[name] = t.weight(name, blocks)
    for name, (kind, _) in steps.items():
        given[name] = t.input(name, 1, (t.rows, 1 if kind == ROW else hidden), kind)
    given.update(options)
    if uses_w_hh:
        gh = t.product(given[states[0]], t.weight("w_hh", gates, "b_hh"), "gh")
        given["gh"] = gh
        given["a"] = t.pointwise(lambda x, y: x + y, gx, gh)
    given["gx"] = gx
    try:
        with t:
            out = step(**{name: given[name] for name in parameters})
    except NotTraced as e:
        raise NotTraced(f"{e}{_where(e)}") from e
    new = results(out, states, t.rows, hidden)
    return Traced(t.graph, tuple(t.as_value(x, "a state").nodes[0] for x in new), uses_w_hh)


def _where(e: BaseException) -> str:
    """The line of the user's that asked for it."""
    not_own = os.path.dirname(__file__), os.path.dirname(torch.__file__)
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(e.__traceback__)]
    own = [(name, line) for name, line in lines if not name.startswith(not_own)]
    return f" (line {own[-1][1]} of {os.path.basename(own[-1][0])})" if own else ""


def results(out: Any, states: Sequence[str], rows: int, hidden: int) -> tuple[Tensor, ...]:
    """What a step returned, if that is its states."""
    listed = f"return {', '.join(states)}{',' if len(states) == 1 else ''}"
    if isinstance(out, Tensor) and len(states) == 1:
        out = (out,)
    if not isinstance(out, (tuple, list)):
        raise StepError(f"step returned {type(out).__name__}; it has to return the states after it: {listed}")
    if len(out) != len(states):
        raise StepError(f"step returned {len(out)} values, but the cell has {len(states)} states: {listed}")
    for name, x in zip(states, out, strict=True):
        if not isinstance(x, Tensor):
            raise StepError(f"step returned {type(x).__name__} for the state {name}, which is a tensor [B, {hidden}]")
        if tuple(x.shape) != (rows, hidden):
            shape = ", ".join("B" if d == rows else str(d) for d in x.shape)
            raise StepError(f"step returned [{shape}] for the state {name}, which is [B, {hidden}]")
        if not x.dtype.is_floating_point:
            raise StepError(f"step returned {x.dtype} for the state {name}; return numbers of its own dtype")
    return tuple(out)
