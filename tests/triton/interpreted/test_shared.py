"""What the kernels share, alone: activations, rounding, and offsets beyond 32 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnkit.kernels.shared import matrix, narrow, relu, rows, sigmoid, store, tanh, time_index

EDGES = torch.tensor([0.0, -0.0, 0.64, -0.64, 1e-30, 88.0, -88.0, 1e30, float("inf"), -float("inf"), float("nan")])


@triton.jit
def activate(x, y, WHICH: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    v = tl.load(x + at)
    if WHICH == 0:
        r = sigmoid(v)
    elif WHICH == 1:
        r = tanh(v)
    else:
        r = relu(v)
    tl.store(y + at, r)


@triton.jit
def round_to(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, narrow(tl.load(x + at), y.dtype.element_ty))


@triton.jit
def write_step(y, k, n, B, WIDTH: tl.constexpr):
    row, unit = rows(16), tl.arange(0, WIDTH)
    mask = (row < B)[:, None] & (unit < WIDTH)[None, :]
    store(y, time_index(k, n, 0) * B + row, unit, WIDTH, mask, tl.full((16, WIDTH), 3.0, tl.float32))


@triton.jit
def read_matrix(w, out, along_unit, N: tl.constexpr):
    at = tl.arange(0, N)
    v = matrix(w, at, at, 1, along_unit, N, N)
    tl.store(out + at[:, None] * N + at[None, :], v)


def values() -> Tensor:
    line, near = torch.linspace(-12, 12, 3000), torch.logspace(-8, 1, 4096)
    return torch.cat([EDGES, line, near, -near])[:8192].contiguous()


@pytest.mark.parametrize("which", ["sigmoid", "tanh", "relu"])
def test_activations(which: str) -> None:
    """Within two units in the last place, at the edges as torch."""
    x = values()
    y, exact = torch.empty_like(x), getattr(torch, which)(x.double())
    activate[(1,)](x, y, ["sigmoid", "tanh", "relu"].index(which), x.numel())
    assert torch.equal(y.isnan(), exact.isnan())
    off = (y.double() - exact).nan_to_num(0.0).abs()
    assert (off <= 2 * torch.finfo(torch.float32).eps * exact.nan_to_num(0.0).abs() + 1e-37).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """Also where Triton's interpreter truncates."""
    x = values()
    y = torch.empty(x.shape, dtype=dtype)
    round_to[(1,)](x, y, x.numel())
    assert torch.equal(y.float().nan_to_num(7.0), x.to(dtype).float().nan_to_num(7.0))
    assert torch.equal(y.isnan(), x.isnan())


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """The last step of 2^31 elements, in a file that takes no room."""
    steps, batch, width = 2**23 + 1, 16, 16
    y = torch.from_file(str(tmp_path / "y"), shared=True, size=steps * batch * width, dtype=torch.float16)
    assert y.numel() > 2**31
    write_step[(1,)](y, steps - 1, steps, batch, width)
    assert (y[-batch * width :] == 3).all() and not y[: batch * width].any()


def test_a_matrix_beyond_32_bits(tmp_path: Path) -> None:
    """W_hh of an LSTM passes 2^31 elements at H = 23,171. What lies before it here is zeros, for offsets that wrap."""
    far, n = 2**28, 16
    w = torch.from_file(str(tmp_path / "w"), shared=True, size=2**31 + n * far, dtype=torch.int8)[2**31 :]
    expected = torch.arange(n * n, dtype=torch.int8).view(n, n)
    w.as_strided((n, n), (1, far)).copy_(expected)
    found = torch.empty_like(expected)
    read_matrix[(1,)](w, found, far, n)
    assert torch.equal(found, expected)
