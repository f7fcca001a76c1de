"""Layers and directions of a custom cell over `layer.run`, in any of torch.nn's layouts.

T steps, B rows, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .. import checks, masks
from ..layouts import Layout, layout_of
from . import layer
from .declare import Cell, CellSpec
from .inputs import CellInputs, CellOptions, CellOutputs
from .per_step import Given, complete, per_step

_NONE: tuple[Any] = (None,)


class Piece(NamedTuple):
    """What a layer has in one direction, as `CellInputs` names it."""

    w_ih: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    weights: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    modules: Mapping[str, nn.Module]


class Settings(NamedTuple):
    """Of a stack, the same at every call."""

    input_size: int
    hidden: int
    layers: int
    directions: int
    batch_first: bool
    dropout: float
    heads: int
    recompute: bool
    backend: str


def run(
    cell: Cell,
    spec: CellSpec,
    s: Settings,
    pieces: Sequence[Piece],
    input: Tensor | PackedSequence,
    hx: Any,
    training: bool,
    lengths: Tensor | None,
    reset: Tensor | PackedSequence | None,
    reset_state: Any,
    return_all_states: bool,
    values: Mapping[str, object],
) -> Any:
    """The whole call: output, states, and with return_all_states those after every step. values: per_step inputs."""
    checks.expect_bool(return_all_states, "return_all_states")
    layout = _layout(s, input)
    x = layout.x
    count = s.layers * s.directions
    first = _states(spec, layout, hx, "hx", count, s.hidden)
    again: list[Tensor] | None = None
    if reset_state is not None:
        checks.expect_reset(reset)
        again = _states(spec, layout, reset_state, "reset_state", count, s.hidden)
    lengths = _lengths(layout, s.batch_first, lengths)
    if reset is not None:
        reset = checks.reset_of(layout.reset_mask(reset), layout.steps, layout.rows, x.device)
    given = per_step(spec, layout, values, count, s.hidden) if values or spec.steps else {}
    for k, piece in enumerate(pieces):  # before the first random number is drawn
        _expect_piece(spec, s, piece, k)
    _expect_alike(spec, x, pieces, [*(first or ()), *(again or ())], given)

    call = _Call(cell, spec, s, training, lengths, reset, return_all_states, given)
    last: list[tuple[Tensor, ...]] = []
    every: list[tuple[Tensor, ...]] = []
    for k in range(s.layers):
        ys = []
        for d in range(s.directions):
            i = k * s.directions + d
            start = _NONE * len(spec.states) if first is None else tuple([v[i] for v in first])
            cut = () if again is None else tuple([v[i] for v in again])
            found = _direction(call, pieces[i], i, d == 1, x, start, cut)
            ys.append(found.y)
            last.append(found.last)
            if return_all_states:
                every.append((found.y, *found.all))
        x = ys[0] if s.directions == 1 else torch.cat(ys, -1)
        if s.dropout and training and k < s.layers - 1:
            x = layout.dropout(x, s.dropout)
    finals = [layout.states_to_caller(v[0] if count == 1 else torch.cat(v)) for v in zip(*last, strict=True)]
    result = layout.output(x), _some(finals)
    if not return_all_states:
        return result
    return *result, _some([layout.all_states(v) for v in _stacked(every)])


class _Call(NamedTuple):
    """What every layer and direction of a call shares."""

    cell: Cell
    spec: CellSpec
    s: Settings
    training: bool
    lengths: Tensor | None
    reset: Tensor | None
    all_states: bool
    given: Given


def _direction(
    call: _Call,
    piece: Piece,
    i: int,
    reverse: bool,
    x: Tensor,
    start: tuple[Tensor, ...],
    cut: tuple[Tensor, ...],
) -> CellOutputs:
    """Layer and direction number i: what the cell makes of its input, then the layer."""
    cell, spec, s, training, lengths, reset, all_states, given = call
    steps = complete(cell, spec, given, i, training, x, s.hidden) if spec.steps else ()
    w_ih: Tensor | None = piece.w_ih
    b_ih = piece.b_ih
    if spec.enters:
        entered = cell.enter(x, training)
        if entered.shape != x.shape:
            raise ValueError(f"{spec.name}.enter must keep the shape {list(x.shape)}, got {list(entered.shape)}")
        x = entered
    if spec.projects:
        valid = masks.valid_mask(lengths, x.shape[0], x.device)
        x = x if valid is None else x.masked_fill(~valid, 0)  # NaN in padding would reach the gradient of W_ih
        gx = F.linear(x, piece.w_ih, b_ih)
        x, w_ih, b_ih = cell.project(gx, lengths, training, **piece.modules), None, None
        if x.shape != gx.shape:
            raise ValueError(f"{spec.name}.project must keep the shape {list(gx.shape)}, got {list(x.shape)}")
    t = CellInputs(x, start, w_ih, b_ih, piece.b_hh, piece.weights, piece.units, steps, lengths, reset, cut)
    return layer.run(spec, s.hidden, t, CellOptions(reverse, all_states, s.recompute, s.heads), s.backend)


def _layout(s: Settings, input: Any) -> Layout:
    """The input's, its sizes checked."""
    packed = type(input) is not Tensor and isinstance(input, PackedSequence)
    if not packed and not isinstance(input, Tensor):
        checks.expect_tensor(input, "input", "[B, T, I]" if s.batch_first else "[T, B, I]")
    if not packed and input.is_nested:
        checks.expect_jagged(input)
    elif not packed:
        checks.expect_dense(input, "input")
    data: Tensor = input.data if packed else input
    if data.dim() != 2 and (packed or data.dim() != 3):
        wanted = "2 dimensions of data in a PackedSequence" if packed else "2 or 3 dimensions"
        raise ValueError(f"input must have {wanted}, got {data.dim()}: {list(data.shape)}")
    layout = layout_of(input, s.batch_first)
    if layout.x.shape[-1] != s.input_size:
        raise ValueError(f"input must have input_size = {s.input_size} features, got {layout.x.shape[-1]}")
    if layout.steps == 0:
        raise ValueError("the sequence must have at least one step, got T = 0")
    if not layout.x.is_floating_point():
        raise TypeError(f"input must be of a floating dtype, got {layout.x.dtype}")
    return layout


def _lengths(layout: Layout, batch_first: bool, lengths: Any) -> Tensor | None:
    """int64 [B] on the input's device, or None."""
    if lengths is None:
        return layout.lengths
    if layout.packed or layout.lengths is not None:
        kind = "PackedSequence" if layout.packed else "nested tensor"
        raise ValueError(f"lengths must be None with a {kind}, which brings its own")
    if layout.dims == 3:
        checks.expect_length_per_row(lengths, layout.rows, layout.steps, batch_first)
    elif isinstance(lengths, Tensor) and lengths.dim() == 0:
        lengths = lengths[None]
    return checks.lengths_of(lengths, layout.rows, layout.steps, layout.x.device)


def _states(spec: CellSpec, layout: Layout, state: Any, name: str, count: int, hidden: int) -> list[Tensor] | None:
    """A state in hx's form as a list of [L·D, B, H] in our order of rows, or None."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        checks.expect_no_lengths(state)
    names = spec.states
    if len(names) == 1:
        some: Sequence[Any] = [state]
        if not isinstance(state, Tensor):
            raise TypeError(f"{name} must be one tensor, {names[0]} of {spec.name}, got {type(state).__name__}")
    else:
        some = state
        if not isinstance(state, tuple | list) or len(state) != len(names):
            got = f"{len(state)} items" if isinstance(state, tuple | list) else type(state).__name__
            raise TypeError(f"{name} must be ({', '.join(names)}), the states of {spec.name}, got {got}")
    batched = layout.dims == 3 or layout.packed
    form, wanted = ("[L·D, B, H]", (count, layout.rows, hidden)) if batched else ("[L·D, H]", (count, hidden))
    found = []
    for k, v in enumerate(some):
        checks.expect_shape(v, name if len(names) == 1 else f"{name}[{k}]", form, wanted)
        found.append(layout.states_to_internal(v))
    return found  # type: ignore[return-value]


def _expect_piece(spec: CellSpec, s: Settings, piece: Piece, i: int) -> None:
    """A layer's parameters against the sizes that the stack was made with."""
    h, layers = s.hidden, i // s.directions
    width = s.input_size if layers == 0 else s.directions * h
    rows, each = spec.gates * h, h // s.heads
    if piece.w_ih.shape != (rows, width):
        checks.expect_shape(piece.w_ih, f"weight_ih of layer {layers}", "[G·H, I]", (rows, width))
    for b, name in ((piece.b_ih, "bias_ih"), (piece.b_hh, "bias_hh")):
        if b is not None and b.shape != (rows,):
            checks.expect_shape(b, f"{name} of layer {layers}", "[G·H]", (rows,))
    for w, (name, blocks) in zip(piece.weights, spec.weights, strict=True):
        if w.shape != (blocks * h, each):
            checks.expect_shape(w, f"{name} of layer {layers}", "[blocks·H, H/heads]", (blocks * h, each))
    for u, name in zip(piece.units, spec.units, strict=True):
        if u.shape != (h,):
            checks.expect_shape(u, f"{name} of layer {layers}", "[H]", (h,))


def _expect_alike(spec: CellSpec, x: Tensor, pieces: Sequence[Piece], states: Sequence[Tensor], given: Given) -> None:
    """One dtype and one device, any dtype under autocast. Of inputs of the steps, masks may be of bool or integers."""
    dtype, device = x.dtype, x.device
    every = [v for w_ih, b_ih, b_hh, weights, units, _ in pieces for v in (w_ih, b_ih, b_hh, *weights, *units)]
    for some in (every, states, *given.values()):
        for v in some:
            if v is not None and (v.dtype != dtype or v.device != device):
                return _say_unlike(spec, x, pieces, states, given)
    return None


def _say_unlike(spec: CellSpec, x: Tensor, pieces: Sequence[Piece], states: Sequence[Tensor], given: Given) -> None:
    """Raise for the first that does not fit, with its name, if one does not."""
    others: list[tuple[str, Tensor | None]] = []
    for w_ih, b_ih, b_hh, weights, units, _ in pieces:
        others += [("weight_ih", w_ih), ("bias_ih", b_ih), ("bias_hh", b_hh)]
        others += [(name, w) for (name, _), w in zip(spec.weights, weights, strict=True)]
        others += zip(spec.units, units, strict=True)
    others += [("a state", v) for v in states]
    for name, some in given.items():
        others += [(name, v if v.is_floating_point() else v.to(x.dtype)) for v in some]
    checks.expect_same(x, [name for name, _ in others], [v for _, v in others])


def _stacked(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Of every layer and direction, state by state."""
    return [torch.stack(some) for some in zip(*parts, strict=True)]


def _some(states: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return states[0] if len(states) == 1 else tuple(states)
