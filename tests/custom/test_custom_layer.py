"""Custom layers in eager mode: the numbers of torch.nn's for the same cells, those of a loop row by row for others, and
everything that a layer is called with.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from custom_layers import F64, GRU, LSTM, Everything, by_rows, cell_class, per_steps
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkit
from rnnkit.custom.declare import spec_of

PAIRS = {"lstm": (LSTM, nn.LSTM, rnnkit.LSTM), "gru": (GRU, nn.GRU, rnnkit.GRU)}
BACKENDS = ("reference", "auto")


def flat(found: Any) -> list[Tensor]:
    """Every tensor of a layer's results."""
    return [found] if isinstance(found, Tensor) else [v for each in found for v in flat(each)]


def twins(kind: str, backend: str = "reference", **how: Any) -> tuple[rnnkit.Custom, nn.Module]:
    """The cell written by a user, and rnnkit's own with the same parameters, in float64."""
    ours, _, theirs = PAIRS[kind]
    layer = rnnkit.Custom(ours, 3, 5, dtype=F64, backend=backend, **how)
    own = theirs(3, 5, dtype=F64, **how)
    own.load_state_dict(layer.state_dict())
    return layer, own


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-10)


def with_gradients(layer: nn.Module, x: Tensor, **how: Any) -> list[Tensor]:
    """Results, and gradients of the input and the parameters of a sum that sees each result differently."""
    x = x.detach().requires_grad_()
    found = flat(layer(x, **how))
    weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v) for v in found]
    wanted = [x, *layer.parameters()]
    return found + list(torch.autograd.grad(sum((v * w).sum() for v, w in zip(found, weights)), wanted))


SHAPES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("masks", ["none", "lengths", "both"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PAIRS)
def test_torchs_cells(kind: str, backend: str, shape: str, masks: str) -> None:
    layer, own = twins(kind, backend, **SHAPES[shape])
    x = torch.randn((4, 6, 3) if layer.batch_first else (6, 4, 3), dtype=F64)
    how: dict[str, Any] = {"return_all_states": True}
    if masks != "none":
        how["lengths"] = torch.tensor([6, 2, 0, 4])
    if masks == "both":
        how["reset"] = torch.rand(x.shape[:2]) < 0.3
        count = layer.num_layers * (1 + layer.bidirectional)
        states = tuple(torch.randn(count, 4, 5, dtype=F64) for _ in spec_of(layer.cell).states)
        how["reset_state"] = how["hx"] = states if len(states) > 1 else states[0]
    same(with_gradients(layer, x, **how), with_gradients(own, x, **how))


@pytest.mark.parametrize("kind", PAIRS)
def test_layouts(kind: str) -> None:
    layer, own = twins(kind, num_layers=2, bidirectional=True, dropout=0.5)
    x = torch.randn(6, 4, 3, dtype=F64)
    packed = pack_padded_sequence(x, torch.tensor([3, 6, 1, 4]), enforce_sorted=False)
    nested = torch.nested.nested_tensor([x[:3, 0], x[:6, 1], x[:2, 2]], layout=torch.jagged)
    names = spec_of(layer.cell).states
    for given in (x[:, 0], packed, nested):
        results = []
        for each in (layer, own):
            torch.manual_seed(3)  # dropout draws the same
            rows = (4,) if given is packed else (3,) if given is nested else ()
            hx = tuple(torch.arange(v.numel(), dtype=F64).view_as(v) for v in [torch.empty(4, *rows, 5)] * len(names))
            y, states, every = each(given, hx if len(hx) > 1 else hx[0], return_all_states=True)
            y = y.data if given is packed else y.values() if given is nested else y
            results.append([y, *flat(states), *flat(every)])
        same(*results)


def test_reset_and_lengths_in_the_inputs_layout() -> None:
    layer, own = twins("lstm", batch_first=True)
    x, reset = torch.randn(4, 6, 3, dtype=F64), torch.rand(4, 6, 1) < 0.3
    same(layer(x, reset=reset.float()), own(x, reset=reset.float()))
    one = {"lengths": torch.tensor(4), "reset": reset[0, :, 0]}
    same(layer(x[0], **one), own(x[0], **one))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["peephole", "gru_before", "layernorm_lstm", "slstm", "everything"])
def test_other_cells_row_by_row(kind: str, backend: str) -> None:
    cell = Everything if kind == "everything" else cell_class(kind)
    layer = rnnkit.Custom(cell, 3, 8, bidirectional=True, dtype=F64, backend=backend)
    steps, rows, states = 5, 4, spec_of(cell).states
    x, reset = torch.randn(steps, rows, 3, dtype=F64, requires_grad=True), torch.rand(steps, rows) < 0.4
    hx, again = ([torch.rand(2, rows, 8, dtype=F64, requires_grad=True) for _ in states] for _ in range(2))
    inputs = per_steps(cell, steps, rows, 8)
    lengths = [5, 2, 1, 4]
    y, last, every = layer(
        x, hx if len(hx) > 1 else hx[0], lengths=torch.tensor(lengths), reset=reset,
        reset_state=again if len(hx) > 1 else again[0], return_all_states=True, **inputs,
    )  # fmt: skip
    found, wanted = [y, *flat(last), *flat(every)], flat(by_rows(layer, x, hx, lengths, reset, again, inputs))
    same(found, wanted)
    weights = [torch.randn_like(v) for v in found]
    leaves = [x, *hx, *again, *layer.parameters(), *(v for v in inputs.values() if v.requires_grad)]
    gradients = [torch.autograd.grad(sum((v * w).sum() for v, w in zip(each, weights)), leaves, allow_unused=True)
                 for each in (found, wanted)]  # fmt: skip
    for leaf, a, b in zip(leaves, *gradients):
        torch.testing.assert_close(*(torch.zeros_like(leaf) if g is None else g for g in (a, b)), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_that_no_result_depends_on_reaches_no_gradient(backend: str, reverse: bool) -> None:
    """In padding, and before a reset in the direction of time that is processed."""
    layer = rnnkit.Custom(Everything, 3, 8, dtype=F64, backend=backend, bidirectional=reverse)
    x, inputs = torch.randn(6, 2, 3, dtype=F64), per_steps(Everything, 6, 2, 8)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[2 if not reverse else 3, 1] = True
    bad = x.clone()
    bad[4:, 0] = torch.nan  # beyond its length
    bad[slice(0, 2) if not reverse else slice(3, 6), 1] = torch.nan
    results = []
    for given in (x, bad):
        layer.zero_grad()
        given = given.clone().requires_grad_()
        y, _ = layer(given, lengths=torch.tensor([4, 6]), reset=reset, **inputs)
        half = y[..., 8 * reverse :]
        seen = half[:, 0].sin().sum() + (half[2:, 1] if not reverse else half[:3, 1]).cos().sum()
        seen.backward()
        results.append([seen, given.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    clean, dirty = results
    assert all(bool(v.isfinite().all()) for v in dirty)
    if not reverse:  # forwards nothing else runs over the NaN
        same(dirty[0], clean[0])


def test_copies_and_checkpoints() -> None:
    layer = rnnkit.Custom(Everything(act="sigmoid"), 3, 8, 2, bidirectional=True)
    x, inputs = torch.randn(4, 2, 3), per_steps(Everything, 4, 2, 8, torch.float32)
    y = layer(x, **inputs)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, **inputs)[0], y) and repr(other) == repr(layer)
    fresh = rnnkit.Custom(Everything(act="sigmoid"), 3, 8, 2, bidirectional=True)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x, **inputs)[0], y)
    nn.utils.parametrizations.weight_norm(fresh, "weight_hh_l0")
    torch.testing.assert_close(fresh(x, **inputs)[0], y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", [LSTM, Everything])
def test_heads_are_a_block_diagonal_weight(cell: type[rnnkit.Cell], backend: str) -> None:
    """Head k's units of each block see the units of head k alone."""
    layer = rnnkit.Custom(cell, 3, 8, heads=2, dtype=F64, backend=backend)
    whole = rnnkit.Custom(cell, 3, 8, dtype=F64, backend="reference")
    values = {}
    for name, v in layer.state_dict().items():
        values[name] = v
        if v.shape[1:] == (4,):
            blocks = [torch.block_diag(*block.split(4)) for block in v.split(8)]
            values[name] = torch.cat(blocks)
    whole.load_state_dict(values)
    x, how = torch.randn(5, 3, 3, dtype=F64), {**per_steps(cell, 5, 3, 8), "lengths": torch.tensor([5, 2, 4])}
    found, wanted = with_gradients(layer, x, **how), with_gradients(whole, x, **how)
    same(found[: -len(values)], wanted[: -len(values)])
    for (name, v), g, dense in zip(layer.named_parameters(), found[-len(values) :], wanted[-len(values) :]):
        if v.shape[1:] == (4,):
            dense = torch.cat([torch.cat([b[:4, :4], b[4:, 4:]]) for b in dense.split(8)])
        torch.testing.assert_close(g, dense, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype: torch.dtype, backend: str) -> None:
    layer = rnnkit.Custom(LSTM, 3, 8, dtype=dtype, backend=backend)
    exact = copy.deepcopy(layer).float()
    x = torch.randn(6, 2, 3).to(dtype)
    found, wanted = with_gradients(layer, x), with_gradients(exact, x.float())
    assert {v.dtype for v in found} == {dtype}
    torch.testing.assert_close([v.float() for v in found], wanted, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(found[0].float(), wanted[0], rtol=1e-2, atol=4e-3)


def test_autocast() -> None:
    layer = rnnkit.Custom(Everything, 3, 8)
    x, inputs = torch.randn(5, 2, 3), per_steps(Everything, 5, 2, 8, torch.float32)
    plain = layer(x, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y, states = layer(x, **{**inputs, "gap": inputs["gap"].bfloat16()})
        assert {v.dtype for v in (y, *states)} == {torch.bfloat16}
        assert layer.double()(x.double(), **{n: v.double() for n, v in inputs.items()})[0].dtype == F64
    torch.testing.assert_close(y.float(), plain[0], rtol=5e-2, atol=5e-2)


def test_hooks_of_a_cell() -> None:
    """enter, project with its module and the lengths, draw: for each layer and direction."""
    seen: list[Any] = []

    class Hooked(rnnkit.Cell):
        gates, states = 1, ("h",)
        keep = rnnkit.per_step(grad=False)
        norm = rnnkit.module(lambda gates, hidden: nn.LayerNorm(gates * hidden))
        rate = rnnkit.option(0.5)

        @staticmethod
        def step(a: Tensor, h: Tensor, keep: Tensor) -> Tensor:
            return torch.tanh(a) * keep + h * (1 - keep)

        def draw(self, training, steps, rows, hidden, like):  # type: ignore[no-untyped-def]
            seen.append(("draw", training, steps, rows, hidden))
            return {"keep": torch.full_like(like[:1, :, :1], self.rate).expand(1, rows, hidden)}

        def enter(self, x: Tensor, training: bool) -> Tensor:
            return 2 * x

        def project(self, gx: Tensor, lengths: Any, training: bool, norm: Any) -> Tensor:  # type: ignore[override]
            seen.append(("project", lengths.tolist()))
            return norm(gx)

    layer = rnnkit.Custom(Hooked(rate=0.25), 3, 4, 2, dtype=F64)
    assert [n for n in layer.state_dict() if "norm" in n][:2] == ["norm_l0.weight", "norm_l0.bias"]
    x = torch.randn(5, 2, 3, dtype=F64, requires_grad=True)
    y, h = layer(x, lengths=torch.tensor([5, 3]))
    assert seen == [("draw", True, 5, 2, 4), ("project", [5, 3])] * 2
    first, second = rnnkit.Custom(Hooked, 3, 4, dtype=F64), rnnkit.Custom(Hooked, 4, 4, dtype=F64)
    first.load_state_dict({n: v for n, v in layer.state_dict().items() if "_l0" in n})
    second.load_state_dict({n.replace("_l1", "_l0"): v for n, v in layer.state_dict().items() if "_l1" in n})
    quarter = torch.full((1, 2, 4), 0.25, dtype=F64)
    again = second(first(x, lengths=torch.tensor([5, 3]), keep=quarter)[0], lengths=torch.tensor([5, 3]), keep=quarter)
    same([y, h[1:]], again)
    gx = layer.norm_l0(F.linear(2 * x[0], layer.weight_ih_l0, layer.bias_ih_l0))
    same(first(x[:1], lengths=torch.tensor([1, 1]), keep=quarter)[0][0], torch.tanh(gx + layer.bias_hh_l0) * 0.25)


def test_a_result_changed_in_place() -> None:
    """As torch's layers allow."""
    layer, own = twins("gru", "auto")
    x = torch.randn(4, 2, 3, dtype=F64)
    for each in (layer, own):
        y, _ = each(x)
        y += 1
        y.sum().backward()
    same([p.grad for p in layer.parameters()], [p.grad for p in own.parameters()])


def test_no_rows() -> None:
    layer = rnnkit.Custom(LSTM, 3, 5, backend="reference")
    y, (h, c) = layer(torch.randn(4, 0, 3), lengths=torch.zeros(0, dtype=torch.long))
    assert y.shape == (4, 0, 5) and h.shape == c.shape == (1, 0, 5)


class Projected(rnnkit.Cell):
    gates, states = 1, ("h",)
    norm = rnnkit.module(lambda gates, hidden: nn.Sequential(nn.Linear(gates * hidden, gates * hidden), nn.Tanh()))
    other = rnnkit.module(lambda gates, hidden: nn.LayerNorm(gates * hidden))

    def project(self, gx, lengths, training, norm, other):  # type: ignore[no-untyped-def]
        return other(norm(gx))

    @staticmethod
    def step(a, h):  # type: ignore[no-untyped-def]
        return torch.tanh(a)


def test_modules_are_reset_with_the_layer() -> None:
    layer = rnnkit.Custom(Projected, 3, 4, num_layers=2)
    before = {name: v.detach().clone() for name, v in layer.named_parameters()}
    with torch.no_grad():
        layer.other_l1.weight.fill_(7)
    layer.reset_parameters()
    assert not torch.equal(layer.norm_l0[0].weight, before["norm_l0.0.weight"])
    assert not torch.equal(layer.norm_l1[0].bias, before["norm_l1.0.bias"])
    assert not torch.equal(layer.weight_ih_l0, before["weight_ih_l0"])
    assert layer.other_l1.weight.eq(1).all()


def test_a_module_with_a_reset_of_its_own_resets_what_is_in_it() -> None:
    class Zeros(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.inner = nn.Linear(hidden, hidden)
            self.reset_parameters()

        def reset_parameters(self) -> None:
            nn.init.zeros_(self.inner.weight)

    class Mine(Projected):
        norm = rnnkit.module(lambda gates, hidden: Zeros(hidden))

    layer = rnnkit.Custom(Mine, 3, 4)
    with torch.no_grad():
        layer.norm_l0.inner.weight.fill_(3)
    layer.reset_parameters()
    assert not layer.norm_l0.inner.weight.any()


def test_a_layer_draws_no_more_for_its_modules() -> None:
    """What a maker has set stands when the layer is made."""

    class Set(Projected):
        norm = rnnkit.module(lambda gates, hidden: nn.Linear(hidden, hidden).requires_grad_(False).apply(zero))

    def zero(m: nn.Module) -> None:
        m.weight.fill_(0)  # type: ignore[operator,union-attr]

    layer = rnnkit.Custom(Set, 3, 4)
    assert not layer.norm_l0.weight.any()
    layer.reset_parameters()
    assert layer.norm_l0.weight.any()


class Rate(rnnkit.Cell):
    """Singular where its input is zero."""

    gates, states = 1, ("h",)
    dt = rnnkit.per_step("row")

    @staticmethod
    def step(a: Tensor, h: Tensor, dt: Tensor) -> Tensor:
        return torch.tanh(a / dt) + h * torch.exp(-dt)


class Direction(rnnkit.Cell):
    """Singular where the row is zero."""

    gates, states = 1, ("h",)

    @staticmethod
    def step(a: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(a / a.norm(dim=-1, keepdim=True)) + 0.5 * h


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", [Rate, Direction])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_step_that_is_singular_at_zero(cell: type[rnnkit.Cell], backend: str, bidirectional: bool) -> None:
    """Where a row has ended nothing divides by zero: gradients are those of the rows by themselves."""
    layer = rnnkit.Custom(cell, 3, 4, bias=cell is Rate, dtype=F64, backend=backend, bidirectional=bidirectional)
    x, dt, lengths = torch.randn(5, 3, 3, dtype=F64), torch.rand(5, 3, dtype=F64) + 0.1, (5, 3, 0)
    given = {"dt": dt} if cell is Rate else {}
    y, _ = layer(x, lengths=torch.tensor(lengths), **given)
    got = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    alone = [layer(x[:n, b : b + 1], **{k: v[:n, b : b + 1] for k, v in given.items()})[0] for b, n in ((0, 5), (1, 3))]
    total = sum((v.square().sum() for v in alone), torch.zeros((), dtype=F64))
    same(got, torch.autograd.grad(total, list(layer.parameters())))
