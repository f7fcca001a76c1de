"""Every check of shapes, dtypes, devices and values, in one form: what was got, what was expected, the way out.

Sizes, ranks and values raise ValueError, types and dtypes TypeError. `BadInput` marks the mistakes that torch.nn's
layers know too: the modules let torch raise first there, so that a program sees the exception it saw before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .autocast import autocasting
from .backends import LayerInputs, LayerOptions
from .cells import CELLS, Cell


class BadInput(Exception):
    """A mistake in what torch.nn's layers take too: input, initial states, weights."""


class BadValue(BadInput, ValueError):
    """A size, a rank or a value."""


class BadType(BadInput, TypeError):
    """A type or a dtype."""


class BadDevice(BadInput, RuntimeError):
    """Tensors on different devices; torch raises RuntimeError too."""


def shape(v: Tensor) -> list[int]:
    return list(v.shape)


def can_read_values(v: Tensor) -> bool:
    """Whether values can be looked at without a copy to the host or a break in a graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return type(v) is Tensor and v.device.type == "cpu" and torch._C._len_torch_dispatch_stack() == 0


# Bound once: together these questions must cost less than a microsecond.
_compiling = torch.compiler.is_compiling
_tracing = torch._C._is_tracing
transforming = torch._C._are_functorch_transforms_active
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack  # TorchFunctionModes, a default device among them


def only_default_devices() -> bool:
    """Whether every function mode is a default device (torch.set_default_device), which existing tensors do not see."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def is_plain_eager(*given: object) -> bool:
    """Whether a call with these tensors is an ordinary eager one, which a backend's operators may take directly.

    Not while torch compiles, exports or traces; not under a functorch transform, forward mode or a dispatch mode; not
    for subclasses of Tensor. Autocast is the caller's to ask for.
    """
    if _compiling() or _tracing() or transforming() or dispatch_modes() or forward_ad._current_level >= 0:
        return False
    for v in given:  # noqa: SIM110 (a loop costs half of what all() does)
        if type(v) is not Tensor and type(v) is not Parameter and v is not None:
            return False
    return True


def expect_tensor(v: object, name: str, form: str) -> None:
    if not isinstance(v, Tensor):
        raise BadType(f"{name} must be a tensor {form}, got {type(v).__name__}")


def expect_dense(v: Tensor, name: str, kind: type[Exception] = TypeError) -> None:
    if v.is_nested:
        way = "pass it to a layer as its input, or pad it, torch.nested.to_padded_tensor, and pass lengths"
        raise kind(f"{name} must be a dense tensor, got a nested one; {way}")
    if v.layout is not torch.strided:
        raise kind(f"{name} must be a dense tensor, got {v.layout}; pass {name}.to_dense()")


def expect_jagged(input: Tensor) -> None:
    """Of nested tensors [B, j, I] of layout torch.jagged, without gaps between the rows."""
    if input.layout is not torch.jagged:
        raise BadType(
            f"a nested input must be of layout torch.jagged, got {input.layout}; pass "
            "torch.nested.as_nested_tensor(list(input.unbind()), layout=torch.jagged)"
        )
    if input.dim() != 3 or getattr(input, "_ragged_idx", 1) != 1:
        raise BadValue(f"a nested input must be [B, j, I], ragged in its second dimension, got {list(input.shape)}")
    if input.lengths() is not None:  # type: ignore[attr-defined]
        raise BadValue("a nested input must have no gaps between its rows; pass input.contiguous()")


def expect_bool(v: object, name: str) -> None:
    if not isinstance(v, bool):
        raise TypeError(f"{name} must be True or False, got {v!r}")


def expect_rows(x: object) -> None:
    expect_tensor(x, "x", "[B, I]")
    expect_dense_rows(x)  # type: ignore[arg-type]
    if x.dim() != 2:  # type: ignore[attr-defined]
        raise BadValue(f"x must be [B, I], got {x.dim()} dimensions: {shape(x)}")  # type: ignore[attr-defined,arg-type]


def expect_dense_rows(x: Tensor) -> None:
    """A cell makes one step."""
    if x.is_nested:
        raise BadType("a cell takes one step of dense rows [B, I], got a nested tensor; pass it to a layer")


def expect_shape(v: object, name: str, form: str, wanted: tuple[int, ...], kind: type[Exception] = BadValue) -> None:
    """`form` names the dimensions, such as [B, H]; `wanted` are their sizes."""
    if not isinstance(v, Tensor):
        raise (BadType if issubclass(kind, BadInput) else TypeError)(
            f"{name} must be a tensor {form}, got {type(v).__name__}"
        )
    if v.shape != wanted:
        raise kind(f"{name} must be {form} = {list(wanted)}, got {shape(v)}")


def cell_named(name: str) -> Cell:
    if name not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}; got {name!r}")
    return CELLS[name]


def expect_values(v: Tensor, name: str, device: torch.device) -> None:
    """Of what is moved to the input's device: a meta tensor has nothing to move."""
    if v.device.type == "meta" and device.type != "meta":
        raise RuntimeError(f"{name} is on meta, input on {device}; move one")


def lengths_of(lengths: object, rows: int, steps: int, device: torch.device) -> Tensor:
    """`lengths` as int64 [B] on the device, within [0, T]."""
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"lengths must be a tensor of integers [B={rows}], got {type(lengths).__name__}; "
            "pass torch.as_tensor(lengths)"
        )
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        if lengths.dtype == torch.bool:
            way = "; of a mask of valid steps pass mask.sum(0), with batch_first mask.sum(1)"
        else:
            way = "; pass lengths.long()" if lengths.is_floating_point() else ""
        raise TypeError(f"lengths must hold integers, got {lengths.dtype}{way}")
    expect_dense(lengths, "lengths")
    if tuple(lengths.shape) != (rows,):
        raise ValueError(f"lengths must be [B] = [{rows}], got {shape(lengths)}")
    expect_values(lengths, "lengths", device)
    whole = lengths.to(torch.int64)  # before T is compared: an int8 would wrap it, unsigned types know no order
    if can_read_values(lengths) and lengths.numel():
        wrong = (whole < 0) | (whole > steps)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"lengths must lie in [0, T={steps}], got {int(whole[row])} at row {row}")
        return whole.to(device)
    return whole.to(device).clamp(0, steps)


def expect_length_per_row(lengths: object, rows: int, steps: int, batch_first: bool) -> None:
    """Of a batch as the caller laid it out: with a length for each step, B and T were taken for one another."""
    if isinstance(lengths, Tensor) and lengths.dim() == 1 and lengths.shape[0] != rows and lengths.shape[0] == steps:
        read, other = ("[B, T, I]", "[T, B, I]") if batch_first else ("[T, B, I]", "[B, T, I]")
        raise ValueError(
            f"lengths must be [B] = [{rows}], got {shape(lengths)}; the input is read as {read}; "
            f"batch_first={not batch_first} reads {other}"
        )


def reset_of(reset: object, steps: int, rows: int, device: torch.device) -> Tensor:
    """`reset` as bool [T, B] on the device."""
    if not isinstance(reset, Tensor):
        raise TypeError(
            f"reset must be a tensor [T={steps}, B={rows}] of 0 and 1, got {type(reset).__name__}; "
            "pass torch.as_tensor(reset)"
        )
    if reset.is_complex():
        raise TypeError(f"reset must hold 0 and 1 in a real dtype, got {reset.dtype}")
    expect_dense(reset, "reset")
    if reset.dim() == 3 and reset.shape[-1] == 1:
        reset = reset.squeeze(-1)
    if tuple(reset.shape) != (steps, rows):
        raise ValueError(f"reset must be [T, B] = [{steps}, {rows}], got {shape(reset)}")
    expect_values(reset, "reset", device)
    if reset.dtype == torch.bool:
        return reset.to(device=device)
    if can_read_values(reset) and reset.numel():
        wrong = (reset != 0) & (reset != 1)
        if bool(wrong.any()):
            t, b = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(f"reset must hold 0 and 1, got {reset[t, b].item()} at step {t}, row {b}")
    return (reset != 0).to(device=device)


def states_of(cell: Cell, state: object, name: str) -> tuple[Tensor | None, Tensor | None]:
    """A state in hx's form as (h, c): a tensor, or a pair for an LSTM, or None."""
    if state is None:
        return None, None
    bad: type[Exception] = BadType if name == "hx" else TypeError
    if not cell.has_c:
        if isinstance(state, Tensor):
            return state, None
        raise bad(f"{name} must be one tensor for {cell.name}, got {type(state).__name__}")
    if (type(state) is not tuple and not isinstance(state, tuple | list)) or len(state) != 2:
        got = f"{len(state)} items" if isinstance(state, tuple | list) else type(state).__name__
        raise bad(f"{name} must be a pair (h, c) for {cell.name}, got {got}")
    h, c = state
    if not (isinstance(h, Tensor) and isinstance(c, Tensor)):
        k = int(isinstance(h, Tensor))
        raise bad(f"{name}[{k}] must be a tensor, got {type(state[k]).__name__}")
    return h, c


def expect_no_lengths(hx: Tensor) -> None:
    """Of hx of a layer: whole numbers [B] are lengths in the wrong place."""
    if hx.dim() == 1 and hx.dtype != torch.bool and not (hx.is_floating_point() or hx.is_complex()):
        raise BadType(f"hx must be a state, got {shape(hx)} of {hx.dtype}; lengths go by keyword: lengths=...")


def _weights(cell: Cell, weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """w_ih, w_hh, b_ih, b_hh, w_hr with None for what is absent, each of a size that fits the others."""
    if not isinstance(weights, list | tuple):
        raise BadType(f"weights must be a list of tensors, got {type(weights).__name__}")
    n = len(weights)
    if n not in (2, 3, 4, 5) or (n in (3, 5) and not cell.has_c):
        most = "2 or 4 weights (3 or 5 with a projection)" if cell.has_c else "2 or 4 weights"
        raise BadValue(f"a layer of {cell.name} has {most}: w_ih, w_hh[, b_ih, b_hh]; got {n}")
    for k, w in enumerate(weights):
        if not isinstance(w, Tensor):
            expect_tensor(w, f"weight {k} of {cell.name}", "")
    w_ih, w_hh, *others = weights
    w_hr = others.pop() if n in (3, 5) else None
    b_ih, b_hh = others or (None, None)
    if w_ih.dim() != 2 or w_hh.dim() != 2 or w_hh.shape[0] % cell.gates:
        raise BadValue(
            f"w_ih must be [{cell.gates}·H, I] and w_hh [{cell.gates}·H, H], got {shape(w_ih)} and {shape(w_hh)}"
        )
    rows, size = w_hh.shape
    hidden = rows // cell.gates
    if w_ih.shape[0] != rows:
        expect_shape(w_ih, "w_ih", f"[{cell.gates}·H, I]", (rows, w_ih.shape[1]))
    if w_hr is not None:
        expect_shape(w_hr, "w_hr", "[P, H]", (size, hidden))
    elif size != hidden:
        expect_shape(w_hh, "w_hh", f"[{cell.gates}·H, H]", (rows, hidden))
    if b_ih is not None and b_hh is not None and not (b_ih.shape == b_hh.shape == (rows,)):
        expect_shape(b_ih, "b_ih", f"[{cell.gates}·H]", (rows,))
        expect_shape(b_hh, "b_hh", f"[{cell.gates}·H]", (rows,))
    return w_ih, w_hh, b_ih, b_hh, w_hr


def expect_reset(reset: object) -> None:
    """Where there is a reset_state."""
    if reset is None:
        raise ValueError("reset_state says what a reset puts in place, so it needs reset; got reset=None")


def layer(
    cell: str,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | Sequence[Tensor] | None = None,
    reverse: bool = False,
    all_states: bool = False,
    recompute: bool = False,
) -> tuple[LayerInputs, LayerOptions]:
    """The arguments of `ops.layer`, checked. Initial states that are missing stay None."""
    kind = cell_named(cell)
    expect_bool(reverse, "reverse")
    expect_bool(all_states, "all_states")
    expect_bool(recompute, "recompute")
    expect_tensor(x, "x", "[T, B, I]")
    if x.dim() != 3:
        raise BadValue(f"x must be [T, B, I], got {x.dim()} dimensions: {shape(x)}")
    w_ih, w_hh, b_ih, b_hh, w_hr = _weights(kind, weights)
    assert w_ih is not None and w_hh is not None  # two weights at least, checked above
    steps, rows, features = x.shape
    hidden, size = w_ih.shape[0] // kind.gates, w_hh.shape[1]
    if features != w_ih.shape[1]:
        raise BadValue(f"x must have I = {w_ih.shape[1]} features as w_ih has, got {features}")
    if c_0 is not None and not kind.has_c:
        raise BadValue(f"{cell} has no cell state, so c_0 must be None")
    if h_0 is not None:
        expect_shape(h_0, "h_0", "[B, P]" if w_hr is not None else "[B, H]", (rows, size))
    if c_0 is not None:
        expect_shape(c_0, "c_0", "[B, H]", (rows, hidden))
    if lengths is not None:
        lengths = lengths_of(lengths, rows, steps, x.device)
    h_r = c_r = None
    if reset_state is not None:
        expect_reset(reset)
        h_r, c_r = states_of(kind, reset_state, "reset_state")
        expect_shape(h_r, "reset_state", "[B, P]" if w_hr is not None else "[B, H]", (rows, size), ValueError)
        if kind.has_c:
            expect_shape(c_r, "reset_state[1]", "[B, H]", (rows, hidden), ValueError)
    if reset is not None:
        reset = reset_of(reset, steps, rows, x.device)
    expect_same(x, _NAMES, (w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_r, c_r))
    t = LayerInputs(x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, h_r, c_r)  # type: ignore[arg-type]
    return t, LayerOptions(reverse, all_states, recompute)


_NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h_0", "c_0", "reset_state", "reset_state[1]")


def expect_same(x: Tensor, names: Sequence[str], others: Sequence[Tensor | None]) -> None:
    """One floating dtype (any under autocast) and one device. `names` are those of `others`, w_ih first."""
    dtype, device = x.dtype, x.device
    w_ih: Tensor = others[0]  # type: ignore[assignment]
    if w_ih.is_complex():
        raise BadType("complex numbers are not supported; rnnkit.revert(layer) gives torch's layer")
    if not dtype.is_floating_point:
        raise BadType(f"x must be of a floating dtype, got {dtype}; pass x.to({w_ih.dtype})")
    expect_dense(x, "x", BadType)
    for name, v in zip(names, others, strict=True):
        if v is None:
            continue
        expect_dense(v, name, BadType)
        if v.device != device:
            raise BadDevice(f"x is on {device} and {name} on {v.device}; move one of them")
        if v.dtype != dtype and not autocasting(device.type):
            raise BadType(f"x is {dtype} and {name} {v.dtype}; convert one of them, or use torch.autocast")


def sequence(
    cell: str,
    dims: int,
    packed: bool,
    features: int,
    steps: int,
    rows: int,
    hx: tuple[Tensor | None, Tensor | None],
    weights: Sequence[Tensor],
    layers: int,
    directions: int,
    proj_size: int,
    name: str = "hx",
) -> None:
    """Sizes of a stack's input and of a state in hx's form (`name`), as the caller laid them out."""
    kind = cell_named(cell)
    width, wants = weights[0].shape
    hidden = width // kind.gates
    own = name == "hx"
    if own and not packed and steps == 0:
        raise BadValue("the sequence must have at least one step, got T = 0")
    if own and features != wants:
        raise BadValue(f"input must have input_size = {wants} features, got {features}")
    count = layers * directions
    batched = packed or dims == 3
    for k, v in enumerate(hx):
        if v is None:
            continue
        size = hidden if k else proj_size or hidden
        wanted = (count, rows, size) if batched else (count, size)
        if v.shape != wanted:
            label = f"{name}[{k}]" if kind.has_c else name
            form = "[L·D, B, P]" if proj_size and k == 0 else "[L·D, B, H]"
            form = form if batched else form.replace(" B,", "")
            expect_shape(v, label, form, wanted, BadValue if own else ValueError)


def expect_count(value: object, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadType(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise BadValue(f"{name} must be at least {least}, got {value}")


def stack(cell: str, weights: Sequence[Tensor], layers: int, directions: int, proj_size: int) -> list[Sequence[Tensor]]:
    """The flat list of weights, cut into one piece for each layer and direction."""
    kind = cell_named(cell)
    if type(weights) is not list and not isinstance(weights, list | tuple):
        raise BadType(f"weights must be a list of tensors, got {type(weights).__name__}")
    if type(layers) is not int or type(proj_size) is not int or layers < 1 or proj_size < 0:
        expect_count(layers, "num_layers", 1)
        expect_count(proj_size, "proj_size", 0)
    count = layers * directions
    each, rest = divmod(len(weights), count)
    expected = (3, 5) if proj_size else (2, 4)
    if rest or each not in expected:
        raise BadValue(
            f"{kind.name} with {layers} layers, {directions} direction(s) and proj_size={proj_size} has "
            f"{count * expected[0]} weights, or {count * expected[1]} with biases; got {len(weights)}"
        )
    for k, w in enumerate(weights):
        if type(w) is not Parameter and not isinstance(w, Tensor):
            raise BadType(f"weights[{k}] must be a tensor, got {type(w).__name__}")
    if weights[0].dim() != 2:
        raise BadValue(f"weights[0] must be w_ih [{kind.gates}·H, I], got {shape(weights[0])}")
    if proj_size and weights[each - 1].shape[:1] != (proj_size,):
        got = shape(weights[each - 1])
        raise BadValue(f"weights[{each - 1}] must be w_hr [P, H] with P = proj_size = {proj_size}, got {got}")
    return [weights] if count == 1 else [weights[k * each : (k + 1) * each] for k in range(count)]


def parameters(
    cell: str,
    names: Sequence[str],
    weights: Sequence[object],
    input_size: int,
    hidden_size: int,
    proj_size: int = 0,
    directions: int = 1,
) -> None:
    """A module's weights against the sizes that it was made with; names are its parameters', weight_ih_l0 or weight_ih,
    of which weights may have the first ones alone."""
    gates, size = cell_named(cell).gates, proj_size or hidden_size
    rows, n = gates * hidden_size, "P" if proj_size else "H"
    for name, v in zip(names, weights, strict=False):
        kind, _, place = name.partition("_l")  # place: 0, 0_reverse, 1, ...; empty of a cell
        width, i = (input_size, "I") if place in ("", "0", "0_reverse") else (directions * size, f"D·{n}")
        form, wanted = {
            "weight_ih": (f"[{gates}·H, {i}]", (rows, width)),
            "weight_hh": (f"[{gates}·H, {n}]", (rows, size)),
            "weight_hr": ("[P, H]", (size, hidden_size)),
        }.get(kind, (f"[{gates}·H]", (rows,)))
        expect_shape(v, name, form, wanted)


def probability(p: object) -> None:
    if (type(p) is not float and not isinstance(p, int | float)) or isinstance(p, bool):
        raise BadType(f"dropout must be a number, got {p!r}")
    if not 0 <= p <= 1:
        raise BadValue(f"dropout must lie in [0, 1], got {p}")


def weights_before_dropout(cell: str, x: Tensor, pieces: Sequence[Sequence[Tensor]], directions: int) -> None:
    """Every layer's weights, before the first random number is drawn; without dropout each layer's own turn does."""
    for k, piece in enumerate(pieces):
        w_ih, w_hh, b_ih, b_hh, w_hr = _weights(cell_named(cell), piece)
        assert w_ih is not None and w_hh is not None  # two weights at least, checked above
        width = x.shape[-1] if k < directions else directions * w_hh.shape[1]
        expect_shape(w_ih, f"w_ih of layer {k // directions}", "[G·H, I]", (w_ih.shape[0], width))
        expect_same(x, _NAMES[:5], (w_ih, w_hh, b_ih, b_hh, w_hr))


def cell_rows(input: object, hx: object, name: str) -> tuple[Tensor, object]:
    """A cell's unbatched input [I] and state with a batch dimension of 1. A batched input does not come here."""
    if isinstance(input, Tensor):
        expect_dense_rows(input)
    if not isinstance(input, Tensor) or input.dim() != 1:
        got = f"{input.dim()} dimensions" if isinstance(input, Tensor) else type(input).__name__
        raise BadValue(f"{name}: input must be a tensor [B, I] or [I], got {got}")
    if hx is None:
        return input.unsqueeze(0), None
    pair: list[Any] = list(hx) if isinstance(hx, tuple | list) else [hx]
    for v in pair:
        if not isinstance(v, Tensor) or v.dim() != 1:
            got = f"{v.dim()} dimensions" if isinstance(v, Tensor) else type(v).__name__
            raise BadValue(f"{name}: with an unbatched input, hx must be [H], got {got}")
    rows = [v.unsqueeze(0) for v in pair]
    return input.unsqueeze(0), tuple(rows) if isinstance(hx, tuple | list) else rows[0]
