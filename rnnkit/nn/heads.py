"""`heads=n` of the built-in layers: a block-diagonal W_hh of n blocks of H/n, which alone `weight_hh_*` holds.

G gates, H hidden size, n heads. Unit j of each gate, in head j // (H/n), takes from h the H/n units of that head. What
runs is the layer's equations written as a custom cell, so every backend of custom cells serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from ..backends import check_name
from ..custom import choose, stack
from ..custom.declare import Cell, CellSpec, spec_of
from ..custom.stack import Piece, Settings


class Equations(NamedTuple):
    """A built-in cell as a custom one."""

    cell: Cell
    spec: CellSpec


_EQUATIONS: dict[str, Equations] = {}
"""By the built-in cell's name. Empty until a layer has heads: most programs never need the cells."""


def prepare() -> None:
    """Make the equations, once. Before any call, so that a compiler sees a plain look-up."""
    if not _EQUATIONS:
        from .. import variants

        cells: dict[str, Cell] = {
            "lstm": variants.LSTM(),
            "gru": variants.GRU(),
            "gru_reset_before": variants.GRUResetBefore(),
            "rnn_tanh": variants.RNN(),
            "rnn_relu": variants.RNN(activation="relu"),
        }
        _EQUATIONS.update({name: Equations(cell, spec_of(cell)) for name, cell in cells.items()})


def expect_fit(heads: object, hidden_size: object, proj_size: object, backend: str) -> None:
    """Raise where a layer cannot have these heads. What is wrong with the sizes themselves torch says."""
    checks.expect_count(heads, "heads", 1)
    if heads == 1:
        return
    check_name(backend)
    if isinstance(hidden_size, int) and hidden_size % heads:  # type: ignore[operator]
        raise ValueError(f"hidden_size = {hidden_size} must be a multiple of heads = {heads}")
    if proj_size:
        raise ValueError(f"heads={heads} cannot be had with a projection, got proj_size={proj_size}; leave out one")
    if backend not in choose.NAMES:
        raise NotImplementedError(
            f"a layer with heads={heads} runs as a custom cell, which backend {backend!r} cannot; choose one of "
            f"{', '.join(choose.NAMES)}"
        )


def narrow(layer: nn.RNNBase, heads: int) -> None:
    """Put blocks [G·H, H/n] in the place of each W_hh [G·H, H] that torch has just made and not yet filled."""
    prepare()
    for name, w in layer._parameters.items():
        if name.startswith("weight_hh") and w is not None:
            layer._parameters[name] = Parameter(w.new_empty(w.shape[0], w.shape[1] // heads))


def run(
    layer: Any,
    cell: str,
    weights: Sequence[Any],
    input: Tensor | PackedSequence,
    hx: Any,
    lengths: Tensor | None,
    reset: Tensor | PackedSequence | None,
    reset_state: Any,
    return_all_states: bool,
) -> Any:
    """A whole call of `layer`, a RecurrentLayer with heads. weights: in torch's order, of this moment."""
    if _exporting_to_onnx():
        raise NotImplementedError(
            f"ONNX has no {layer.TORCH_NAME} with heads={layer.heads}; a layer with one head, whose weight_hh is the "
            "block-diagonal matrix, computes the same and can be exported"
        )
    found = _EQUATIONS[cell]
    settings = Settings(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        2 if layer.bidirectional else 1,
        layer.batch_first,
        layer.dropout,
        layer.heads,
        layer.recompute,
        layer.backend,
    )
    return stack.run(
        found.cell,
        found.spec,
        settings,
        _pieces(layer, cell, found.spec.gates, weights),
        input,
        hx,
        layer.training,
        lengths,
        reset,
        reset_state,
        return_all_states,
        {},
    )


def _exporting_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# Asked while torch.compile traces, which takes torch's own function for False. As in `choose_by_key`.
_exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _pieces(layer: Any, cell: str, gates: int, weights: Sequence[Any]) -> list[Piece]:
    """What each layer and direction has, as its equations name it."""
    h, names = layer.hidden_size, layer._flat_weights_names
    blocks, biased = (gates * h, h // layer.heads), layer.bias
    found = []
    for k in range(0, len(weights), 4 if biased else 2):
        w_ih, w_hh = weights[k], weights[k + 1]
        checks.expect_shape(w_ih, names[k], "[G·H, I or D·H]", (gates * h, _width(layer, k)))
        checks.expect_shape(w_hh, names[k + 1], "[G·H, H/heads]", blocks)
        b_ih: Tensor | None = None
        b_hh: Tensor | None = None
        if biased:
            b_ih, b_hh = weights[k + 2], weights[k + 3]
            checks.expect_shape(b_ih, names[k + 2], "[G·H]", blocks[:1])
            checks.expect_shape(b_hh, names[k + 3], "[G·H]", blocks[:1])
        parts: tuple[Tensor, ...] = (w_hh,)
        if cell == "gru_reset_before":  # r and z take h, n takes r h: two products, and b_hh is just a sum
            parts = w_hh[: 2 * h], w_hh[2 * h :]
            b_ih, b_hh = (None if b_ih is None or b_hh is None else b_ih + b_hh), None
        found.append(Piece(w_ih, b_ih, b_hh, parts, (), {}))
    return found


def _width(layer: Any, k: int) -> int:
    """Columns of the W_ih that is number k of all weights."""
    directions = 2 if layer.bidirectional else 1
    first = k // (4 if layer.bias else 2) < directions
    return layer.input_size if first else layer.hidden_size * directions
