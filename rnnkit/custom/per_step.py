"""Inputs of each step as a call brings them, in the layout of x, made ready for each layer and direction.

T steps, B rows, H hidden size, L·D layers times directions. Inside: [T or 1, B, H], of a row [T or 1, B].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from ..layouts import JaggedLayout, Layout
from .declare import Cell, CellSpec

Given = dict[str, Sequence[Tensor]]
"""Name to one tensor for each layer and direction."""


def per_step(spec: CellSpec, layout: Layout, values: Mapping[str, object], count: int, hidden: int) -> Given:
    """What the call gave, checked. count: L·D."""
    kinds = {name: (kind, grad) for name, kind, grad in spec.steps}
    for name in values:
        if name not in kinds:
            have = f"declares the inputs of each step {', '.join(kinds)}" if kinds else "declares no rnnkit.per_step"
            raise TypeError(f"{spec.name} got an unexpected keyword {name!r}; it {have}")
    found: Given = {}
    for name, v in values.items():
        if v is None:
            continue
        kind, grad = kinds[name]
        dense, ordered = _dense(layout, name, v)
        if not grad and dense.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires a gradient, but {spec.name} declares it with grad=False: pass {name}.detach(), or "
                "declare rnnkit.per_step(grad=True)"
            )
        found[name] = _each(layout, name, kind, dense, ordered, count, hidden)
    missing = [name for name in kinds if name not in found]
    if missing and not spec.draws:
        raise TypeError(
            f"{spec.name} needs {', '.join(missing)} at every call: layer(x, {missing[0]}=...), "
            f"{_forms(layout, kinds[missing[0]][0])}"
        )
    return found


def _forms(layout: Layout, kind: str) -> str:
    lead = "[T" if _unbatched(layout) else "[B, T" if layout.batch_first else "[T, B"
    return lead + (", H]" if kind == "unit" else "]")


def _unbatched(layout: Layout) -> bool:
    return layout.dims == 2 and not layout.packed


def _dense(layout: Layout, name: str, v: object) -> tuple[Tensor, bool]:
    """The value as a tensor with dimensions of time and rows, and whether that is [T, B, ...] in our order of rows, as
    what is packed or nested becomes."""
    if isinstance(v, PackedSequence):
        if not layout.packed:
            raise TypeError(f"{name} must be a tensor in the input's layout, got a PackedSequence")
        layout.expect_packed_alike(v, name)
        return layout.pad(v.data), True
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a tensor in the input's layout, got {type(v).__name__}")
    if v.is_nested:
        if not isinstance(layout, JaggedLayout):
            raise TypeError(f"{name} must be a tensor in the input's layout, got a nested one")
        layout.expect_nested_alike(v, name)
        return layout.pad(v.values()), True
    checks.expect_dense(v, name)
    return v, False


def _each(layout: Layout, name: str, kind: str, v: Tensor, ordered: bool, count: int, hidden: int) -> Sequence[Tensor]:
    """One tensor for each layer and direction, [T or 1, B, ...] in our order of rows."""
    unbatched = _unbatched(layout)
    first = layout.batch_first and not unbatched and not ordered
    tail = (hidden,) if kind == "unit" else ()
    sizes = (layout.steps,) if unbatched else (layout.rows, layout.steps) if first else (layout.steps, layout.rows)
    wanted, once = (*sizes, *tail), (*sizes[:1], 1, *tail) if first else (1, *sizes[1:], *tail)
    at = v.dim() - len(wanted)  # of the first dimension of time and rows
    if not (at == 0 or (at == 1 and v.shape[0] == count)) or tuple(v.shape[at:]) not in (wanted, once):
        raise ValueError(
            f"{name} must be {_forms(layout, kind)} = {list(wanted)}, with T = 1 for the same at every step, or "
            f"[L·D = {count}, ...] with one for each layer and direction; got {list(v.shape)}"
        )
    if unbatched:
        v = v.unsqueeze(at + 1)
    elif first:
        v = v.transpose(at, at + 1)
    if layout.packed and not ordered and layout.source.sorted_indices is not None:
        v = v.index_select(at + 1, layout.source.sorted_indices)
    return v.unbind(0) if at else [v] * count


def complete(
    cell: Cell, spec: CellSpec, given: Given, k: int, training: bool, x: Tensor, hidden: int
) -> tuple[Tensor, ...]:
    """The inputs of layer and direction k in the spec's order, [T, B, H] or [T, B], in x's dtype: what the call gave,
    and what the cell draws."""
    steps, rows = x.shape[:2]
    drawn: Mapping[str, Tensor] = {}
    if len(given) < len(spec.steps):
        drawn = cell.draw(training, steps, rows, hidden, x)
    found = []
    for name, kind, grad in spec.steps:
        tail = (hidden,) if kind == "unit" else ()
        if name in given:
            v = given[name][k]
        elif name in drawn:
            v = drawn[name]
            if not isinstance(v, Tensor) or tuple(v.shape) not in ((steps, rows, *tail), (1, rows, *tail)):
                got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
                wanted = [steps, rows, *tail]
                raise ValueError(f"{spec.name}.draw must give {name} as {wanted}, or with T = 1; got {got}")
        else:
            raise TypeError(f"{spec.name} needs {name}: neither the call gave it nor the cell's `draw`")
        if not v.is_floating_point():
            v = v.to(x.dtype)
        if not grad:
            v = v.detach()
        found.append(v if v.shape[0] == steps else v.expand(steps, *v.shape[1:]))
    return tuple(found)
