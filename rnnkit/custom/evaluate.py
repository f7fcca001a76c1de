"""A program by torch's operators, in any dtype: the self-check's and the tests' measure of it. One step, [B, ...]."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkit.custom.graph import CellProgram, Graph, Input
from rnnkit.custom.rules import RULES
from rnnkit.custom.term import leaf_of, result_of


def evaluate(
    graph: Graph,
    roots: Sequence[int],
    leaf: Callable[[Input], Tensor],
    weights: Mapping[str, Tensor],
    hidden: int,
    like: Tensor,
) -> list[Tensor]:
    """Each root: [B, H], or [B, 1] for a value per row, or what broadcasts to it. `weights` holds the biases too;
    `like` has the dtype and the device."""
    values: dict[int, Tensor] = {}
    for n in sorted(graph.reach(roots)):
        node = graph.nodes[n]
        if node.op == "const":
            values[n] = torch.tensor(node.data, dtype=like.dtype, device=like.device)
        elif node.op == "input":
            values[n] = leaf(leaf_of(node))
        elif node.op == "product":
            number, block = result_of(node)
            product = graph.products[number]
            weight = weights[product.weight]
            blocks = [values[x] for x in product.operands]
            x = torch.cat(torch.broadcast_tensors(*blocks, like.new_empty(hidden))[:-1], -1)
            if product.transposed:
                values[n] = x @ weight
            else:
                rows = slice(block * hidden, (block + 1) * hidden)
                bias = None if product.bias is None else weights[product.bias][rows]
                values[n] = torch.nn.functional.linear(x, weight[rows], bias)
        else:
            args = [values[x] for x in node.args]
            if node.op in ("rowsum", "rowmax"):
                args = [args[0].expand(*args[0].shape[:-1], hidden)]
            values[n] = RULES[node.op].forward(*args)
    return [values[n] for n in roots]


class Kept(NamedTuple):
    new: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]
    saved_rows: tuple[Tensor, ...]


def forward(program: CellProgram, values: Mapping[str, Tensor]) -> Kept:
    """One step. `values`: gx [B, gates·H], states and inputs of the step [B, H] or [B, 1], parameters per unit [H],
    weights [blocks·H, H], b_hh [gates·H]."""
    rows = values[program.states[0]].shape[0]

    def leaf(x: Input) -> Tensor:
        return _block(values[x.name], x.block, program.hidden) if x.name == "gx" else values[x.name]

    roots = [*program.new, *program.saved, *program.saved_rows]
    out = evaluate(program.forward, roots, leaf, values, program.hidden, values[program.states[0]])
    a, b = len(program.new), len(program.new) + len(program.saved)
    full = [x.expand(rows, program.hidden) for x in out[:b]]
    return Kept(tuple(full[:a]), tuple(full[a:]), tuple(x.expand(rows, 1) for x in out[b:]))


def backward(
    program: CellProgram,
    values: Mapping[str, Tensor],
    kept: Kept,
    d_new: Sequence[Tensor],
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The gradients of `names` (of everything in `values`) in their shapes."""
    hidden = program.hidden
    rows = values[program.states[0]].shape[0]
    named = {"d_" + s: d for s, d in zip(program.states, d_new, strict=True)}
    named |= {"new_" + s: x for s, x in zip(program.states, kept.new, strict=True)}

    def leaf(x: Input) -> Tensor:
        if x.name == "saved":
            return kept.saved[x.block]
        if x.name == "saved_row":
            return kept.saved_rows[x.block]
        return named[x.name] if x.name in named else values[x.name]

    steps = tuple(name for name, _, _ in program.steps)
    roots: list[tuple[str, int, int | None]] = [
        (s, 0, n) for s, n in zip(program.states, program.d_states, strict=True)
    ]
    roots += [("gx", k, n) for k, n in enumerate(program.d_gx)]
    roots += [(u, 0, n) for u, n in zip(program.units, program.d_units, strict=True)]
    roots += [(s, 0, n) for s, n in zip(steps, program.d_steps, strict=True)]
    products = [n for _, ds, operand in program.d_products for n in (operand, *ds)]
    wanted = [n for _, _, n in roots if n is not None] + [n for n in products if n is not None]
    found = dict(
        zip(wanted, evaluate(program.backward, wanted, leaf, values, hidden, values[program.states[0]]), strict=True)
    )

    gradients = {name: torch.zeros_like(values[name]) for name in (values if names is None else names)}
    for name, block, n in roots:
        if n is None or name not in gradients:
            continue
        into = _block(gradients[name], block, hidden) if name == "gx" else gradients[name]
        into += found[n].expand(rows, hidden).sum(0) if name in program.units else found[n]
    for weight, ds, operand in program.d_products:
        x = found[operand].expand(rows, hidden)
        for k, n in enumerate(ds):
            if n is not None:
                d = found[n].expand(rows, hidden)
                if weight in gradients:
                    gradients[weight][k * hidden : (k + 1) * hidden] += d.T @ x
                if weight == "w_hh" and "b_hh" in gradients:
                    gradients["b_hh"][k * hidden : (k + 1) * hidden] += d.sum(0)
    return gradients


def _block(x: Tensor, k: int, hidden: int) -> Tensor:
    return x[..., k * hidden : (k + 1) * hidden]
