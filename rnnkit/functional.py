"""Stateless recurrent layers: the stack of layers and directions over `ops.layer`, in any of torch.nn's layouts.

`lstm`, `gru` and `rnn` take weights as torch.nn's `_flat_weights` orders them; `lstm_cell`, `gru_cell` and
`rnn_cell` make one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import checks, ops
from .backends import BATCH_FIRST, STEP, TIME_MAJOR, UNBATCHED, LayerOptions, StackInputs, StackOptions
from .cells import CELLS, Cell
from .layer import stack as layer_stack
from .layer import streams
from .layer.overlap import at_once, directions_overlap
from .layouts import layout_of

State = Tensor | tuple[Tensor, Tensor]
Layer = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""What a layer gives in one direction: y, h_n, c_n, c_all."""
_STEPS = {cell: StackOptions(cell, layout=STEP) for cell in CELLS}


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | PackedSequence | None = None,
    reset_state: Tensor | None = None,
    return_all_states: bool = False,
    backend: str = "auto",
    recompute: bool = False,
) -> Any:
    """Vanilla RNN, tanh or relu. Arguments, results and errors as for `lstm`, with h alone for a state."""
    return stack(
        rnn_named(nonlinearity),
        input,
        hx,
        weights,
        num_layers,
        bidirectional,
        batch_first,
        dropout,
        training,
        0,
        lengths,
        reset,
        reset_state,
        return_all_states,
        backend,
        recompute,
    )


def lstm(
    input: Tensor | PackedSequence,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    proj_size: int = 0,
    lengths: Tensor | None = None,
    reset: Tensor | PackedSequence | None = None,
    reset_state: Sequence[Tensor] | None = None,
    return_all_states: bool = False,
    backend: str = "auto",
    recompute: bool = False,
) -> Any:
    """LSTM over a whole sequence.

    T steps, B rows, I input size, H hidden size, P projection size, L layers, D directions; N is P with a projection,
    else H.

    Args:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, a PackedSequence, or a nested tensor [B, j, I]
            of layout torch.jagged, with batch_first or without: a ragged batch that brings its lengths.
        hx: (h_0 [L·D, B, N], c_0 [L·D, B, H]), without B when unbatched; zeros where None.
        weights: as torch.nn's `_flat_weights`: for each layer and direction w_ih [4H, I or D·N], w_hh [4H, N],
            then b_ih, b_hh [4H] or neither, then w_hr [P, H] with a projection.
        dropout: probability with which each output of every layer but the last is zeroed, when `training`.
        lengths: [B] integers in [0, T], any order; row b is processed for its first lengths[b] steps, its output
            is 0 beyond, its final state is that after its last valid step. 0-d or [1] when unbatched. Values are
            checked on the CPU in eager mode; elsewhere they are clamped. Not with a PackedSequence or a nested
            tensor.
        reset: 0 and 1 in the input's leading layout, [T, B] or [B, T] or [T] (a trailing 1 is accepted), or a
            PackedSequence with the input's batch_sizes, or nested with its offsets. Where 1, the row's state is
            replaced before the step; in the backward direction the cut lies between the same two steps. This is
            `episode_starts` in recurrent PPO and `is_init` in TorchRL.
        reset_state: what a reset puts in place, in hx's form; zeros where None.
        return_all_states: also return every layer's states after every step.
        backend: a backend's name, or `auto`.
        recompute: keep y, and c of an LSTM, alone for the backward, which goes in short ranges of time and makes the
            gates of each again: least memory, for about a forward more of work.

    Returns:
        output [T, B, D·N] in the input's layout (nested: with the input's offsets);
        (h_n [L·D, B, N], c_n [L·D, B, H]); and with return_all_states (h_all [L·D, T, B, N], c_all [L·D, T, B, H]),
        [L·D, B, T, ·] with batch_first, without B when unbatched.

    Raises:
        ValueError: sizes, ranks, values.
        TypeError: types, dtypes.
        NotImplementedError: a named backend that cannot run this layer, with its reasons.
    """
    return stack(
        "lstm",
        input,
        hx,
        weights,
        num_layers,
        bidirectional,
        batch_first,
        dropout,
        training,
        proj_size,
        lengths,
        reset,
        reset_state,
        return_all_states,
        backend,
        recompute,
    )


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    reset_after: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | PackedSequence | None = None,
    reset_state: Tensor | None = None,
    return_all_states: bool = False,
    backend: str = "auto",
    recompute: bool = False,
) -> Any:
    """GRU. `reset_after=True` is torch.nn's; False is the original, whose reset gate acts on h before the product.

    Arguments, results and errors as for `lstm`, with h alone for a state.
    """
    return stack(
        gru_named(reset_after),
        input,
        hx,
        weights,
        num_layers,
        bidirectional,
        batch_first,
        dropout,
        training,
        0,
        lengths,
        reset,
        reset_state,
        return_all_states,
        backend,
        recompute,
    )


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    backend: str = "auto",
) -> Tensor:
    """One step of a vanilla RNN: input [B, I], hx [B, H] or None, weights w_ih, w_hh and maybe b_ih, b_hh -> [B, H]."""
    return step(rnn_named(nonlinearity), input, hx, weights, backend)


def lstm_cell(
    input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: input [B, I], hx (h [B, H], c [B, H]) or None -> h, c."""
    return step("lstm", input, hx, weights, backend)


def gru_cell(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], *, reset_after: bool = True, backend: str = "auto"
) -> Tensor:
    """One step of a GRU: input [B, I], hx [B, H] or None -> [B, H]."""
    return step(gru_named(reset_after), input, hx, weights, backend)


def step(cell: str, input: Tensor, hx: Any, weights: Sequence[Tensor], backend: str) -> Any:
    """What `lstm_cell`, `gru_cell` and `rnn_cell` have in common, the cell by its name, for the modules."""
    kind = CELLS[cell]
    states = _pair(kind, hx)
    if states is not None:
        tensors = StackInputs(input, *states)
        found = layer_stack.run(_STEPS[cell], backend, tensors, weights, layer_by_layer)
        if found is not None:
            return tuple(found) if kind.has_c else found[0]
    h, c = checks.states_of(kind, hx, "hx")
    h_n, c_n = ops.step(cell, input, h, c, weights, backend=backend)
    return (h_n, c_n) if kind.has_c else h_n


def rnn_named(name: str) -> str:
    """The cell of this nonlinearity."""
    if name == "tanh":
        return "rnn_tanh"
    if name == "relu":
        return "rnn_relu"
    raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {name!r}")


def gru_named(reset_after: bool) -> str:
    """The cell with the reset gate after the product, or before it."""
    if reset_after is not True:
        checks.expect_bool(reset_after, "reset_after")
    return "gru" if reset_after else "gru_reset_before"


def stack(
    cell: str,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    proj_size: int,
    lengths: Tensor | None,
    reset: Tensor | PackedSequence | None,
    reset_state: Any,
    return_all_states: bool,
    backend: str,
    recompute: bool,
) -> Any:
    """What `lstm`, `gru` and `rnn` have in common: the cell by its name, every argument by place. For the modules."""
    kind = CELLS[cell]
    directions = 2 if bidirectional else 1
    known = type(num_layers) is type(proj_size) is int and type(dropout) in (int, float) and 0 <= dropout <= 1
    bools = type(bidirectional) is type(batch_first) is type(return_all_states) is type(recompute) is bool
    if known and bools and num_layers > 0 and proj_size >= 0 and (reset_state is None or reset is not None):
        form = _form(input, batch_first)
        drops = float(dropout) if training and num_layers > 1 else 0.0
        how = StackOptions(cell, num_layers, directions, proj_size, form, return_all_states, recompute, drops)
        states, again = _pair(kind, hx), _pair(kind, reset_state)
        if type(lengths) is Tensor and lengths.dtype in _WHOLE:
            lengths = lengths.long()
        ready = type(reset) is not Tensor or reset.dtype is torch.bool  # others are made so below
        if states is not None and again is not None and ready:
            tensors = StackInputs(input, *states, lengths, reset, *again)  # type: ignore[arg-type]
            found = layer_stack.run(how, backend, tensors, weights, layer_by_layer)
            if found is not None:
                return _results(kind, found)
    checks.probability(dropout)
    pieces = checks.stack(cell, weights, num_layers, directions, proj_size)
    packed = type(input) is not Tensor and isinstance(input, PackedSequence)
    nested = not packed and isinstance(input, Tensor) and input.is_nested
    if nested:
        checks.expect_jagged(input)  # type: ignore[arg-type]
    data: Tensor = input.data if packed else input.values() if nested else input  # type: ignore[union-attr,assignment]
    if not isinstance(data, Tensor):
        checks.expect_tensor(data, "input", "[B, T, I]" if batch_first else "[T, B, I]")
    dims = data.dim()
    if dims != 2 and (packed or dims != 3):
        expected = "2 dimensions of data in a PackedSequence" if packed else "2 or 3 dimensions"
        raise checks.BadValue(f"input must have {expected}, got {dims}: {list(data.shape)}")

    layout = layout_of(input, batch_first)
    sizes = (layout.dims, packed or nested, data.shape[-1], layout.steps, layout.rows)
    if isinstance(hx, Tensor):
        checks.expect_no_lengths(hx)
    h_0, c_0 = checks.states_of(kind, hx, "hx")
    checks.sequence(cell, *sizes, (h_0, c_0), weights, num_layers, directions, proj_size)
    h_r = c_r = None
    checks.expect_bool(return_all_states, "return_all_states")
    checks.expect_bool(recompute, "recompute")
    if reset_state is not None:
        checks.expect_reset(reset)
        h_r, c_r = checks.states_of(kind, reset_state, "reset_state")
        checks.sequence(cell, *sizes, (h_r, c_r), weights, num_layers, directions, proj_size, "reset_state")
    if lengths is not None:
        if packed or nested:
            kind_of_input = "PackedSequence" if packed else "nested tensor"
            raise ValueError(f"lengths must be None with a {kind_of_input}, which brings its own")
        if layout.dims == 2 and isinstance(lengths, Tensor) and lengths.dim() == 0:
            lengths = lengths[None]
        if layout.dims == 3:
            checks.expect_length_per_row(lengths, layout.rows, layout.steps, batch_first)
    reset_mask = None if reset is None else layout.reset_mask(reset)
    if layout.dims == 2:
        h_0, c_0, h_r, c_r = (layout.states_to_internal(v) for v in (h_0, c_0, h_r, c_r))
    lengths = lengths if layout.lengths is None else layout.lengths

    if lengths is not None and checks.can_read_values(layout.x):
        lengths = checks.lengths_of(lengths, layout.rows, layout.steps, layout.x.device)
    if reset_mask is not None and checks.can_read_values(layout.x):
        reset_mask = checks.reset_of(reset_mask, layout.steps, layout.rows, layout.x.device)
    drops = dropout if training and num_layers > 1 else 0
    if drops:
        checks.weights_before_dropout(cell, layout.x, pieces, directions)

    inner = StackOptions(
        cell, num_layers, directions, proj_size, TIME_MAJOR, return_all_states, recompute, float(drops)
    )
    tensors = StackInputs(layout.x, h_0, c_0, lengths, reset_mask, h_r, c_r)
    found = None
    if not (drops and (packed or nested)):  # whose dropout is drawn over the values alone
        found = layer_stack.run(inner, backend, tensors, weights, layer_by_layer)
    if found is None:
        run = functools.partial(ops.layer, backend=backend)
        found = layer_by_layer(inner, run, tensors, weights, lambda y, k: layout.dropout(y, dropout), backend)
    y, last, *everything = _results(kind, found)
    return layout.output(y), _each(last, layout.states_to_caller), *(_each(v, layout.all_states) for v in everything)


def _form(input: Any, batch_first: bool) -> int:
    if type(input) is Tensor and input.dim() == 2:
        return UNBATCHED
    return BATCH_FIRST if batch_first else TIME_MAJOR


_ZEROS = (None, None)
_WHOLE = (torch.int32, torch.int16, torch.int8, torch.uint8)  # lengths' dtypes that become int64 without a question


def _pair(kind: Cell, state: Any) -> tuple[Tensor | None, Tensor | None] | None:
    """A state in hx's form as (h, c); None where it is in no such form."""
    if state is None:
        return _ZEROS
    if not kind.has_c:
        return state, None
    whole = type(state) is tuple and len(state) == 2 and state[0] is not None and state[1] is not None
    return state if whole else None


def _results(kind: Cell, found: Sequence[Tensor]) -> tuple:
    """y, the states, and with all_states those after every step, an LSTM's in pairs."""
    if not kind.has_c:
        return tuple(found)
    y, h_n, c_n, *everything = found
    return (y, (h_n, c_n), tuple(everything)) if everything else (y, (h_n, c_n))


def _each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    return (change(state[0]), change(state[1])) if isinstance(state, tuple) else change(state)


def layer_by_layer(
    o: StackOptions,
    run: Callable[..., Layer],
    t: StackInputs,
    weights: Sequence[Tensor],
    drop: layer_stack.Dropout,
    backend: str | None = None,
) -> list[Tensor]:
    """A call layer by layer, for what does not go as one: its outputs, as `layer_stack.run` gives them.

    run: `ops.layer`, or what stands for it. drop: dropout of the output of layer k. backend: by which a layer may also
    run as one, both directions of it, or both at once on a GPU; None: `run` does all.
    """
    cell, layers, directions, _, form, all_states, recompute, dropout = o
    x, h_0, c_0, lengths, reset, h_r, c_r = t
    if form == STEP:
        x, h_0, c_0 = x[None], None if h_0 is None else h_0[None], None if c_0 is None else c_0[None]
    elif form == UNBATCHED:
        x = x.unsqueeze(1)
        h_0, c_0, h_r, c_r = (None if v is None else v.unsqueeze(1) for v in (h_0, c_0, h_r, c_r))
        reset = None if reset is None else reset.unsqueeze(1)
        lengths = None if lengths is None else lengths.reshape(1)
    elif form == BATCH_FIRST:
        x, reset = x.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
    each = len(weights) // (layers * directions)
    finals: list[tuple[Tensor, Tensor | None]] = []
    everything: list[tuple[Tensor, Tensor | None]] = []

    def direction(k: int, d: int, x: Tensor) -> Layer:
        i = k * directions + d
        again = None
        if h_r is not None:
            again = h_r[i] if c_r is None else (h_r[i], c_r[i])
        return run(
            cell,
            x,
            None if h_0 is None else h_0[i],
            None if c_0 is None else c_0[i],
            weights[i * each : (i + 1) * each],
            lengths=lengths,
            reset=reset,
            reset_state=again,
            reverse=d == 1,
            all_states=all_states,
            recompute=recompute,
        )

    def whole(k: int, x: Tensor) -> Tensor | None:
        if backend is None or layers == 1 or not x.is_cpu:
            return None
        here = slice(k * directions, (k + 1) * directions)
        h, c, h_2, c_2 = (None if v is None else v[here] for v in (h_0, c_0, h_r, c_r))
        tensors = StackInputs(x, h, c, lengths, reset, h_2, c_2)
        one = StackOptions(cell, 1, directions, o.proj_size, TIME_MAJOR, all_states, recompute)
        own = weights[here.start * each : here.stop * each]
        found = layer_stack.run(one, backend, tensors, own, layer_by_layer)
        if found is None:
            return None
        left = iter(found)
        y, *rest = (next(left) if there else None for there in one.outputs)
        h_n, c_n, h_all, c_all = ([None] * directions if v is None else v for v in rest)  # [D, ...]
        finals.extend(zip(h_n, c_n, strict=True))  # type: ignore[arg-type]
        if all_states:
            everything.extend(zip(h_all, c_all, strict=True))  # type: ignore[arg-type]
        return y

    def both(k: int, x: Tensor) -> tuple[Layer, ...]:
        if backend is not None and streams.on_gpu(x):
            given, options = (h_0, c_0, h_r, c_r), LayerOptions(True, all_states, recompute)
            last = weights[(2 * k + 1) * each : (2 * k + 2) * each]
            if directions_overlap(
                cell, x, last, *given, lengths=lengths, reset=reset, options=options, backend=backend
            ):
                side = streams.side_stream_of(x)
                if side is not None:
                    return at_once(functools.partial(direction, k), x, side)
        return direction(k, 0, x), direction(k, 1, x)

    def layer(k: int, x: Tensor) -> Tensor:  # a function, so that nothing of a layer is held while the next one runs
        y = whole(k, x)
        if y is not None:
            return y
        ran = (direction(k, 0, x),) if directions == 1 else both(k, x)
        finals.extend((h_n, c_n) for _, h_n, c_n, _ in ran)
        if all_states:
            everything.extend((y, c_all) for y, _, _, c_all in ran)
        return ran[0][0] if directions == 1 else torch.cat([y for y, *_ in ran], -1)

    for k in range(layers):
        x = layer(k, x)
        if dropout and k < layers - 1:
            x = drop(x, k)

    states = _stacked(finals)
    if form == STEP:
        return [v[0] for v in states]
    rest = _stacked(everything) if all_states else []
    if form == UNBATCHED:
        return [x.squeeze(1), *(v.squeeze(1) for v in states), *(v.squeeze(2) for v in rest)]
    if form == BATCH_FIRST:
        return [x.transpose(0, 1), *states, *(v.transpose(1, 2) for v in rest)]
    return [x, *states, *rest]


def _stacked(parts: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """h, and c of an LSTM, of every layer and direction."""
    untracked = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    kinds = [[v for v in some if v is not None] for some in zip(*parts, strict=True)]
    if untracked and len(parts) == 1:  # a view would refuse detach_() elsewhere
        return [some[0][None] for some in kinds if some]
    return [torch.stack(some) for some in kinds if some]
