"""Every variant against its paper's equations, written once more as a plain loop; gradients by differences; and its
masks, whose numbers are the generator's."""

from __future__ import annotations

import pytest
import torch
from cell_loop import BACKENDS, F64, PLAIN, PROBLEMS, RAGGED, SMALL, Problem, call, check, draw, function_of, loop
from support import some
from variant_cells import ORACLES

import rnnkit
from rnnkit import variants
from rnnkit.custom.declare import spec_of

CELLS = [name for name in variants.__all__ if isinstance(getattr(variants, name), type(rnnkit.Cell))]
CELLS = [name for name in CELLS if issubclass(getattr(variants, name), rnnkit.Cell)]


def test_every_variant_has_an_oracle() -> None:
    assert set(CELLS) == set(ORACLES)
    asked = """LayerNormLSTM LayerNormGRU PeepholeLSTM ZoneoutLSTM ZoneoutGRU RecurrentDropoutLSTM RecurrentDropoutGRU
    CoupledLSTM IndRNN LiGRU SLSTM BlockGRU GRUD AUGRU MGU"""
    assert set(asked.split()) <= set(CELLS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ORACLES)
def test_numbers_and_gradients_are_the_papers(name: str, problem: str, backend: str) -> None:
    check(ORACLES[name], PROBLEMS[problem], backend)


@pytest.mark.parametrize("name", some(ORACLES, 3))
def test_gradients_by_differences(name: str) -> None:
    run, values = function_of(ORACLES[name], SMALL, draw(ORACLES[name], SMALL))
    torch.autograd.gradcheck(run, values, fast_mode=True)
    torch.autograd.gradgradcheck(run, values, fast_mode=True)


@pytest.mark.parametrize("name", ORACLES)
def test_other_activations(name: str) -> None:
    """By name and as functions: what the oracle computes with them, and other numbers than without."""
    oracle, cell = ORACLES[name], type(rnnkit.Custom(ORACLES[name].cell, 1, 1).cell)
    gated = hasattr(cell, "recurrent_activation")
    options = {"activation": "softsign", **({"recurrent_activation": torch.nn.functional.hardsigmoid} if gated else {})}
    fixed = {"dropout_x": 0.0} if hasattr(cell, "dropout_x") else {}
    other = type(oracle)(cell(**options, **fixed), oracle.step, oracle.given, oracle.before)
    given = draw(other, RAGGED)
    found = call(other, RAGGED, given)["y"]
    expected = loop(other, RAGGED, given, torch.nn.functional.softsign, torch.nn.functional.hardsigmoid)["y"]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert (found - loop(oracle, RAGGED, given)["y"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_near(name: str, dtype: torch.dtype) -> None:
    wide, half = (call(ORACLES[name], PLAIN, draw(ORACLES[name], PLAIN, d))["y"] for d in (F64, dtype))
    assert half.dtype == dtype
    assert (half.double() - wide).abs().max() < 0.2  # states are carried in float32; parameters are rounded


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bias", [True, False])
def test_plain_cells_are_torchs(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(4, 6, num_layers=2, bidirectional=True, bias=bias, dtype=F64)
    mine = rnnkit.Custom(getattr(variants, name), 4, 6, num_layers=2, bidirectional=True, bias=bias, dtype=F64)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, 4, dtype=F64)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_gru_with_the_reset_before_is_the_built_in_one() -> None:
    torch.manual_seed(0)
    theirs = rnnkit.GRU(4, 6, reset_after=False, dtype=F64, backend="reference")
    mine = rnnkit.Custom(variants.GRUResetBefore, 4, 6, dtype=F64)
    with torch.no_grad():
        mine.weight_ih_l0.copy_(theirs.weight_ih_l0)
        mine.bias_ih_l0.copy_(theirs.bias_ih_l0 + theirs.bias_hh_l0)
        mine.w_rz_l0.copy_(theirs.weight_hh_l0[:12])
        mine.w_n_l0.copy_(theirs.weight_hh_l0[12:])
    x = torch.randn(5, 3, 4, dtype=F64)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ORACLES)
def test_nothing_of_padding_is_read(name: str) -> None:
    """NaN beyond the lengths, in x and in what a step is given: the same outputs and gradients as without."""
    oracle, problem = ORACLES[name], Problem(lengths=(4, 1, 5), hx=False)
    results = []
    for fill in (0.0, float("nan")):
        given = draw(oracle, problem)
        with torch.no_grad():
            for v in [*given.leaves.values(), *given.fixed.values()]:
                if v.shape[0] == problem.steps:
                    v[4, 0] = v[1:, 1] = fill
        y = call(oracle, problem, given)["y"]
        leaves = [*given.layer.parameters(), *given.leaves.values()]
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_cells_are_few_lines_with_a_source() -> None:
    for name in CELLS:
        cell = getattr(variants, name)
        assert cell.__doc__ and ("Source: " in cell.__doc__ or "options and source" in cell.__doc__), name
        options = [n for n in vars(spec_of(cell).cell)["_options"]]
        assert "activation" in options, name
