"""Whole problems and the oracle that they are held against: the mathematics of lengths, resets and states as the
plainest Python that computes it, one row, one step, one layer and one direction at a time, with the operators that
torch.nn's cells call. There are no masks and no batches in it, so it shares no idea with the code under test."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnkit
from rnnkit import checks
from rnnkit.backends import BACKENDS, BY_NAME, LayerInputs, describe

F32, F64 = torch.float32, torch.float64
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of layer: the cell's name in `ops.layer`, the class, what it takes, and how many blocks of H rows."""

    cell: str
    layer: str
    gates: int
    options: dict[str, Any] = field(default_factory=dict)
    proj: int = 0

    @property
    def has_c(self) -> bool:
        return self.cell == "lstm"


KINDS = {
    "rnn_tanh": Kind("rnn_tanh", "RNN", 1),
    "rnn_relu": Kind("rnn_relu", "RNN", 1, {"nonlinearity": "relu"}),
    "lstm": Kind("lstm", "LSTM", 4),
    "lstm_proj": Kind("lstm", "LSTM", 4, {"proj_size": 3}, proj=3),
    "gru": Kind("gru", "GRU", 3),
    "gru_reset_before": Kind("gru_reset_before", "GRU", 3, {"reset_after": False}),
}
KNOWN_TO_TORCH = [name for name in KINDS if name != "gru_reset_before"]


@dataclass(frozen=True)
class Case:
    """One problem. `layout` is time, batch, one (unbatched, so rows = 1) or packed (so lengths, none of them 0)."""

    kind: str
    layers: int = 1
    bidirectional: bool = False
    layout: str = "time"
    bias: bool = True
    steps: int = 6
    rows: int = 3
    inputs: int = 4
    hidden: int = 5
    lengths: tuple[int, ...] | None = None
    resets: tuple[tuple[int, int], ...] | None = None
    """(t, b) of every reset."""
    reset_state: bool = False
    hx: bool = True
    states: bool = False
    """return_all_states"""
    recompute: bool = False
    seed: int = 0

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def count(self) -> int:
        return self.layers * self.directions

    def valid(self, b: int) -> int:
        return self.steps if self.lengths is None else self.lengths[b]

    def lengths_tensor(self) -> Tensor | None:
        return None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int64)

    def reset_tensor(self) -> Tensor | None:
        if self.resets is None:
            return None
        marks = torch.zeros(self.steps, self.rows, dtype=torch.bool)
        for t, b in self.resets:
            marks[t, b] = True
        return marks

    def __str__(self) -> str:
        parts = [self.kind, f"L{self.layers}D{self.directions}", self.layout]
        for name in ("lengths", "resets"):
            if getattr(self, name) is not None:
                parts.append(name)
        flags = [name for name in ("reset_state", "states", "recompute") if getattr(self, name)]
        return "-".join(parts + flags + [f"no_{name}" for name in ("bias", "hx") if not getattr(self, name)])


EVERYTHING: dict[str, Any] = {
    "layers": 2,
    "bidirectional": True,
    "lengths": (4, 0, 6),
    "resets": ((2, 0), (3, 2), (5, 2)),
    "reset_state": True,
    "states": True,
}
"""What a case may have beside its sizes, all at once."""
EMULATED: dict[str, Any] = {
    "bidirectional": True,
    "steps": 4,
    "rows": 3,
    "lengths": (4, 0, 3),
    "resets": ((0, 0), (2, 0), (1, 2), (3, 2)),
    "reset_state": True,
    "states": True,
}
"""The same in one layer of few steps, for kernels that are emulated."""
PLACES = tuple(name.replace("_reset", "_r") for name in LayerInputs._fields)
"""What a layer reads, in the order in which a backend gives gradients, under the names of `Given`."""


@dataclass
class Given:
    """The tensors of a case, each a leaf: x [T, B, I]; h_0, c_0, h_r, c_r [L·D, B, ·]; weights under torch's names."""

    leaves: dict[str, Tensor]
    weights: dict[str, Tensor]

    def every(self) -> dict[str, Tensor]:
        return {**self.leaves, **self.weights}


def draw(case: Case, dtype: torch.dtype) -> Given:
    """The same values in every dtype: they are drawn in float32."""
    kind, g = KINDS[case.kind], torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    size = kind.proj or case.hidden
    leaves = {"x": normal(case.steps, case.rows, case.inputs)}
    wanted = [("h_0", "c_0")] * case.hx + [("h_r", "c_r")] * case.reset_state
    for h, c in wanted:
        leaves[h] = normal(case.count, case.rows, size)
        if kind.has_c:
            leaves[c] = normal(case.count, case.rows, case.hidden)
    layer = build(case, dtype=dtype)
    scale = case.hidden**-0.5
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter.copy_((torch.rand(parameter.shape, generator=g) * 2 - 1) * scale)
    weights = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    return Given(leaves, weights)


def build(case: Case, module: Any = rnnkit, **more: Any) -> Any:
    """The case's layer, of rnnkit or of torch.nn."""
    kind = KINDS[case.kind]
    return getattr(module, kind.layer)(
        case.inputs,
        case.hidden,
        num_layers=case.layers,
        bias=case.bias,
        batch_first=case.layout == "batch",
        bidirectional=case.bidirectional,
        **kind.options,
        **more,
    )


def put(layer: Any, weights: dict[str, Tensor]) -> Any:
    """Give a layer these values; it keeps its own parameters."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(weights[name])
    return layer


def cell_step(kind: str, x: Tensor, h: Tensor, c: Tensor | None, w: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """One step of one row: x [I], h [N], c [H]. Weights w_ih, w_hh[, b_ih, b_hh][, w_hr]."""
    row, state = x[None], h[None]
    if kind == "lstm_proj":  # nn.LSTMCell knows no projection: h joins x, and its own recurrent weight is zero
        w_ih, w_hh, *bias, w_hr = w
        joined, wide = torch.cat([row, state], 1), torch.cat([w_ih, w_hh], 1)
        assert c is not None
        none = wide.new_zeros(wide.shape[0], c.shape[0])
        h_new, c_new = torch.lstm_cell(joined, (torch.zeros_like(c)[None], c[None]), wide, none, *bias)
        return (h_new @ w_hr.T)[0], c_new[0]
    if kind == "lstm":
        assert c is not None
        h_new, c_new = torch.lstm_cell(row, (state, c[None]), *w)
        return h_new[0], c_new[0]
    if kind == "gru_reset_before":
        return _gru_reset_before(x, h, *w), None
    operator = {"rnn_tanh": torch.rnn_tanh_cell, "rnn_relu": torch.rnn_relu_cell, "gru": torch.gru_cell}[kind]
    return operator(row, state, *w)[0], None


def _gru_reset_before(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    from_x = w_ih @ x if b_ih is None or b_hh is None else w_ih @ x + b_ih + b_hh
    w_hr, w_hz, w_hn = w_hh.chunk(3)
    x_r, x_z, x_n = from_x.chunk(3)
    r, z = torch.sigmoid(x_r + w_hr @ h), torch.sigmoid(x_z + w_hz @ h)
    n = torch.tanh(x_n + w_hn @ (r * h))
    return (1 - z) * n + z * h


def one_layer(case: Case, x: Tensor, w: list[Tensor], start: list[Tensor], again: list[Tensor], reverse: bool) -> Any:
    """One layer in one direction: x [T, B, ·], start and again (h[, c]) [B, ·]. Returns h [T, B, ·], c, finals."""
    kind, resets = KINDS[case.kind], set(case.resets or ())
    grid = [[[x.new_zeros(s.shape[1]) for s in start] for _ in range(case.rows)] for _ in range(case.steps)]
    finals = []
    for b in range(case.rows):
        state, valid = [s[b] for s in start], case.valid(b)
        for t in reversed(range(valid)) if reverse else range(valid):
            border = t + 1 if reverse else t  # a reset at t lies between t - 1 and t, whichever comes first
            if border < valid and (border, b) in resets:
                state = [s[b] for s in again]
            h, c = cell_step(case.kind, x[t, b], state[0], state[1] if kind.has_c else None, w)
            state = [h] if c is None else [h, c]
            grid[t][b] = state
        finals.append(state)
    number = len(start)
    everything = [torch.stack([torch.stack([row[k] for row in line]) for line in grid]) for k in range(number)]
    return everything, [torch.stack([row[k] for row in finals]) for k in range(number)]


def loop(case: Case, given: Given) -> Results:
    """The oracle: y [T, B, D·N]; h_n, c_n [L·D, B, ·]; h_all, c_all [L·D, T, B, ·]."""
    kind, x = KINDS[case.kind], given.leaves["x"]
    size = kind.proj or case.hidden
    names, sizes = (("h", "c"), (size, case.hidden)) if kind.has_c else (("h",), (size,))
    finals, states = [], []
    for k in range(case.layers):
        outputs = []
        for d in range(case.directions):
            i = k * case.directions + d
            zeros = [x.new_zeros(case.rows, n) for n in sizes]
            start = [given.leaves[f"{n}_0"][i] for n in names] if case.hx else zeros
            again = [given.leaves[f"{n}_r"][i] for n in names] if case.reset_state else zeros
            suffix = f"l{k}" + "_reverse" * d
            w = [v for n, v in given.weights.items() if n.endswith(f"_{suffix}")]
            everything, last = one_layer(case, x, w, start, again, d == 1)
            outputs.append(everything[0])
            states.append(everything)
            finals.append(last)
        x = torch.cat(outputs, -1)
    results = {"y": x}
    for k, name in enumerate(names):
        results[f"{name}_n"] = torch.stack([f[k] for f in finals])
        if case.states:
            results[f"{name}_all"] = torch.stack([s[k] for s in states])
    return results


def pair(case: Case, given: Given, which: str) -> Any:
    """hx (`which` is "0") or reset_state ("r") as the caller gives it in the case's layout; None where absent."""
    if not (case.hx if which == "0" else case.reset_state):
        return None
    parts = [given.leaves[f"{n}_{which}"] for n in ("h", "c") if f"{n}_{which}" in given.leaves]
    if case.layout == "one":
        parts = [p.squeeze(1) for p in parts]
    return tuple(parts) if KINDS[case.kind].has_c else parts[0]


def call(case: Case, layer: Any, given: Given, **changed: Any) -> Results:
    """Run rnnkit's layer in the case's layout; the results come back time-major and padded, as those of `loop`."""
    x, lengths, reset = given.leaves["x"], case.lengths_tensor(), case.reset_tensor()
    if case.layout == "packed":
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        reset = None if reset is None else pack_padded_sequence(reset, lengths, enforce_sorted=False)
        lengths = None
    elif case.layout == "one":
        x, reset = x.squeeze(1), None if reset is None else reset.squeeze(1)
    elif case.layout == "batch":
        x, reset = x.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
    options = {
        "lengths": lengths,
        "reset": reset,
        "reset_state": pair(case, given, "r"),
        "return_all_states": case.states,
        **changed,
    }
    y, *states = layer(x, pair(case, given, "0"), **options)
    if isinstance(y, PackedSequence):
        y = pad_packed_sequence(y, total_length=case.steps)[0]
    elif case.layout != "time":
        y = y.unsqueeze(1) if case.layout == "one" else y.transpose(0, 1)
    results = {"y": y}
    for suffix, state in zip(("n", "all"), states, strict=False):
        for name, v in zip(("h", "c"), state if isinstance(state, tuple) else (state,), strict=False):
            if case.layout == "one":
                v = v.unsqueeze(-2)
            elif case.layout == "batch" and suffix == "all":
                v = v.transpose(1, 2)
            results[f"{name}_{suffix}"] = v
    return results


def with_gradients(case: Case, results: Results, leaves: dict[str, Tensor]) -> Results:
    """The results and, as `d name`, the gradient of every leaf, for a loss that weighs each number differently."""
    g = torch.Generator().manual_seed(case.seed + 1)
    loss = sum((r * torch.randn(r.shape, generator=g).to(r.dtype)).sum() for _, r in sorted(results.items()))
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    else:  # no row has a step, nor an initial state
        found = [torch.zeros_like(v) for v in leaves.values()]
    return {**results, **{f"d {name}": v for name, v in zip(leaves, found, strict=True)}}


def ours(case: Case, backend: str, dtype: torch.dtype, **changed: Any) -> Results:
    """What rnnkit gives, gradients included."""
    given = draw(case, dtype)
    layer = put(build(case, dtype=dtype, backend=backend, recompute=case.recompute), given.weights)
    results = call(case, layer, given, **changed)
    return with_gradients(case, results, {**given.leaves, **dict(layer.named_parameters())})


@cache
def truth(case: Case, dtype: torch.dtype) -> Results:
    """What the oracle gives, gradients included."""
    given = draw(case, dtype)
    return {k: v.detach() for k, v in with_gradients(case, loop(case, given), given.every()).items()}


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach()).abs().max()) if got.numel() else 0.0


def compare(got: Results, exact: Results, rounded: Results | None = None) -> None:
    """Every tensor against float64: float64 to a few ulp of accumulation; float32 within twice the error that torch's
    own cells make in float32 (`rounded`), plus a few ulp of the largest number."""
    assert got.keys() == exact.keys()
    for name, v in got.items():
        assert v.shape == exact[name].shape, (name, v.shape, exact[name].shape)
        largest = float(exact[name].detach().abs().max()) if v.numel() else 0.0
        if v.dtype == F64:
            budget = 1e-13 + 64 * torch.finfo(F64).eps * largest
        else:
            assert rounded is not None and v.dtype == F32
            budget = 2 * error(rounded[name], exact[name]) + 4 * torch.finfo(F32).eps * max(largest, 1.0)
        off = error(v.detach(), exact[name])
        assert off <= budget, f"{name}: off by {off:.3g}, budget {budget:.3g}"


def check(case: Case, backend: str, dtype: torch.dtype, **changed: Any) -> Results:
    """rnnkit against the oracle, forward and every gradient."""
    got = ours(case, backend, dtype, **changed)
    compare(got, truth(case, F64), truth(case, F32) if dtype == F32 else None)
    return got


def reasons(case: Case, backend: str, dtype: torch.dtype) -> list[str]:
    """Why a backend cannot run a case; empty where it can."""
    x = torch.zeros(case.steps, case.rows, case.inputs, dtype=dtype)
    marks = case.reset_tensor()
    if case.lengths is None or case.layout != "packed":
        lengths = case.lengths_tensor()
    else:  # rows that are all of one length make a plain problem
        lengths = None if min(case.lengths) == case.steps else case.lengths_tensor()
    weights = list(build(replace(case, layers=1, bidirectional=False), dtype=dtype).parameters())
    again = None
    if case.reset_state and KINDS[case.kind].has_c:
        again = (x.new_zeros(case.rows, KINDS[case.kind].proj or case.hidden), x.new_zeros(case.rows, case.hidden))
    elif case.reset_state:
        again = x.new_zeros(case.rows, case.hidden)
    cell = KINDS[case.kind].cell
    t, o = checks.layer(cell, x, None, None, weights, lengths, marks, again, False, case.states, case.recompute)
    return BY_NAME[backend].unsupported(describe(cell, t, o, train=True))


def ways(cases: list[Case], dtypes: tuple[torch.dtype, ...] = (F64, F32)) -> Any:
    """Parametrize a test over every case, every backend that can run it, and every dtype that the backend computes."""
    every = [
        pytest.param(case, backend.name, dtype, id=f"{case}-{backend.name}-{str(dtype)[6:]}")
        for case in cases
        for backend in BACKENDS
        for dtype in dtypes
        if not reasons(case, backend.name, dtype)
    ]
    return pytest.mark.parametrize(("case", "backend", "dtype"), every)
