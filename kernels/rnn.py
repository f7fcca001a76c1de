"""The vanilla recurrent cell in Triton: h_t = act(x_t + W_hh h_{t-1}), act being tanh or relu.

`gx` is W_ih x_t + b_ih + b_hh, [n, B, H]. The formula and its derivative on values; then the scans that keep W_hh on
chip through all of time; then one step of each, for a product made outside (kernels/product.py).
"""

import triton
import triton.language as tl

from .product import carry, is_idle_row, units
from .shared import (
    dot,
    is_cut,
    is_idle,
    keep,
    length_of,
    load,
    matrix,
    relu,
    replaced,
    rows,
    store,
    tanh,
    time_index,
    zero_accumulator,
)


@triton.jit
def step(x, hh, RELU: tl.constexpr):
    return relu(x + hh) if RELU else tanh(x + hh)


@triton.jit
def step_vjp(dh, h, RELU: tl.constexpr):
    if RELU:
        da = tl.where(h <= 0, 0.0, dh)  # NaN passes the gradient on, as in torch
    else:
        da = dh * (1 - h * h)
    return da


@triton.jit(do_not_specialize=["n", "t0", "total", "reverse", "B"])
def forward(gx, w_hh, h_0, lengths, reset, h_reset, y, h_n, n, t0, total, reverse, B, RELU: tl.constexpr,
            H: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    row, unit = rows(BLOCK_B), tl.arange(0, BLOCK_H)
    inside = unit < H
    valid = (row < B)[:, None] & inside[None, :]
    length = length_of(lengths, row, total, B)
    w = matrix(w_hh, unit, unit, 1, H, H, H)
    h = load(h_0, row, unit, H, valid)
    for k in tl.range(0, n):
        j = time_index(k, n, reverse)
        t = t0 + j
        live = (t < length)[:, None] & inside[None, :]
        x = load(gx, j * B + row, unit, H, live)
        if reset is not None:
            h = replaced(h, h_reset, is_cut(reset, t, row, length, B, reverse), row, unit, H, inside)
        new = step(x, dot(h, w, zero_accumulator(h, BLOCK_H), PRECISION), RELU)
        h = tl.where(live, new, h)
        store(y, j * B + row, unit, H, valid, tl.where(live, new, 0.0))
    store(h_n, row, unit, H, valid, h)


@triton.jit(do_not_specialize=["n", "reverse", "B"])
def backward(gy, gh_n, y, w_hh, lengths, reset, dgx, dh_0, dh_reset, n, reverse, B, RELU: tl.constexpr, H: tl.constexpr,
             PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    row, unit = rows(BLOCK_B), tl.arange(0, BLOCK_H)
    inside = unit < H
    valid = (row < B)[:, None] & inside[None, :]
    length = length_of(lengths, row, n, B)
    w = matrix(w_hh, unit, unit, H, 1, H, H)
    dh = load(gh_n, row, unit, H, valid)
    to_r = tl.zeros_like(dh)
    for k in tl.range(0, n):
        t = time_index(k, n, 1 - reverse)
        at = t * B + row
        live = (t < length)[:, None] & inside[None, :]
        d = tl.where(live, dh + load(gy, at, unit, H, live), 0.0)
        da = step_vjp(d, load(y, at, unit, H, live), RELU)
        back = dot(da, w, zero_accumulator(da, BLOCK_H), PRECISION)
        if lengths is not None or reset is not None:
            idle = is_idle(d)
            da, back = keep(da, idle), keep(back, idle)
        store(dgx, at, unit, H, valid, da)
        dh = tl.where(live, back, dh)
        if reset is not None:
            cut = is_cut(reset, t, row, length, B, reverse)[:, None]
            to_r += tl.where(cut, dh, 0.0)
            dh = tl.where(cut, 0.0, dh)
    store(dh_0, row, unit, H, valid, dh)
    store(dh_reset, row, unit, H, valid, to_r)


@triton.jit(do_not_specialize=["k", "n", "t0", "total", "reverse", "B"])
def forward_step(gx, gh, h, lengths, reset, h_reset, y, k, n, t0, total, reverse, B, RELU: tl.constexpr,
                 H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """gh [B, H] = h W_hhᵀ; h becomes the next step's."""
    row, unit = rows(BLOCK_B), units(BLOCK_H)
    inside = unit < H
    valid = (row < B)[:, None] & inside[None, :]
    length = length_of(lengths, row, total, B)
    j = time_index(k, n, reverse)
    live = (t0 + j < length)[:, None] & inside[None, :]
    new = step(load(gx, j * B + row, unit, H, live), load(gh, row, unit, H, live), RELU)
    store(y, j * B + row, unit, H, valid, tl.where(live, new, 0.0))
    carry(h, new, h_reset, reset, k, n, t0 + j, row, unit, H, length, B, inside, reverse)


@triton.jit(do_not_specialize=["k", "n", "reverse", "B"])
def backward_step(gy, y, dh, lengths, reset, dgx, idle, k, n, reverse, B, RELU: tl.constexpr, H: tl.constexpr,
                  BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """dgx at the step's time, for the product that makes the next dh of it; idle [B] for that product."""
    row, unit = rows(BLOCK_B), units(BLOCK_H)
    inside = unit < H
    t = time_index(k, n, 1 - reverse)
    at = t * B + row
    lives = t < length_of(lengths, row, n, B)
    live = lives[:, None] & inside[None, :]
    d = load(dh, row, unit, H, live) + load(gy, at, unit, H, live)
    da = step_vjp(d, load(y, at, unit, H, live), RELU)
    if idle is not None:
        no = is_idle_row(dh, gy, t, row, H, lives, B, BLOCK_H)
        da = keep(da, no)
        tl.store(idle + row, no.to(tl.int32), mask=row < B)
    store(dgx, at, unit, H, (row < B)[:, None] & inside[None, :], da)
