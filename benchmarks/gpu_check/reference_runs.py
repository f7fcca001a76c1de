"""Runs a case of parity_cases.py: by a backend of rnnkit, by torch.nn, by the reference step by step.

What torch.nn has no argument for is done around it: every piece between two resets becomes a row of its own. Where
it has no such case (a GRU that resets before the product, all cell states), the reference serves, called step by
step, so that its state is rounded at each step. TF32 is the reference too, with the operands of its recurrent products
cut by hand, as a GPU cuts them; torch's own layers use it for all their products, or for none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

import rnnkit
from rnnkit import ops
from rnnkit.backends import LayerInputs
from rnnkit.backends.scan_backend import bias_inside, project
from rnnkit.cells import CELLS
from rnnkit.reference import STEPS, State, Weights

from .parity_cases import KINDS, CaseInputs, ParityCase, Values, build

# Each takes leaves and weights and gives y [T, B, D·N], h_n, c_n [L·D, B, ·], and all states.

Runner = Callable[[ParityCase, CaseInputs, Values, Values], Values]


class PreparedLayer:
    """rnnkit's layer by a backend, with NaN in the padding, made once: a call of it copies nothing from the host."""

    def __init__(self, backend: str, case: ParityCase, given: CaseInputs, device: Any, dtype: torch.dtype) -> None:
        variant = case.variant
        self.backend, self.case = backend, case
        self.layer = build(case, rnnkit, backend=backend, recompute=variant.recompute, device=device, dtype=dtype)
        self.lengths = None if given.lengths is None else given.lengths.to(device)
        self.extras: dict[str, Any] = {"lengths": self.lengths, "return_all_states": variant.all_states}
        self.extras["reset"] = None if given.resets is None else given.resets.to(device)

    def arguments(self, leaves: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with."""
        x = leaves["x"]
        if self.lengths is not None:
            beyond = torch.arange(x.shape[0], device=x.device)[:, None, None] >= self.lengths[:, None]
            x = x.masked_fill(beyond, torch.nan)  # a scalar for `where` would be copied from the host
        return (x, _states(leaves, "0")), {**self.extras, "reset_state": _states(leaves, "r")}

    def __call__(self, leaves: Values, weights: Values) -> Values:
        arguments, extras = self.arguments(leaves)
        return results_of(torch.func.functional_call(self.layer, weights, arguments, extras))


def results_of(given: Any) -> Values:
    """What a layer of rnnkit gives, by names."""
    y, *states = given
    results = {"y": y}
    for suffix, state in zip(("n", "all"), states, strict=False):
        parts = state if isinstance(state, tuple) else (state,)
        results.update({f"{name}_{suffix}": v for name, v in zip("hc", parts, strict=False)})
    return results


def named(backend: str) -> Runner:
    """rnnkit's layer by a backend; where the variant asks for many rows, with the case's as the first and last."""

    def run(case: ParityCase, given: CaseInputs, leaves: Values, weights: Values) -> Values:
        x, many = leaves["x"], case.variant.many
        if not many:
            return PreparedLayer(backend, case, given, x.device, x.dtype)(leaves, weights)
        lengths = None if given.lengths is None else _spread(given.lengths, 0, many)
        resets = None if given.resets is None else _spread(given.resets, 1, many)
        ready = PreparedLayer(backend, case, CaseInputs({}, {}, lengths, resets), x.device, x.dtype)
        results = ready({name: _spread(v, 1, many) for name, v in leaves.items()}, weights)
        rows = x.shape[1]
        ends = (slice(rows // 2), slice(many - (rows - rows // 2), many))
        return {name: torch.cat([v[:, end] for end in ends], 1) for name, v in results.items()}

    return run


def _spread(v: Tensor, dim: int, many: int) -> Tensor:
    """The first half of the rows, copies of the first row that no gradient passes through, the last half."""
    rows = v.shape[dim]
    shape = [*v.shape]
    shape[dim] = many - rows
    first, last = v.split([rows // 2, rows - rows // 2], dim)
    return torch.cat([first, v.narrow(dim, 0, 1).detach().expand(shape), last], dim)


def _states(leaves: Values, suffix: str) -> Any:
    parts = [v for name, v in leaves.items() if name.endswith(f"_{suffix}")]
    return None if not parts else parts[0] if len(parts) == 1 else tuple(parts)


def by_pieces(case: ParityCase, given: CaseInputs, leaves: Values, weights: Values) -> Values:
    """torch.nn's layer; with lengths or resets every piece between two resets is a row of its own, all packed."""
    x, variant = leaves["x"], case.variant
    layer = build(case, nn, device=x.device, dtype=x.dtype)

    def call(*arguments: Any) -> tuple[Any, list[Tensor]]:
        y, last = torch.func.functional_call(layer, weights, arguments)
        return y, list(last) if isinstance(last, tuple) else [last]

    if given.lengths is None and given.resets is None:
        y, last = call(x, _states(leaves, "0"))
        return {"y": y, **{f"{name}_n": v for name, v in zip("hc", last, strict=False)}}
    resets = torch.zeros(x.shape[:2]) if given.resets is None else given.resets
    pieces = []  # row, first step, the step after its last
    for b, valid in enumerate(given.valid):
        cuts = [0, *(t for t in range(1, valid) if resets[t, b]), valid]
        pieces += [(b, begin, end) for begin, end in itertools.pairwise(cuts) if end]
    where = [(t - begin, k, t, b) for k, (b, begin, end) in enumerate(pieces) for t in range(begin, end)]
    i, k, t, b = torch.tensor(where, device=x.device).T
    sizes = torch.tensor([end - begin for _, begin, end in pieces])
    rows = torch.tensor([row for row, _, _ in pieces], device=x.device)
    padded = x.new_zeros(int(sizes.max()), len(pieces), x.shape[2]).index_put((i, k), x[t, b])
    # The pieces that begin with h_0, and those that end with h_n: [L·D, pieces].
    begins = [begin == 0 and not resets[0, row] for row, begin, _ in pieces]
    last_ones = [end == given.valid[row] for row, _, end in pieces]
    forward, backward = (begins, last_ones), (last_ones, [begin == 0 for _, begin, _ in pieces])
    order = ([forward, backward] if variant.both else [forward]) * variant.layers
    from_0, to_n = (torch.tensor([pair[which] for pair in order], device=x.device) for which in (0, 1))
    starts, befores = [], []
    for name, size in zip(KINDS[case.kind].states, (case.output_size, variant.size[3]), strict=False):
        none = x.new_zeros(len(order), x.shape[1], size)
        befores.append(leaves.get(f"{name}_0", none))
        starts.append(torch.where(from_0[..., None], befores[-1][:, rows], leaves.get(f"{name}_r", none)[:, rows]))
    packed = pack_padded_sequence(padded, sizes, enforce_sorted=False)
    out, last = call(packed, tuple(starts) if len(starts) > 1 else starts[0])
    y = pad_packed_sequence(out)[0][i, k]
    results = {"y": y.new_zeros(*x.shape[:2], y.shape[1]).index_put((t, b), y)}
    at, ending = to_n.nonzero().T
    for name, before, found in zip("hc", befores, last, strict=False):
        results[f"{name}_n"] = before.index_put((at, rows[ending]), found[at, ending])  # a row without steps keeps h_0
    return results


Advance = Callable[[str, Tensor, Tensor, Tensor | None, Values], tuple[Tensor, Tensor | None]]
"""One step: cell, x [1, B, I], h, c, weights under the names of a layer's first parameters -> h, c."""


def advance(cell: str, x: Tensor, h: Tensor, c: Tensor | None, w: Values) -> tuple[Tensor, Tensor | None]:
    """By the reference."""
    _, h_n, c_n, _ = ops.layer(cell, x, h, c, list(w.values()), backend="reference")
    return h_n, c_n


def by_steps(
    case: ParityCase, given: CaseInputs, leaves: Values, weights: Values, advance: Advance = advance
) -> Values:
    """The reference called for one step after the other, lengths and resets by `where`."""
    x, variant, kind = leaves["x"], case.variant, KINDS[case.kind]
    steps, rows = x.shape[:2]
    sizes = (case.output_size, variant.size[3])[: len(kind.states)]
    valid = torch.tensor(given.valid, device=x.device)[:, None]
    resets = None if given.resets is None else given.resets.to(x.device)
    finals: list[Any] = []
    histories: list[Any] = []
    for n in range(variant.layers):
        outputs = []
        for d in range(2 if variant.both else 1):
            at = len(finals)
            zeros = [x.new_zeros(rows, size) for size in sizes]
            again = [leaves[f"{s}_r"][at] for s in kind.states] if variant.reset_state else zeros
            state = [leaves[f"{s}_0"][at] for s in kind.states] if variant.hx else zeros
            suffix = f"_l{n}" + "_reverse" * d
            w = {name.removesuffix(suffix): v for name, v in weights.items() if name.endswith(suffix)}
            history: list[Any] = [None] * steps
            for t in reversed(range(steps)) if d else range(steps):
                border = t + d  # a reset lies between this step and the one before it, whichever comes first
                if resets is not None and border < steps:
                    cut = resets[border][:, None] & (border < valid)
                    state = [torch.where(cut, r, s) for r, s in zip(again, state, strict=True)]
                c = state[1] if len(state) > 1 else None
                h, c = advance(kind.cell, x[t : t + 1], state[0], c, w)
                new = [h] if c is None else [h, c]
                state = [torch.where(t < valid, v, s) for v, s in zip(new, state, strict=True)]
                history[t] = [torch.where(t < valid, v, 0) for v in new]
            finals.append(state)
            histories.append([torch.stack(column) for column in zip(*history, strict=True)])
            outputs.append(histories[-1][0])
        x = torch.cat(outputs, -1)
    results = {"y": x}
    for suffix, every in (("n", finals), ("all", histories if variant.all_states else [])):
        for name, column in zip(kind.states, zip(*every, strict=True), strict=False):
            results[f"{name}_{suffix}"] = torch.stack(column)
    return results


def by_tf32(case: ParityCase, given: CaseInputs, leaves: Values, weights: Values) -> Values:
    """The same with its recurrent products in TF32: their operands keep 10 of float32's 23 bits after the point.

    A GPU's matrix units read no others. A kernel that rounds to them is off by half as much, so what this gives is off
    by as much as TF32 may be: 2^-10 of every operand.
    """
    return by_steps(case, given, leaves, weights, _advance_in_tf32)


def _advance_in_tf32(cell: str, x: Tensor, h: Tensor, c: Tensor | None, w: Values) -> tuple[Tensor, Tensor | None]:
    given = (w.get(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"))
    t, kind = LayerInputs(x, h, c, *given), CELLS[cell]  # type: ignore[arg-type]
    gx = project(kind, t)[0]
    with _Tf32():  # the cell's step has no other products
        new = STEPS[cell][0](gx, State(h, c), Weights(t.w_hh, bias_inside(kind, t), t.w_hr))
    return new.h, new.c


class _Tf32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Product.apply(*args) if func in PRODUCTS else func(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    """a w, and the gradient of a; that of w is a product of its own after the scan, which is float32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(a, w)
        return cut(a) @ cut(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, w = ctx.saved_tensors
        return cut(g) @ cut(w).T, a.T @ g


PRODUCTS = (Tensor.matmul, Tensor.__matmul__, torch.matmul)
LOST = 13  # bits of float32 that TF32 has not


def cut(v: Tensor) -> Tensor:
    """float32 without the bits that TF32 has not."""
    return (v.view(torch.int32) >> LOST << LOST).view(torch.float32)


def numbers(runner: Runner, case: ParityCase, given: CaseInputs, dtype: torch.dtype, device: str) -> Values:
    """What a runner gives, on the CPU: the results, those without gradients too, and the gradient of everything."""
    leaves, weights = given.to(dtype, device)
    with torch.no_grad():
        alone = runner(case, given, leaves, weights)
    results, every = runner(case, given, leaves, weights), {**leaves, **weights}
    found = torch.autograd.grad(
        list(results.values()), list(every.values()), upstream(results), allow_unused=True, materialize_grads=True
    )
    named = {**results, **{f"{name} without gradients": v for name, v in alone.items()}}
    named |= {f"gradient of {name}": v for name, v in zip(every, found, strict=True)}
    return {name: v.detach().cpu() for name, v in named.items()}


def upstream(results: Values, seed: int = 1) -> list[Tensor]:
    """A gradient for each result, the same whatever the dtype."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=g).to(torch.bfloat16).to(v.device, v.dtype) for v in results.values()]
