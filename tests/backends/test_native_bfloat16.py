"""bfloat16 multiplied as it is stored, by dot products: NaN, infinity, subnormal numbers and the state as in torch.nn.

Accuracy is held by test_parity.py and the harness like every other kernel's, on whatever variant is chosen; here stands
what dot products could do otherwise: they take subnormal numbers for zero and signal nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import rnnkit
from rnnkit.backends.cpu import extension

NATIVE = [name for name in extension.variants if name.endswith("_bf16")]
pytestmark = pytest.mark.skipif(not NATIVE, reason="no variant of the engine has dot products of bfloat16 here")

CELLS = {"tanh": (nn.RNN, {}), "relu": (nn.RNN, {"nonlinearity": "relu"}), "lstm": (nn.LSTM, {}), "gru": (nn.GRU, {})}
STATE_AFTER_STEPS = """
import torch, rnnkit
layer = rnnkit.RNN(1, 1, nonlinearity="relu", backend="cpu").bfloat16()
with torch.no_grad():
    for p, value in zip(layer.parameters(), (0.0, 1.0, 2.0**-9, 0.0)):
        p.fill_(value)
    print(layer(torch.zeros(4, 1, 1).bfloat16(), torch.ones(1, 1, 1).bfloat16())[0][-1].item())
"""


def pair(cell: str, features: int = 5, hidden: int = 19) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer in bfloat16 and ours, with an odd number of units: the last pair is half of one."""
    kind, options = CELLS[cell]
    torch.manual_seed(1)
    theirs = kind(features, hidden, **options).bfloat16()
    ours = getattr(rnnkit, kind.__name__)(features, hidden, backend="cpu", **options).bfloat16()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def kinds(v: Tensor) -> Tensor:
    """Of each number: 0 finite, 1 NaN, 2 infinite, 3 minus infinite."""
    return v.isnan() + 2 * v.isposinf() + 3 * v.isneginf()


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite_goes_where_torch_has_it(cell, value, steps):
    theirs, ours = pair(cell)
    x = torch.randn(steps, 3, 5).bfloat16()
    x[0, 1, 2] = float(value)
    want, got = theirs(x)[0], ours(x)[0]
    assert torch.equal(kinds(got), kinds(want))
    assert kinds(want[:, 0]).max() == kinds(want[:, 2]).max() == 0, "no other row"
    gradients = [
        torch.autograd.grad(y[:, [0, 2]].float().sum(), m.parameters()) for m, y in ((theirs, want), (ours, got))
    ]
    for name, u, v in zip(dict(ours.named_parameters()), *gradients, strict=True):
        assert torch.equal(kinds(v), kinds(u)), name


def test_a_sum_beyond_the_largest_number_is_infinite():
    theirs, ours = pair("relu")
    with torch.no_grad():
        for m in (theirs, ours):
            m.weight_hh_l0.fill_(2.0**100)
        x = torch.ones(4, 2, 5).bfloat16()
        want, got = theirs(x)[0], ours(x)[0]
    assert kinds(want).max() == 2
    assert torch.equal(kinds(got), kinds(want))


def test_subnormal_outputs_are_kept():
    """They are not what a product gives."""
    _, ours = pair("relu")
    small = 2.0**-130
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.fill_(small if name == "bias_ih_l0" else 0)
        y, h = ours(torch.ones(3, 2, 5).bfloat16())
    assert y.unique().tolist() == h.unique().tolist() == [small]


@pytest.mark.parametrize("name", extension.variants)
def test_products_read_the_state_as_it_is_stored_where_they_are_native(name):
    """1 + 2^-9 rounds to 1: four steps of adding 2^-9 end where one does, as in torch.nn. Widened they add up."""
    env = {**os.environ, "RNNKIT_CPU_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", STATE_AFTER_STEPS], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == (1.0 if name in NATIVE else 1 + 4 * 2.0**-9)
