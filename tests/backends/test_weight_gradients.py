"""The gradients of weights at sizes beyond one block of their product: several blocks of outputs, of columns and of k.

Both weights' gradients share a packed left operand, a GRU's two thirds of it, and the biases are summed with the first
group of columns alone. Other tests' layers are too small for any of it.
"""

from __future__ import annotations

import pytest
import torch
from support import band, error, some

import rnnkit
from rnnkit.backends import BY_NAME

B, I, H = 7, 900, 700  # I + H above 1536: two groups of columns
STEPS = (103, 43)
"""T B odd and above 256: two blocks of k; and above H: chunks of time, the later ones added to the first."""
KINDS = {"lstm": ("LSTM", {}), "gru": ("GRU", {}), "gru_reset_before": ("GRU", {"reset_after": False})}
pytestmark = pytest.mark.skipif(BY_NAME["cpu"].available() is not None, reason="needs the C++ extension")


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 4], indirect=True)
@pytest.mark.parametrize("steps", some(STEPS, 2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", some(KINDS, 2))
def test_large_weights(cell, dtype, steps, threads):
    name, options = KINDS[cell]
    torch.manual_seed(0)
    layer = getattr(rnnkit, name)(I, H, **options).to(dtype)
    x, g = torch.randn(steps, B, I).to(dtype), torch.randn(steps, B, H).to(dtype)

    def gradients(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        same = getattr(rnnkit, name)(I, H, backend=backend, dtype=dtype, **options)
        same.load_state_dict(layer.state_dict())
        return torch.autograd.grad(same(x.to(dtype))[0], same.parameters(), g.to(dtype))

    truth, rounded = gradients("reference", torch.float64), gradients("reference", dtype)
    found = zip(dict(layer.named_parameters()), gradients("cpu", dtype), truth, rounded, strict=True)
    for weight, got, exact, theirs in found:
        assert error(got, exact) <= 2 * error(theirs, exact) + band(exact, dtype), weight
