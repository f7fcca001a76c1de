"""Custom cells as generated Triton kernels, in the interpreter: variants and further cells within the budget of
float64, in every dtype, with lengths, resets, both directions, heads, what is not saved made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Values, complaints, pooled, some
from test_engine_programs import (
    CELLS,
    by_step,
    grads_of,
    layer_of,
    named,
    needs_of,
    program_of,
    replaced,
)
from torch import Tensor

import rnnkit
from rnnkit import variants
from rnnkit.backends.triton import program as triton
from rnnkit.cells import compute_dtype
from rnnkit.custom import triton_source
from rnnkit.custom.declare import CellSpec, spec_of
from rnnkit.custom.inputs import CellInputs, CellOptions, CellOutputs

SMALL = {"steps": 3, "rows": 3, "inputs": 3, "hidden": 5}
MASKED = {**SMALL, "lengths": True, "reset": True}
HOW: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "masked": MASKED,
    "reverse": {**MASKED, "reverse": True},
    "again": {**MASKED, "recompute": True},
    "again in reverse": {**MASKED, "recompute": True, "reverse": True},
    "heads": {**SMALL, "heads": 3, "hidden": 6},
    "heads in reverse": {**MASKED, "heads": 3, "hidden": 6, "reverse": True},
    "projected": {**SMALL, "project": False, "lengths": True},
}


def by_triton(spec: CellSpec, t: CellInputs, o: CellOptions, dtype: torch.dtype) -> Values:
    program, t = program_of(spec, t.states[0].shape[1]), t.to(dtype)
    assert triton.unsupported(program, "cpu", dtype, o) == []
    outputs, saved = triton.forward(program, t, o, True)
    assert [(v.shape, v.dtype) for v in saved] == triton.saved_shapes(program, t, o)
    found = triton.backward(program, t, o, outputs.y, saved, grads_of(spec, t, dtype), needs_of(spec, t))
    return named(spec, outputs, t, found)


def compare(name: str, how: dict[str, Any], dtype: torch.dtype, seeds: int = 1) -> list[Any]:
    spec, wide = spec_of(CELLS[name]), compute_dtype(dtype)
    got, usual, truth = [], [], []
    for seed in range(seeds):
        t, o = layer_of(spec, 5 + seed, how)
        got.append(by_triton(spec, t, o, dtype))
        usual.append(by_step(spec, t, o, torch.float32 if dtype == torch.float64 else wide, dtype))
        truth.append(by_step(spec, t, o, torch.float64, torch.float64))
    return complaints(pooled(got), pooled(usual), pooled(truth), dtype)


def close(name: str, how: dict[str, Any]) -> None:
    """In float64, where right means right to the last digits."""
    spec = spec_of(CELLS[name])
    t, o = layer_of(spec, 5, how)
    found, right = by_triton(spec, t, o, torch.float64), by_step(spec, t, o, torch.float64, torch.float64)
    assert found.keys() == right.keys()
    for key, v in found.items():
        torch.testing.assert_close(v, right[key], rtol=1e-11, atol=1e-11, msg=lambda m, k=key: f"off by: {k}: {m}")


def turns() -> list[Any]:
    """Every cell once, in turn in each way."""
    ways = list(HOW)
    every = [(name, ways[k % len(ways)]) for k, name in enumerate(CELLS)]
    return every


@pytest.mark.parametrize("case", some(turns(), 3), ids="-".join)
def test_a_cell(case: tuple[str, str]) -> None:
    name, how = case
    close(name, HOW[how])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "how"),
    [("PeepholeLSTM", "masked"), ("GRUD", "reverse"), ("LayerNormGRU", "again"), ("SLSTM", "heads")]
    + [
        pytest.param(name, ("again in reverse", "heads")[k % 2], marks=pytest.mark.long)
        for k, name in enumerate(CELLS)
        if k % 3 == 0
    ],
)
def test_within_the_budget_of_float64(name: str, how: str, dtype: torch.dtype) -> None:
    assert compare(name, HOW[how], dtype) == []


def test_nan_in_padding_and_before_a_reset_reaches_nothing() -> None:
    """Row 1 ends after a step; row 2 is reset at step 2, before which nobody asks for a gradient."""
    spec = spec_of(variants.SLSTM)
    t, o = layer_of(spec, 3, MASKED)
    t = t._replace(lengths=torch.tensor([3, 1, 3]), reset=torch.zeros(3, 3, dtype=torch.bool))
    t.reset[2, 2] = True  # type: ignore[index]
    grads = grads_of(spec, t, torch.float64)
    grads.y[:2, 2] = 0
    spoilt = t.x.clone()
    spoilt[1:, 1] = spoilt[:2, 2] = float("nan")
    found = []
    for x in (t.x, spoilt):
        given, program = t._replace(x=x), program_of(spec, 5)
        outputs, saved = triton.forward(program, given, o, True)
        found.append(
            triton.backward(
                program, given, o, outputs.y, saved, CellOutputs(grads.y, grads.last, ()), needs_of(spec, t)
            )
        )
        assert outputs.y[2:, 2].isfinite().all() and all(v.isfinite().all() for v in outputs.last)
    for clean, dirty in zip(*found, strict=True):
        assert clean is None or torch.equal(clean, dirty)  # type: ignore[arg-type]


def test_gates_of_80_and_units_that_fill_no_tile() -> None:
    """An exponential gate overflows where it is not stabilised, and 0 / 0 stands in the lanes beyond the last unit."""
    spec = spec_of(variants.SLSTM)
    t, o = layer_of(spec, 4, {**SMALL, "hidden": 3})
    t = replaced(t, torch.where(t.x > 0, 80.0, -80.0))
    got, right = by_triton(spec, t, o, torch.float32), by_step(spec, t, o, torch.float64, torch.float64)
    assert all(v.isfinite().all() for v in got.values())
    torch.testing.assert_close(got["y"].double(), right["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{"steps": 0}, {"rows": 0}, {"steps": 0, "recompute": True}], ids=str)
def test_no_steps_no_rows(how: dict[str, Any]) -> None:
    spec = spec_of(variants.GRUD)
    t, o = layer_of(spec, 0, {**SMALL, **how})
    got, right = by_triton(spec, t, o, torch.float32), by_step(spec, t, o, torch.float64, torch.float64)
    assert {name: v.shape for name, v in got.items()} == {name: v.shape for name, v in right.items()}
    assert all(torch.equal(got[name].double(), right[name]) for name in got if got[name].numel())


@pytest.mark.parametrize("exponent", [1.5, 5, 16, 17, 63, 64, 65, 100, -3, -18, -64, -67])
def test_powers_of_what_may_be_negative(exponent: float) -> None:
    """Of whole exponents; of others the base is not negative."""

    class Power(rnnkit.Cell):
        gates, states = 1, ("h",)

        @staticmethod
        def step(a: Tensor, h: Tensor) -> Tensor:
            size = 0.9 + 0.2 * torch.sigmoid(a + h)
            return torch.tanh((torch.where(a > 0, size, -size) if exponent == int(exponent) else size) ** exponent)

    spec = spec_of(Power)
    t, o = layer_of(spec, 5, SMALL)
    found, right = by_triton(spec, t, o, torch.float64), by_step(spec, t, o, torch.float64, torch.float64)
    for key, v in right.items():
        assert v.isfinite().all()
        torch.testing.assert_close(found[key], v, rtol=1e-11, atol=1e-11)
    assert exponent == int(exponent) or (right["y"] > 0).all()
    assert exponent % 2 == 0 or exponent == 1.5 or (right["y"] < 0).any()


def test_several_tiles() -> None:
    """Programs of one row each."""
    assert triton.tile(130)[:2] == (1, 256)
    close("GRU", {**MASKED, "hidden": 130, "rows": 2, "steps": 2})


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.chunks, "LEAST_ROWS", 1)
    monkeypatch.setattr(triton.chunks, "MOST_CHUNKS", 2)
    close("PeepholeLSTM", {**MASKED, "steps": 4, "recompute": True, "reverse": reverse})


def test_a_layer_asks_for_it_by_name() -> None:
    """In plain calls and under torch.compile, whose operator keeps what `saved_shapes` says."""
    layer = rnnkit.Custom(variants.LayerNormGRU, 3, 5, backend="triton")
    x = torch.randn(2, 2, 3, requires_grad=True)

    def results(run: Any) -> list[Tensor]:
        y = run(x)[0]
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    plain, compiled = results(layer), results(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    with pytest.raises(NotImplementedError, match="at most 4096 of them, got 5000"):
        rnnkit.Custom(variants.IndRNN, 1, 5000, backend="triton")(torch.zeros(1, 1, 1))


def test_gradients_that_nobody_wants_are_none() -> None:
    spec = spec_of(variants.PeepholeLSTM)
    t, o = layer_of(spec, 1, {**SMALL, "steps": 1})
    t, program = t.to(torch.float32), program_of(spec, 5)
    outputs, saved = triton.forward(program, t, o, True)
    grads = grads_of(spec, t, torch.float32)._replace(y=None)  # type: ignore[arg-type]
    every = triton.backward(program, t, o, outputs.y, saved, grads, needs_of(spec, t))
    for k in (0, 2, 3, 5, 6, 8):  # x, a state, w_ih, b_hh, w_hh, a parameter per unit
        wanted = needs_of(spec, t)[k]
        one = triton.backward(program, t, o, outputs.y, saved, grads, [wanted and n == k for n in range(len(every))])
        assert [n for n, g in enumerate(one) if g is not None] == ([k] if wanted else [])
        assert not wanted or torch.equal(one[k], every[k])  # type: ignore[arg-type]


# The functions that kernels call.

FUNCTIONS = ("sigmoid", "tanh", "relu", "expm1", "log1p", "rsqrt", "nearest", "tl.erf", "tl.log", "tl.sin")
TORCH = {"nearest": torch.round, "tl.erf": torch.erf, "tl.log": torch.log, "tl.sin": torch.sin}
PROBE = "\n\n@triton.jit\ndef probe(p, out, N, F: tl.constexpr, BLOCK: tl.constexpr):\n"
PROBE += "    at, unit = tl.zeros((1,), tl.int64), tl.arange(0, BLOCK)\n    mask = (unit < N)[None, :]\n"
PROBE += "    v = read(p, at, unit, mask, F)\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functions_are_torchs(dtype: torch.dtype) -> None:
    import triton.language as tl

    text = triton_source.HEAD + PROBE
    text += "".join(f"    write(out + {k} * N, at, unit, mask, {f}(v))\n" for k, f in enumerate(FUNCTIONS))
    small = [10.0**-k for k in range(1, 40, 4)]
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 0.63, 0.65, 1.0, 3.0, 20.0, 88.0, 1e10, *small, float("inf"), float("nan")])
    x = torch.cat([x, -x, torch.linspace(-9, 9, 37)]).to(dtype)
    out = torch.empty(len(FUNCTIONS), len(x), dtype=dtype)
    width = tl.float32 if dtype == torch.float32 else tl.float64
    triton.functions_of(text)["probe"][(1,)](x, out, len(x), F=width, BLOCK=128)
    for name, found in zip(FUNCTIONS, out, strict=True):
        right = TORCH.get(name, getattr(torch, name, None))(x.double()).to(dtype)  # type: ignore[misc]
        torch.testing.assert_close(found, right, rtol=8 * torch.finfo(dtype).eps, atol=0, equal_nan=True, msg=name)
