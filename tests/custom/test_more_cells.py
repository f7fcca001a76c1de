"""Cells of other shapes than the known ones, against a plain loop, values and gradients."""

from __future__ import annotations

import pytest
import torch
from cell_loop import BACKENDS, PROBLEMS, SMALL, check, draw, function_of
from more_cells import MORE
from support import some


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", MORE)
def test_numbers_and_gradients_are_the_loops(name: str, problem: str, backend: str) -> None:
    check(MORE[name], PROBLEMS[problem], backend)


@pytest.mark.parametrize("name", some(MORE, 3))
def test_gradients_by_differences(name: str) -> None:
    run, values = function_of(MORE[name], SMALL, draw(MORE[name], SMALL))
    torch.autograd.gradcheck(run, values, fast_mode=True)
    torch.autograd.gradgradcheck(run, values, fast_mode=True)
