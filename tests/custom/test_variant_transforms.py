"""What cells do outside of the step goes through torch.compile, pickles and copies: masks, batch norm, row inputs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cell_loop import Given, Problem, call, draw
from variant_cells import ORACLES, Oracle

RAGGED = Problem(lengths=(4, 2, 5), resets=((1, 0),), bidirectional=False)


@pytest.mark.parametrize("name", ["LiGRU", "ZoneoutLSTM", "RecurrentDropoutGRU", "AUGRU", "SLSTM"])
def test_compiled_in_one_graph(name: str) -> None:
    """With masks that the cell draws, from the same seed."""
    full = ORACLES[name]
    given_by_call = {key: kind for key, kind in full.given.items() if kind in ("row", "unit")}
    oracle = Oracle(full.cell, full.step, given_by_call)
    given = draw(oracle, RAGGED, torch.float32)
    torch._dynamo.reset()
    compiled: Any = torch.compile(given.layer, fullgraph=True, backend="aot_eager")
    found = []
    for layer in (given.layer, compiled):
        torch.manual_seed(4)
        y = call(oracle, RAGGED, Given(layer, given.states, given.leaves, given.fixed))["y"]
        found.append([y, *torch.autograd.grad(y.square().sum(), list(given.layer.parameters()))])
    for expected, v in zip(*found, strict=True):
        torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ORACLES)
def test_pickles_and_copies_compute_the_same(name: str) -> None:
    oracle = ORACLES[name]
    given = draw(oracle, RAGGED, torch.float32)
    given.layer.eval()
    expected = call(oracle, RAGGED, given)["y"]
    for layer in (pickle.loads(pickle.dumps(given.layer)), copy.deepcopy(given.layer)):
        assert repr(layer) == repr(given.layer)
        assert torch.equal(call(oracle, RAGGED, Given(layer, given.states, given.leaves, given.fixed))["y"], expected)
