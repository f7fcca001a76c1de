"""Every variant, with other activations too, and every cell of another shape: programs that pass their check."""

from __future__ import annotations

import warnings

import pytest
from more_cells import MORE
from variant_cells import ORACLES

import rnnkit
from rnnkit.custom import check
from rnnkit.custom.declare import ACTIVATIONS, spec_of


@pytest.mark.parametrize("hidden", [5, 64])
@pytest.mark.parametrize("name", [*ORACLES, *MORE])
def test_the_step_is_understood(name: str, hidden: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = check.program_of(spec_of({**ORACLES, **MORE}[name].cell), hidden)
    assert found.program is not None, found.reason


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_understood(activation: str) -> None:
    found = check.program_of(spec_of(rnnkit.variants.GRU(activation=activation)), 8)
    assert found.program is not None, found.reason
    found = check.program_of(spec_of(rnnkit.variants.LSTM(recurrent_activation=activation)), 8)
    assert found.program is not None, found.reason
