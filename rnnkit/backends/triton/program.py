"""Custom cells in Triton: kernels generated from a cell's program, step by step over a whole layer in one direction.

At each step torch makes the products with the recurrent weights, and a kernel does what lies between two of them.
Around the scan are one product for the projection of all time and one for each weight's gradient. States are carried in
float32 or wider. With `recompute` the backward makes what was saved again, a chunk of time after another.

T steps, B rows, G gates, H units, n heads.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import masks
from ...cells import compute_dtype
from ...custom.graph import ROW, CellProgram
from ...custom.inputs import CellInputs, CellOptions, CellOutputs
from ...custom.program import ProgramKey
from ...custom.triton_source import Launch, Side, Source, source_of
from .. import chunks
from . import backend
from .products import multiplies, multiply, outer

name = "triton"
takes_none_states = False
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_UNITS = 4096
TILE = 256
"""Values of a program's tile, unless a row has more."""
A_THREAD = 4
"""Values of a tile that a thread holds, as long as there are warps."""
MOST_WARPS = 16
_LANES = 32


def unsupported(program: CellProgram | None, device: str, dtype: torch.dtype, o: CellOptions) -> list[str]:
    """Why the kernels cannot run this layer; empty where they can. `program` None: before there is one."""
    why = backend.uninstalled()
    if why is not None:
        return [why]
    reasons = []
    wanted, words = ("cpu", "in Triton's interpreter runs") if backend.interpreted() else ("cuda", "runs")
    if device != wanted:
        reasons.append(f"{words} on the device {wanted}, got {device}")
    else:
        why = backend.missing()
        reasons += [why] if why is not None else []
    if dtype not in DTYPES:
        reasons.append(f"computes in float32, float64, bfloat16 and float16, got {dtype}")
    if program is not None and program.hidden > MOST_UNITS:
        reasons.append(
            f"holds a row's units in the registers of one program, at most {MOST_UNITS} of them, got {program.hidden}"
        )
    return reasons


# From a program to kernels.


class Kernels(NamedTuple):
    source: Source
    functions: dict[str, Any]


_numbers = itertools.count()


@functools.lru_cache(maxsize=256)
def kernels_of(key: ProgramKey) -> Kernels:
    """The kernels of a cell, made in memory: no file is written or read."""
    source = source_of(key.program)
    return Kernels(source, functions_of(source.text))


class _Life:
    """Of generated functions: it is among their globals."""


def functions_of(text: str) -> dict[str, Any]:
    """What the generated text defines. Triton reads a kernel's source by its file's name, which is one made up here,
    and stands in `linecache` for as long as the functions live."""
    path, life = f"<rnnkit cell {next(_numbers)}>", _Life()
    linecache.cache[path] = (len(text), None, text.splitlines(True), path)
    weakref.finalize(life, linecache.cache.pop, path, None).atexit = False
    found: dict[str, Any] = {"__name__": "rnnkit.kernels.generated", "_life": life}
    exec(compile(text, path, "exec"), found)
    return found


def tile(hidden: int) -> tuple[int, int, int]:
    """Rows and units of a program's tile, and its warps."""
    units = 1 << max(0, hidden - 1).bit_length()
    rows = max(1, TILE // units)
    return rows, units, max(1, min(MOST_WARPS, rows * units // (_LANES * A_THREAD)))


OPTIONS = {"enable_fp_fusion": False}
"""What a backward makes again must be the forward's to the last bit: it looks for a row's largest value by equality."""


def start(kernel: Any, grid: tuple[int], warps: int, arguments: dict[str, Any]) -> None:
    """Never waits."""
    kernel[grid](**arguments, num_warps=warps, **OPTIONS)


Start = Callable[[Any, tuple[int], int, dict[str, Any]], None]


class _Scan:
    """What the launches of one scan share: `arguments` by the names that the generated text has."""

    def __init__(self, p: CellProgram, t: CellInputs, o: CellOptions, run: Start) -> None:
        self.p, self.o, self.t, self.run = p, o, t, run
        self.wide = compute_dtype(t.x.dtype)
        self.steps, self.rows = t.x.shape[:2]
        self.kernels = kernels_of(ProgramKey(p))
        self.block_b, block_h, self.warps = tile(p.hidden)
        import triton.language as tl

        self.common: dict[str, Any] = {
            "lengths": _whole(t.lengths),
            "reset": _whole(t.reset),
            "total": self.steps,
            "reverse": int(o.reverse),
            "B": self.rows,
            "HEADS": o.heads,
            "F": tl.float64 if self.wide == torch.float64 else tl.float32,
            "BLOCK_B": self.block_b,
            "BLOCK_H": block_h,
        }
        for k, v in enumerate(t.units):
            self.common[f"p{k}"] = _whole(v)
        for k, (_, kind, _) in enumerate(p.steps):
            v = t.steps[k] if kind == ROW or t.steps[k].stride(-1) == 1 else t.steps[k].contiguous()
            self.common |= {f"x{k}": v, f"xt{k}": v.stride(0), f"xr{k}": v.stride(1)}
        for k in range(len(p.states)):
            self.common[f"r{k}"] = _whole(t.reset_states[k]) if t.reset_states else None
        self.weights = dict(zip([name for name, _ in p.weights], t.weights, strict=True))
        # Products read half types only where torch then gives float32.
        self.narrow = t.x.dtype if t.x.dtype == self.wide or multiplies(t.x.dtype, t.x.device) else self.wide

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.wide, device=self.t.x.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.wide, device=self.t.x.device)

    def crossings(self, side: Side) -> dict[str, Any]:
        return {
            "e": self.empty(self.rows, side.crossings * self.p.hidden),
            "f": self.empty(self.rows, side.row_crossings),
        }

    def launches(self, side: Side, products: dict[int, _Product], given: dict[str, Any]) -> Callable[..., None]:
        """A function that runs one step, given t, j and more."""
        arguments, grid = {**self.common, **given}, (-(-self.rows // self.block_b),)
        prepared = []
        for launch in side.launches:
            kernel = self.kernels.functions[launch.kernel] if launch.kernel else None
            own = {} if kernel is None else {k: arguments[k] for k in kernel.arg_names if k not in _OF_A_STEP}
            prepared.append(([products[q] for q in launch.products], kernel, own))

        def step(t: int, j: int, more: int) -> None:
            for some, kernel, own in prepared:
                for product in some:
                    product.run(j)
                if kernel is not None:
                    self.run(kernel, grid, self.warps, {**own, "t": t, "j": j, "more": more})

        return step

    def product(self, weight: str, blocks: int, operand: Tensor, *, transposed: bool) -> _Product:
        return _Product(self, self.weights[weight], blocks, operand, transposed)


_OF_A_STEP = ("t", "j", "more")


class _Product:
    """Rows times a weight: operand [B, K], or one of these for each step, and the result [n, B, N/n]."""

    def __init__(self, scan: _Scan, w: Tensor, blocks: int, operand: Tensor, transposed: bool) -> None:
        hidden, self.heads, self.wide = scan.p.hidden, scan.o.heads, scan.wide
        each, self.operand, self.blocks = hidden // self.heads, operand, blocks if transposed else 1
        self.result = scan.empty(self.heads, scan.rows, each if transposed else blocks * each)
        w = w.to(scan.narrow)
        if self.heads == 1:
            self.w = w if transposed else w.T
        else:  # [n, K/n, N/n]
            w = w.view(blocks, self.heads, each, each).transpose(0, 1)
            w = w.reshape(self.heads, blocks * each, each)
            self.w = w if transposed else w.transpose(1, 2)

    def run(self, j: int) -> None:
        x = self.operand[j] if self.operand.dim() == 3 else self.operand
        if self.heads == 1:
            multiply(x, self.w, self.result[0], self.wide)
            return
        x = x.view(x.shape[0], self.blocks, self.heads, -1).permute(2, 0, 1, 3)
        multiply(x.reshape(self.heads, x.shape[1], -1), self.w, self.result, self.wide)


def _whole(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _kept(p: CellProgram, dtype: torch.dtype, o: CellOptions) -> list[bool]:
    """Which states after each step the backward wants beside y. The first where y rounds it: a derivative may jump
    between the two."""
    wanted = [o.recompute or state in p.needs for state in p.states]
    return [wanted[0] and compute_dtype(dtype) != dtype, *wanted[1:]]


def saved_shapes(p: CellProgram, t: CellInputs, o: CellOptions) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of what a training forward keeps: states, what is saved per unit and per row, as far as there are any."""
    (steps, rows), wide = t.x.shape[:2], compute_dtype(t.x.dtype)
    shapes = [(steps, rows, p.hidden)] * sum(_kept(p, t.x.dtype, o))
    if not o.recompute:
        widths = (len(p.saved) * p.hidden, len(p.saved_rows))
        shapes += [(steps, rows, width) for width in widths if width]
    return [(shape, wide) for shape in shapes]


# Forward.


def _project(scan: _Scan, t0: int, t1: int) -> Tensor:
    """gx [n, B, G·H], not rounded to a half type: exponential gates would show it."""
    t, x = scan.t, scan.t.x[t0:t1]
    if t.w_ih is None:
        return x.contiguous()
    if t.x.dtype == scan.wide:
        return F.linear(x, t.w_ih, t.b_ih)
    gx = scan.empty((t1 - t0) * scan.rows, t.w_ih.shape[0])
    multiply(x.reshape(-1, x.shape[2]).to(scan.narrow), t.w_ih.T.to(scan.narrow), gx, scan.wide)
    gx = gx if t.b_ih is None else gx.add_(t.b_ih)
    return gx.view(t1 - t0, scan.rows, t.w_ih.shape[0])


def _entering(scan: _Scan, after: Sequence[Tensor | None], t: int) -> list[Tensor]:
    """The states from which step t starts, of those after each step, as buffers of their own."""
    given, reverse = scan.t, scan.o.reverse
    before, border, found = t - 1 + 2 * reverse, t + reverse, []
    for k, first in enumerate(given.states):
        v, done = first.to(scan.wide), after[k]
        if 0 <= before < scan.steps and done is not None:
            begun = done[before].to(scan.wide)
            v = begun if given.lengths is None else torch.where((given.lengths > before)[:, None], begun, v)
        if given.reset is not None and border < scan.steps:
            cut = given.reset[border][:, None]
            cut = cut if given.lengths is None else cut & (given.lengths > border)[:, None]
            v = masks.replace(v, cut, given.reset_states[k].to(scan.wide) if given.reset_states else None)
        found.append(v.clone(memory_format=torch.contiguous_format))
    return found


class _Saved(NamedTuple):
    units: Tensor | None
    rows: Tensor | None


class _ForwardScan(_Scan):
    """Steps of the forward, a range of time after another."""

    def __init__(self, p: CellProgram, t: CellInputs, o: CellOptions, run: Start) -> None:
        super().__init__(p, t, o, run)
        self.side, of_state = self.kernels.source.forward, self.kernels.source.of_state
        self.products: dict[int, _Product] = {}
        self.given = {**self.crossings(self.side), "b_hh": _whole(t.b_hh)}
        self.states = [self.empty(self.rows, p.hidden) for _ in p.states]
        self.short: list[Tensor | None] = [None] * len(p.states)
        for s in set(of_state.values()) if self.narrow != self.wide else ():
            self.short[s] = self.empty(self.rows, p.hidden, dtype=self.narrow)
        for q in sorted({q for launch in self.side.launches for q in launch.products}):
            product = p.forward.products[q]
            if q in of_state:
                short = self.short[of_state[q]]
                operand = self.states[of_state[q]] if short is None else short
            else:
                operand = self.empty(self.rows, p.hidden, dtype=self.narrow)
                self.given[f"o{q}"] = operand
            self.products[q] = self.product(product.weight, product.blocks, operand, transposed=False)
            self.given[f"q{q}"] = self.products[q].result
        for k in range(len(p.states)):
            self.given |= {f"s{k}": self.states[k], f"short{k}": self.short[k]}
        self.given["out"] = None

    def enter(self, states: Sequence[Tensor]) -> None:
        for to, short, v in zip(self.states, self.short, states, strict=True):
            to.copy_(v)
            if short is not None:
                short.copy_(v)

    def range(self, gx: Tensor, after: Sequence[Tensor | None], saved: _Saved, t0: int, t1: int) -> None:
        """The steps [t0, t1), from the states that were entered. after: where states after each step go."""
        given = {**self.given, "gx": gx, "saved": saved.units, "kept": saved.rows}
        given |= {f"a{k}": v for k, v in enumerate(after)}
        step = self.launches(self.side, self.products, given)
        order = range(t1 - 1, t0 - 1, -1) if self.o.reverse else range(t0, t1)
        for t in order if self.rows else ():
            step(t, t - t0, int(t != (0 if self.o.reverse else self.steps - 1)))

    def saved(self, steps: int, save: bool) -> _Saved:
        widths = (len(self.p.saved) * self.p.hidden, len(self.p.saved_rows))
        return _Saved(*(self.empty(steps, self.rows, width) if save and width else None for width in widths))


@torch.no_grad()
def forward(
    p: CellProgram, t: CellInputs, o: CellOptions, train: bool, *, run: Start = start
) -> tuple[CellOutputs, tuple[Tensor, ...]]:
    """The outputs, and with `train` what `backward` wants: as `saved_shapes` says."""
    with backend.on_device_of(t.x):
        scan = _ForwardScan(p, t, o, run)
        steps, rows, h, dtype = scan.steps, scan.rows, p.hidden, t.x.dtype
        kept = [train and wanted for wanted in _kept(p, dtype, o)]
        y = scan.empty(steps, rows, h, dtype=dtype)
        every = [wanted or (o.all_states and k > 0) for k, wanted in enumerate(kept)]
        after = [scan.empty(steps, rows, h) if wanted else None for wanted in every]
        scan.given["out"] = y if dtype != scan.wide else None
        if dtype == scan.wide:
            after[0] = y
        saved = scan.saved(steps, train and not o.recompute)
        parts = list(chunks.chunk_bounds(steps, rows, last_first=o.reverse)) if o.recompute else [(0, steps)]
        scan.enter(_entering(scan, [None] * len(after), steps - 1 if o.reverse else 0) if steps else t.states)
        for t0, t1 in parts:
            scan.range(_project(scan, t0, t1), after, saved, t0, t1)
        last = tuple([torch.stack([v]).to(dtype) for v in scan.states])
        others = tuple([v.to(dtype) for v in after[1:] if v is not None]) if o.all_states else ()
    states = [v for v, wanted in zip(after, kept, strict=True) if wanted and v is not None]
    return CellOutputs(y, last, others), (*states, *(v for v in saved if v is not None)) if train else ()


# Backward.


class _BackwardScan(_Scan):
    """Steps of the backward, a range of time after another; states' gradients and sums go on from one to the next."""

    def __init__(
        self, p: CellProgram, t: CellInputs, o: CellOptions, after: list[Tensor | None], grads: CellOutputs, run: Start
    ) -> None:
        super().__init__(p, t, o, run)
        self.source, h = self.kernels.source, p.hidden
        self.side = self.source.backward
        arriving = [grads.y, *(grads.all or [None] * (len(p.states) - 1))]
        last = [None if g is None else g.to(self.wide) for g in grads.last or [None] * len(p.states)]
        self.d = [
            self.zeros(self.rows, h) if g is None else g[0].clone(memory_format=torch.contiguous_format) for g in last
        ]
        self.d_reset = [self.zeros(self.rows, h) if t.reset is not None else None for _ in p.states]
        self.d_units = self.zeros(self.rows, len(p.units) * h)
        self.d_steps = [self._of_steps(k) for k in range(len(p.steps))]
        self.given = {**self.crossings(self.side), "du": self.d_units}
        self.given["awake"] = torch.empty(self.rows, dtype=torch.int32, device=t.x.device)
        for k in range(len(p.states)):
            self.given |= {f"a{k}": after[k], f"h{k}": _whole(t.states[k]), f"g{k}": _whole(arriving[k])}
            self.given |= {f"d{k}": self.d[k], f"dr{k}": self.d_reset[k]}
        self.given |= {f"dx{k}": v for k, v in enumerate(self.d_steps)}

    def _of_steps(self, k: int) -> Tensor | None:
        if self.p.d_steps[k] is None:
            return None
        return self.empty(*self.t.steps[k].shape, dtype=self.t.steps[k].dtype)

    def range(self, saved: _Saved, t0: int, t1: int) -> tuple[list[Tensor], list[Tensor]]:
        """The steps [t0, t1): the gradients of products' results, that of gx first, and products' operands."""
        n, h, dtype = t1 - t0, self.p.hidden, self.t.x.dtype
        groups = [self.empty(n, self.rows, len(group) * h, dtype=dtype) for group in self.source.given]
        operands = [self.empty(n, self.rows, h, dtype=dtype) for _ in self.source.operands]
        given = {**self.given, "saved": saved.units, "kept": saved.rows}
        given |= {f"y{k}": v for k, v in enumerate(groups)} | {f"w{k}": v for k, v in enumerate(operands)}
        products = {}
        for q in sorted({q for launch in self.side.launches for q in launch.products}):
            product, operand = self.p.backward.products[q], None
            if q in self.source.in_place and self.narrow == dtype:
                operand = groups[self.source.in_place[q]]
            given[f"o{q}"] = (
                None if operand is not None else self.empty(self.rows, product.blocks * h, dtype=self.narrow)
            )
            operand = given[f"o{q}"] if operand is None else operand
            products[q] = self.product(product.weight, product.blocks, operand, transposed=True)
            given[f"q{q}"] = products[q].result
        step = self.launches(self.side, products, given)
        for t in (range(t0, t1) if self.o.reverse else range(t1 - 1, t0 - 1, -1)) if self.rows else ():
            step(t, t - t0, 0)
        return groups, operands


@torch.no_grad()
def backward(
    p: CellProgram,
    t: CellInputs,
    o: CellOptions,
    y: Tensor,
    saved: Sequence[Tensor],
    grads: CellOutputs,
    needs: Sequence[bool],
    *,
    run: Start = start,
) -> list[Tensor | None]:
    """Gradients in the flat order of `t`, None where they are not needed."""
    kept = iter(saved)
    after = [next(kept) if wanted else None for wanted in _kept(p, t.x.dtype, o)]
    if t.x.dtype == compute_dtype(t.x.dtype):
        after[0] = _whole(y)
    with backend.on_device_of(t.x):
        scan = _BackwardScan(p, t, o, after, grads, run)
        sums = _Sums(p, t, o, scan, needs)
        if o.recompute:
            again = _ForwardScan(p, t, o, run)
            for t0, t1 in chunks.chunk_bounds(scan.steps, scan.rows, last_first=not o.reverse):
                made = again.saved(t1 - t0, True)
                if t1 > t0:
                    again.enter(_entering(again, after, t1 - 1 if o.reverse else t0))
                    again.range(_project(again, t0, t1), [None] * len(after), made, t0, t1)
                sums.add(*scan.range(made, t0, t1), t0, t1)
        else:
            blocks = _Saved(*(next(kept) if some else None for some in (p.saved, p.saved_rows)))
            sums.add(*scan.range(blocks, 0, scan.steps), 0, scan.steps)
        return sums.gradients()


class _Sums:
    """The gradients that are sums over time, from the ranges of a backward."""

    def __init__(
        self, p: CellProgram, t: CellInputs, o: CellOptions, scan: _BackwardScan, needs: Sequence[bool]
    ) -> None:
        self.p, self.t, self.o, self.scan, self.needs = p, t, o, scan, needs
        self.guarded = t.lengths is not None or t.reset is not None
        self.dx = torch.empty_like(t.x, memory_format=torch.contiguous_format) if needs[0] else None
        self.sums: dict[str, Tensor] = {}
        a, b = 1 + len(p.states), 4 + len(p.states)
        self.wanted = dict(zip(("w_ih", "b_ih", "b_hh"), needs[a:b], strict=True))
        self.wanted |= {name: needs[b + k] for k, (name, _) in enumerate(p.weights)}

    def _add(self, name: str, share: Tensor) -> None:
        share = share.to(self.scan.wide) if self.o.recompute else share
        self.sums[name] = self.sums[name] + share if name in self.sums else share

    def add(self, groups: list[Tensor], operands: list[Tensor], t0: int, t1: int) -> None:
        t, d_gx = self.t, groups[0]
        if self.dx is not None:
            self.dx[t0:t1] = d_gx if t.w_ih is None else d_gx @ t.w_ih
        if self.wanted["w_ih"]:
            x = t.x[t0:t1]
            # no gradient came here, so nothing that stands here may pass on NaN
            x = x.masked_fill((d_gx == 0).all(-1, keepdim=True), 0) if self.guarded else x
            self._add("w_ih", outer(d_gx, x, 1))
        if self.wanted["b_ih"]:
            self._add("b_ih", d_gx.sum((0, 1)))
        for name, group, operand in self.scan.source.weight_grads:
            if self.wanted[name]:
                self._add(name, outer(groups[group], operands[operand], self.o.heads))
            if name == "w_hh" and self.wanted["b_hh"]:
                self._add("b_hh", groups[group].sum((0, 1)))

    def gradients(self) -> list[Tensor | None]:
        scan, t, p = self.scan, self.t, self.p
        units = scan.d_units.sum(0).split(p.hidden) if p.units else ()
        every = [
            self.dx,
            *scan.d,
            *(self.sums.get(name) for name in ("w_ih", "b_ih", "b_hh", *(name for name, _ in p.weights))),
            *(units if p.units else ()),
            *scan.d_steps,
            None,
            None,
            *(scan.d_reset if t.reset_states else ()),
        ]
        found: list[Tensor | None] = []
        for g, v, need in zip(every, t.flat(), self.needs, strict=True):
            if not need or v is None:
                found.append(None)
            else:
                found.append(torch.zeros_like(v, memory_format=torch.contiguous_format) if g is None else g.to(v.dtype))
        return found


__all__ = ["Launch", "backward", "forward", "kernels_of", "name", "saved_shapes", "unsupported"]
