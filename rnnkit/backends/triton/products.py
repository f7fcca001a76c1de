"""The products around generated kernels, by torch: half types with sums in float32 where torch has them, and sums of
weights' gradients, in blocks where a weight has heads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def multiply(x: Tensor, w: Tensor, out: Tensor, wide: torch.dtype) -> None:
    product = torch.mm if x.dim() == 2 else torch.bmm
    if x.dtype == wide:
        product(x, w, out=out)
    else:
        product(x, w, wide, out=out)


@functools.cache
def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies half types here and gives the sums as they are, in float32."""
    for shape in ((16, 16), (1, 16, 16)):
        x = torch.full(shape, 1.0 + 2.0**-6, dtype=dtype, device=device)
        out = torch.zeros(shape, device=device)
        try:
            multiply(x, x, out, torch.float32)
        except (RuntimeError, TypeError, NotImplementedError):
            return False
        if not bool((out == 16 * (1 + 2.0**-6) ** 2).all()):
            return False
    return True


def outer(d: Tensor, x: Tensor, heads: int) -> Tensor:
    """Σ over time and rows of d xᵀ: [T, B, m·H], [T, B, H] -> [m·H, H/n], within each head."""
    count, each = d.shape[0] * d.shape[1], x.shape[2] // heads
    if heads == 1:
        return d.reshape(count, d.shape[2]).T @ x.reshape(count, x.shape[2])
    d = d.reshape(count, -1, heads, each).permute(2, 1, 3, 0)
    blocks = d.shape[1]
    found = d.reshape(heads, blocks * each, count) @ x.reshape(count, heads, each).transpose(0, 1)
    return found.view(heads, blocks, each, each).transpose(0, 1).reshape(-1, each)
