"""Programs on the CPU engine: every variant and eleven further cells within the budget of float64, in every dtype, with
lengths, resets, both directions, heads, what is not saved made again; and bits that do not depend on neighbours."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import more_cells
import pytest
import torch
from support import Values, complaints, pooled, some
from torch import Tensor
from torch.nn import functional as F

import rnnkit
from rnnkit import variants
from rnnkit.backends.cpu import extension
from rnnkit.backends.cpu import program as cpu
from rnnkit.custom import check, scan
from rnnkit.custom import program as words
from rnnkit.custom.declare import CellSpec, spec_of
from rnnkit.custom.graph import CellProgram
from rnnkit.custom.inputs import CellInputs, CellOptions, CellOutputs, unflat

pytestmark = pytest.mark.skipif(not extension.variants, reason="the engine cannot run here")


def cells_of(module: Any) -> dict[str, type[rnnkit.Cell]]:
    found = {n: v for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, rnnkit.Cell)}
    return {n: v for n, v in found.items() if v is not rnnkit.Cell and not n.startswith("_")}


CELLS = {**cells_of(variants), **cells_of(more_cells)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"lengths": True, "reset": True},
    "reverse": {"lengths": True, "reset": True, "reverse": True},
    "again": {"lengths": True, "recompute": True, "steps": 19, "rows": 5},
    "again in reverse": {"lengths": True, "reset": True, "recompute": True, "reverse": True, "steps": 19, "rows": 5},
    "one row": {"rows": 1, "hidden": 76},
    "heads": {"heads": 3, "hidden": 39, "reset": True},
    "projected": {"project": False, "lengths": True, "reverse": True},
}


def program_of(spec: CellSpec, hidden: int) -> CellProgram:
    found = check.program_of(spec, hidden)
    assert found.program is not None, found.reason
    return found.program


def draw(
    spec: CellSpec,
    seed: int = 0,
    *,
    steps: int = 6,
    rows: int = 4,
    inputs: int = 5,
    hidden: int = 37,
    heads: int = 1,
    lengths: bool = False,
    reset: bool = False,
    project: bool = True,
) -> CellInputs:
    """Numbers that every dtype holds, so that all compute of the same ones."""
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * scale).bfloat16().half().double()

    def state() -> Tensor:  # positive, as a normaliser wants to be
        return some(rows, hidden).abs() + 0.5

    wide, near = spec.gates * hidden, hidden**-0.5
    return CellInputs(
        some(steps, rows, inputs if project else wide),
        tuple(state() for _ in spec.states),
        some(wide, inputs, scale=inputs**-0.5) if project else None,
        some(wide, scale=near) if project else None,
        some(wide, scale=near) if spec.recurrent else None,
        tuple(some(blocks * hidden, hidden // heads, scale=near) for _, blocks in spec.weights),
        tuple(some(hidden) for _ in spec.units),
        tuple(some(*((steps, rows) if kind == "row" else (steps, rows, hidden))).abs() for _, kind, _ in spec.steps),
        torch.randint(0, steps + 1, (rows,), generator=random) if lengths else None,
        torch.rand(steps, rows, generator=random) < 0.25 if reset else None,
        tuple(state() for _ in spec.states) if reset else (),
    )


def names_of(spec: CellSpec, t: CellInputs) -> list[str]:
    names = ["x", *spec.states, "w_ih", "b_ih", "b_hh", *(n for n, _ in spec.weights), *spec.units]
    names += [n for n, _, _ in spec.steps]
    return [*names, "lengths", "reset", *(f"{s} at a reset" for s in spec.states[: len(t.reset_states)])]


def needs_of(spec: CellSpec, t: CellInputs) -> list[bool]:
    never = {"lengths", "reset", *(n for n, _, grad in spec.steps if not grad)}
    return [v is not None and n not in never for n, v in zip(names_of(spec, t), t.flat(), strict=True)]


def grads_of(spec: CellSpec, t: CellInputs, dtype: torch.dtype) -> CellOutputs:
    random = torch.Generator().manual_seed(99)
    (steps, rows), hidden = t.x.shape[:2], t.states[0].shape[1]

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).bfloat16().half().to(dtype)

    every = [some(steps, rows, hidden) for _ in spec.states]
    return CellOutputs(every[0], tuple(some(1, rows, hidden) for _ in spec.states), tuple(every[1:]))


def named(spec: CellSpec, outputs: CellOutputs, t: CellInputs, grads: list[Tensor | None]) -> Values:
    values = {"y": outputs.y, **{f"last {s}": v for s, v in zip(spec.states, outputs.last, strict=True)}}
    values |= {f"all {s}": v for s, v in zip(spec.states[1:], outputs.all, strict=True)}
    values |= {f"grad {n}": g for n, g in zip(names_of(spec, t), grads, strict=True) if g is not None}
    return {name: v.detach() for name, v in values.items()}


def by_engine(spec: CellSpec, t: CellInputs, o: CellOptions, dtype: torch.dtype) -> Values:
    program, t = program_of(spec, t.states[0].shape[1]), t.to(dtype)
    outputs, saved = cpu.forward(program, t, o, True)
    found = cpu.backward(program, t, o, outputs.y, saved, grads_of(spec, t, dtype), needs_of(spec, t))
    return named(spec, outputs, t, found)


def by_step(spec: CellSpec, t: CellInputs, o: CellOptions, dtype: torch.dtype, rounded: torch.dtype) -> Values:
    """The user's own step and torch's own derivative, computed in `dtype`; the results in another."""
    needs, t = needs_of(spec, t), t.to(dtype)
    flat = [v.detach().requires_grad_(n) if v is not None and n else v for v, n in zip(t.flat(), needs, strict=True)]
    y, last, every = scan.outputs(spec, unflat(spec, flat), o)
    g = grads_of(spec, t, dtype)
    pairs = [(v, d) for v, d in zip((y, *last, *every), (g.y, *g.last, *g.all), strict=True) if v.requires_grad]
    wanted = [v for v, n in zip(flat, needs, strict=True) if n]
    found = iter(torch.autograd.grad([v for v, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True))
    grads: list[Tensor | None] = []
    for v, n in zip(flat, needs, strict=True):
        d = next(found) if n else None
        grads.append(torch.zeros_like(v) if n and d is None else d)  # type: ignore[arg-type]
    return {name: v.to(rounded) for name, v in named(spec, CellOutputs(y, last, every), t, grads).items()}


def layer_of(spec: CellSpec, seed: int, how: dict[str, Any]) -> tuple[CellInputs, CellOptions]:
    options = {k: v for k, v in how.items() if k in ("reverse", "recompute", "heads")}
    sizes = {k: v for k, v in how.items() if k not in ("reverse", "recompute")}
    return draw(spec, seed, **sizes), CellOptions(all_states=True, **options)


Case = tuple[torch.dtype, str, str]


def cases() -> Iterator[Case]:
    """Each cell in half of the ways in float32, in some in the other dtypes."""
    for (j, dtype), (k, name), (i, how) in itertools.product(enumerate(DTYPES), enumerate(CELLS), enumerate(HOW)):
        if (k + i + j) % (2 if dtype == torch.float32 else 4) == 0:
            yield dtype, name, how


def assert_within_budget(spec: CellSpec, how: dict[str, Any], dtype: torch.dtype) -> None:
    """At most twice the error of a loop of torch's operators in that dtype, as for the built-in layers.

    In float64 the truth rounds as the engine does: there a loop whose input is off by a rounding counts too, for some
    cells amplify one by chance.
    """
    loop = torch.float32 if dtype == torch.float64 else dtype
    got, usual, truth = [], [], []
    for seed in range(3):
        t, o = layer_of(spec, seed, how)
        near = t._replace(x=t.x * (1 + torch.finfo(loop).eps)) if dtype == torch.float64 else t
        got += [by_engine(spec, t, o, dtype)] * 2
        usual += [by_step(spec, v, o, loop, dtype) for v in (t, near)]
        truth += [by_step(spec, t, o, torch.float64, torch.float64)] * 2
    assert complaints(pooled(got), pooled(usual), pooled(truth), dtype) == []


@pytest.mark.parametrize("case", some(cases(), 5), ids=lambda case: f"{str(case[0])[6:]}-{case[1]}-{case[2]}")
def test_within_the_budget_of_float64(case: Case) -> None:
    dtype, name, how = case
    assert_within_budget(spec_of(CELLS[name]), HOW[how], dtype)


def same_bits(a: Values, b: Values) -> list[str]:
    return [name for name in a if name in b and not torch.equal(a[name].nan_to_num(7), b[name].nan_to_num(7))]


@pytest.mark.parametrize("name", CELLS)
def test_threads_change_no_bit(name: str) -> None:
    spec, threads = spec_of(CELLS[name]), torch.get_num_threads()
    for how in ({"hidden": 600, "rows": 2, "steps": 2}, {"hidden": 48, "rows": 11, "steps": 9, "lengths": True}):
        t, o = layer_of(spec, 1, how)
        try:
            torch.set_num_threads(1)
            alone = by_engine(spec, t, o, torch.float32)
            torch.set_num_threads(2)
            assert same_bits(by_engine(spec, t, o, torch.float32), alone) == []
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CELLS)
def test_rows_do_not_know_their_neighbours(name: str) -> None:
    """Those after a row, lengths that make others end early, and steps beyond the first chunk."""
    spec = spec_of(CELLS[name])
    t, o = layer_of(spec, 2, {"hidden": 21, "rows": 7, "steps": 40, "lengths": True, "reset": True})
    whole = cpu.forward(program_of(spec, 21), t.to(torch.float32), o, False)[0]

    def first(v: Tensor, dim: int) -> Tensor:
        return v.narrow(dim, 2, 1)

    part = t._replace(
        x=first(t.x, 1),
        states=tuple(first(v, 0) for v in t.states),
        steps=tuple(first(v, 1) for v in t.steps),
        lengths=first(t.lengths, 0),  # type: ignore[arg-type]
        reset=first(t.reset, 1),  # type: ignore[arg-type]
        reset_states=tuple(first(v, 0) for v in t.reset_states),
    )
    alone = cpu.forward(program_of(spec, 21), part.to(torch.float32), o, False)[0]
    assert torch.equal(alone.y, first(whole.y, 1))
    assert all(torch.equal(a, first(b, 1)) for a, b in zip(alone.last, whole.last, strict=True))


def test_nan_in_padding_and_before_a_reset_reaches_nothing() -> None:
    for name in ("SLSTM", "LayerNormLSTM", "ZoneoutGRU", "AUGRU"):
        spec = spec_of(CELLS[name])
        t, o = layer_of(spec, 3, {"lengths": True, "reset": True, "hidden": 19})
        t = t._replace(lengths=torch.tensor([6, 2, 4, 0]), reset=torch.zeros(6, 4, dtype=torch.bool))
        t.reset[3, 2] = True  # type: ignore[index]
        clean = by_engine(spec, t, o, torch.float64)
        x = t.x.clone()
        x[2:, 1] = x[4:, 2] = x[:, 3] = float("nan")
        spoilt = by_engine(spec, t._replace(x=x), o, torch.float64)
        assert same_bits(spoilt, clean) == [], name


def test_gates_of_80_and_units_that_fill_no_vector() -> None:
    """An exponential gate overflows where it is not stabilised, and 0 / 0 stands beyond the last unit."""
    spec = spec_of(variants.SLSTM)
    for hidden in (2, 5, 17):
        t, o = layer_of(spec, 4, {"hidden": hidden})
        x = torch.where(t.x > 0, 80.0, -80.0)
        got = by_engine(spec, replaced(t, x), o, torch.float32)
        right = by_step(spec, replaced(t, x), o, torch.float64, torch.float64)
        assert all(v.isfinite().all() for v in got.values())
        torch.testing.assert_close(got["y"].double(), right["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_that_share_a_vector(dtype: torch.dtype) -> None:
    """All blocks of a product's operand in one vector, of every width that an engine has."""
    for name, hidden in itertools.product(("LSTM", "MGU", "LayerNormGRU"), (2, 4, 8)):
        assert_within_budget(spec_of(CELLS[name]), {"hidden": hidden, "reset": True}, dtype)


class Delay(rnnkit.Cell):
    """A state is what another was: its gradient goes on as it arrives."""

    gates, states = 1, ("h", "p", "q")
    u = rnnkit.per_unit()

    @staticmethod
    def step(a: Tensor, h: Tensor, p: Tensor, q: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(a + u * q), h, p


class Exchanged(rnnkit.Cell):
    gates, states = 1, ("h", "c")

    @staticmethod
    def step(gx: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return c, torch.tanh(gx + h)


class SharedProduct(rnnkit.Cell):
    """A product's result is part of two states, so that it may be written into neither's gradient."""

    gates, states = 1, ("h", "c")
    w = rnnkit.weight(1)

    @staticmethod
    def step(gx: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        v = F.linear(h + c, w)
        return F.layer_norm(v + h, h.shape[-1:]), gx + v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", [Delay, Exchanged, SharedProduct])
def test_gradients_that_go_elsewhere_as_they_arrive(cell: type[rnnkit.Cell], dtype: torch.dtype) -> None:
    for how in ({"hidden": 21}, {"hidden": 16, "reset": True, "lengths": True}, {"hidden": 8, "reverse": True}):
        assert_within_budget(spec_of(cell), how, dtype)


class Largest(rnnkit.Cell):
    """The backward makes the row again and looks for its largest value."""

    gates, states = 1, ("h",)

    @staticmethod
    def step(a: Tensor, h: Tensor) -> Tensor:
        return torch.tanh((torch.tanh(a) - F.gelu(h)).amax(-1, keepdim=True)) + 0.05 * h


class WinnerTakesAll(rnnkit.Cell):
    gates, states = 1, ("h",)

    @staticmethod
    def step(a: Tensor, h: Tensor) -> Tensor:
        s = torch.tanh(a) - F.silu(h)
        return torch.where(s >= s.amax(-1, keepdim=True), torch.tanh(a), 0.1 * torch.tanh(a) + 0.05 * h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", [Largest, WinnerTakesAll])
def test_what_is_made_again_is_the_same_to_the_bit(cell: type[rnnkit.Cell], dtype: torch.dtype) -> None:
    for hidden in (4, 8, 16, 32, 64, 96):
        assert_within_budget(spec_of(cell), {"hidden": hidden, "steps": 6, "rows": 8}, dtype)


def test_a_negative_bit_is_resolved() -> None:
    """torch marks the imaginary part of a conjugate instead of changing its sign in memory."""
    spec = spec_of(variants.LSTM)
    t, o = layer_of(spec, 6, {})
    marked = torch.complex(torch.zeros_like(t.x), -t.x).conj().imag
    assert marked.is_neg() and torch.equal(marked, t.x)
    right = by_engine(spec, t, o, torch.float64)
    assert same_bits(by_engine(spec, t._replace(x=marked), o, torch.float64), right) == []


def replaced(t: CellInputs, x: Tensor) -> CellInputs:
    return t._replace(x=x, w_ih=torch.ones_like(t.w_ih) / t.x.shape[2])  # type: ignore[arg-type]


def test_no_steps_no_rows() -> None:
    spec = spec_of(variants.LSTM)
    for sizes in ({"steps": 0}, {"rows": 0}):
        t, o = layer_of(spec, 0, sizes)
        got = by_engine(spec, t, o, torch.float32)
        right = by_step(spec, t, o, torch.float64, torch.float64)
        assert {name: v.shape for name, v in got.items()} == {name: v.shape for name, v in right.items()}
        assert all(torch.equal(got[name].double(), right[name]) for name in got if got[name].numel())


def test_python_and_the_engine_number_alike() -> None:
    assert torch.ops.rnnkit.cpu_program_ops().split() == list(words.OPS)


def test_words_that_are_no_program_are_refused_or_harmless() -> None:
    """Any one word changed: an error, or numbers; never an address beyond an array, as the sanitizers' build sees."""
    spec = spec_of(variants.LayerNormLSTM)
    program = program_of(spec, 8)
    t = draw(spec, hidden=8, rows=2, steps=2).to(torch.float32)
    right = words.forward_words(words.ProgramKey(program), True, 3)
    given = list(struct.unpack(f"<{len(right) // 8}q", right))
    refused = 0
    for k, value in itertools.product(range(len(given)), (-2, -1, 0, 1, 3, 1 << 40)):
        if given[k] == value:
            continue
        changed = struct.pack(f"<{len(given)}q", *(value if i == k else v for i, v in enumerate(given)))
        try:
            extension.native.program_forward(changed, 1, 0, 2, cpu._tensors(program, t))  # type: ignore[union-attr]
        except RuntimeError:
            refused += 1
    assert refused > len(given)
    with pytest.raises(RuntimeError, match=r"no program|header"):
        extension.native.program_forward(right[:-8], 1, 0, 2, cpu._tensors(program, t))  # type: ignore[union-attr]


def test_a_wrong_derivative_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is no formality: one sign in the backward's words."""
    spec, how = spec_of(variants.PeepholeLSTM), HOW["masked"]
    t, o = layer_of(spec, 0, how)
    usual = by_step(spec, t, o, torch.float32, torch.float32)
    truth = by_step(spec, t, o, torch.float64, torch.float64)
    assert complaints(by_engine(spec, t, o, torch.float32), usual, truth, torch.float32) == []
    program = program_of(spec, 37)
    nodes = list(program.backward.nodes)
    k = next(n for n, node in enumerate(nodes) if node.op == "sub")
    nodes[k] = nodes[k]._replace(op="add")
    planted = replace(program, backward=replace(program.backward, nodes=nodes))
    monkeypatch.setattr(check, "program_of", lambda *_: check.Checked(planted, None, 0.0))
    assert complaints(by_engine(spec, t, o, torch.float32), usual, truth, torch.float32)
