"""The LSTM cell with forget gate in Triton, blocks i, f, g, o, and its projection.

    i = σ(a_i)   f = σ(a_f)   g = tanh(a_g)   o = σ(a_o)          a = x_t + W_hh h_{t-1}
    c_t = f ⊙ c_{t-1} + i ⊙ g
    h_t = o ⊙ tanh(c_t)         with a projection: h_t = W_hr (o ⊙ tanh(c_t))

`gx` is W_ih x_t + b_ih + b_hh, [n, B, 4H]; h is [B, N], N = P with a projection and H without. The formulas and their
derivative on values; then the scans that keep W_hh on chip through all of time; then one step of each, for products
made outside (kernels/product.py).
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
    previous_state,
    replaced,
    rows,
    sigmoid,
    store,
    tanh,
    time_index,
    zero_accumulator,
)


@triton.jit
def step(ai, af, ag, ao, c):
    i, f, g, o = sigmoid(ai), sigmoid(af), tanh(ag), sigmoid(ao)
    c = f * c + i * g
    return o * tanh(c), c, i, f, g, o


@triton.jit
def step_vjp(dm, dc, i, f, g, o, c_before, c):
    """dm: of o ⊙ tanh(c). Gives the gradients of the four a and of c_before."""
    tc = tanh(c)
    dc = dc + dm * o * (1 - tc * tc)
    dai = dc * g * i * (1 - i)
    daf = dc * c_before * f * (1 - f)
    dag = dc * i * (1 - g * g)
    dao = dm * tc * o * (1 - o)
    return dai, daf, dag, dao, dc * f


@triton.jit
def blocks(w_hh, k, unit, along_k, along_unit, K, N, BLOCK):
    """The parts of W_hh for i, f, g, o; BLOCK elements apart."""
    wi = matrix(w_hh, k, unit, along_k, along_unit, K, N)
    wf = matrix(w_hh + BLOCK, k, unit, along_k, along_unit, K, N)
    wg = matrix(w_hh + 2 * BLOCK, k, unit, along_k, along_unit, K, N)
    wo = matrix(w_hh + 3 * BLOCK, k, unit, along_k, along_unit, K, N)
    return wi, wf, wg, wo


@triton.jit
def load4(p, row, unit, H: tl.constexpr, mask):
    """The four blocks of a row of 4H."""
    v1, v2 = load(p, row, unit, 4 * H, mask), load(p, row, unit + H, 4 * H, mask)
    v3, v4 = load(p, row, unit + 2 * H, 4 * H, mask), load(p, row, unit + 3 * H, 4 * H, mask)
    return v1, v2, v3, v4


@triton.jit
def store4(p, row, unit, H: tl.constexpr, mask, v1, v2, v3, v4):
    store(p, row, unit, 4 * H, mask, v1)
    store(p, row, unit + H, 4 * H, mask, v2)
    store(p, row, unit + 2 * H, 4 * H, mask, v3)
    store(p, row, unit + 3 * H, 4 * H, mask, v4)


@triton.jit(do_not_specialize=["n", "t0", "total", "reverse", "B"])
def forward(gx, w_hh, w_hr, h_0, c_0, lengths, reset, h_reset, c_reset, y, h_n, c_n, c_all, gates, n, t0, total,
            reverse, B, H: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
            BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    row, unit, out = rows(BLOCK_B), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    inside, shown = unit < H, out < N
    valid, valid_h = (row < B)[:, None] & inside[None, :], (row < B)[:, None] & shown[None, :]
    length = length_of(lengths, row, total, B)
    wi, wf, wg, wo = blocks(w_hh, out, unit, 1, N, N, H, H * N)
    if w_hr is not None:
        wr = matrix(w_hr, unit, out, 1, H, H, N)
    h, c = load(h_0, row, out, N, valid_h), load(c_0, row, unit, H, valid)
    for k in tl.range(0, n):
        j = time_index(k, n, reverse)
        t = t0 + j
        lives = (t < length)[:, None]
        live = lives & inside[None, :]
        xi, xf, xg, xo = load4(gx, j * B + row, unit, H, live)
        if reset is not None:
            at = is_cut(reset, t, row, length, B, reverse)
            h, c = replaced(h, h_reset, at, row, out, N, shown), replaced(c, c_reset, at, row, unit, H, inside)
        zero = zero_accumulator(h, BLOCK_H)
        ai, af = xi + dot(h, wi, zero, PRECISION), xf + dot(h, wf, zero, PRECISION)
        ag, ao = xg + dot(h, wg, zero, PRECISION), xo + dot(h, wo, zero, PRECISION)
        new, new_c, i, f, g, o = step(ai, af, ag, ao, c)
        c = tl.where(live, new_c, c)
        store4(gates, j * B + row, unit, H, valid, i, f, g, o)
        store(c_all, j * B + row, unit, H, valid, tl.where(live, new_c, 0.0))
        if w_hr is not None:
            m = tl.where(inside[None, :], new, 0.0)
            new = dot(m, wr, zero_accumulator(m, BLOCK_N), PRECISION)
        h = tl.where(lives & shown[None, :], new, h)
        store(y, j * B + row, out, N, valid_h, tl.where(lives, new, 0.0))
    store(h_n, row, out, N, valid_h, h)
    store(c_n, row, unit, H, valid, c)


@triton.jit(do_not_specialize=["n", "reverse", "B"])
def backward(gy, gh_n, gc_n, gc_all, c_all, gates, w_hh, w_hr, c_0, lengths, reset, c_reset, dgx, dp, dh_0, dc_0,
             dh_reset, dc_reset, n, reverse, B, H: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
             BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    row, unit, out = rows(BLOCK_B), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    inside, shown = unit < H, out < N
    valid, valid_h = (row < B)[:, None] & inside[None, :], (row < B)[:, None] & shown[None, :]
    length = length_of(lengths, row, n, B)
    wi, wf, wg, wo = blocks(w_hh, unit, out, N, 1, H, N, H * N)
    if w_hr is not None:
        wr = matrix(w_hr, out, unit, H, 1, N, H)
    dh, dc = load(gh_n, row, out, N, valid_h), load(gc_n, row, unit, H, valid)
    dh_to_r, dc_to_r = tl.zeros_like(dh), tl.zeros_like(dc)
    for k in tl.range(0, n):
        t = time_index(k, n, 1 - reverse)
        at = t * B + row
        lives = (t < length)[:, None]
        live, live_h = lives & inside[None, :], lives & shown[None, :]
        i, f, g, o = load4(gates, at, unit, H, live)
        c = load(c_all, at, unit, H, live)
        c_before = previous_state(c_all, c_0, c_reset, reset, t, row, unit, H, length, B, inside, reverse)
        d = tl.where(live_h, dh + load(gy, at, out, N, live_h), 0.0)
        d_c = tl.where(live, dc + load(gc_all, at, unit, H, live), 0.0)
        dm = d
        if w_hr is not None:
            dm = tl.where(live, dot(d, wr, zero_accumulator(d, BLOCK_H), PRECISION), 0.0)
            store(dp, at, out, N, valid_h, d)
        dai, daf, dag, dao, back_c = step_vjp(dm, d_c, i, f, g, o, c_before, c)
        if lengths is not None or reset is not None:
            idle = is_idle(d) & is_idle(d_c)
            dai, daf, dag, dao = keep(dai, idle), keep(daf, idle), keep(dag, idle), keep(dao, idle)
            back_c = keep(back_c, idle)
        store4(dgx, at, unit, H, valid, dai, daf, dag, dao)
        back = dot(dai, wi, zero_accumulator(dai, BLOCK_N), PRECISION)
        back = dot(daf, wf, back, PRECISION)
        back = dot(dag, wg, back, PRECISION)
        back = dot(dao, wo, back, PRECISION)
        if lengths is not None or reset is not None:
            back = keep(back, idle)
        dh, dc = tl.where(live_h, back, dh), tl.where(live, back_c, dc)
        if reset is not None:
            cut = is_cut(reset, t, row, length, B, reverse)[:, None]
            dh_to_r += tl.where(cut, dh, 0.0)
            dc_to_r += tl.where(cut, dc, 0.0)
            dh, dc = tl.where(cut, 0.0, dh), tl.where(cut, 0.0, dc)
    store(dh_0, row, out, N, valid_h, dh)
    store(dc_0, row, unit, H, valid, dc)
    store(dh_reset, row, out, N, valid_h, dh_to_r)
    store(dc_reset, row, unit, H, valid, dc_to_r)


@triton.jit(do_not_specialize=["k", "n", "t0", "total", "reverse", "B"])
def forward_step(gx, gh, h, c, lengths, reset, h_reset, c_reset, y, m, c_all, gates, k, n, t0, total, reverse, B,
                 H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """gh [B, 4H] = h W_hhᵀ; c and, where m is None, h become the next step's. m [B, H]: what W_hr multiplies."""
    row, unit = rows(BLOCK_B), units(BLOCK_H)
    inside = unit < H
    valid = (row < B)[:, None] & inside[None, :]
    length = length_of(lengths, row, total, B)
    j = time_index(k, n, reverse)
    t = t0 + j
    live = (t < length)[:, None] & inside[None, :]
    xi, xf, xg, xo = load4(gx, j * B + row, unit, H, live)
    hi, hf, hg, ho = load4(gh, row, unit, H, live)
    new, new_c, i, f, g, o = step(xi + hi, xf + hf, xg + hg, xo + ho, load(c, row, unit, H, live))
    store4(gates, j * B + row, unit, H, valid, i, f, g, o)
    store(c_all, j * B + row, unit, H, valid, tl.where(live, new_c, 0.0))
    carry(c, new_c, c_reset, reset, k, n, t, row, unit, H, length, B, inside, reverse)
    if m is not None:
        store(m, row, unit, H, valid, new)
    else:
        store(y, j * B + row, unit, H, valid, tl.where(live, new, 0.0))
        carry(h, new, h_reset, reset, k, n, t, row, unit, H, length, B, inside, reverse)


@triton.jit(do_not_specialize=["k", "n", "reverse", "B"])
def backward_step(gy, gc_all, dh, arrived, dm, dc, dc_next, c_all, gates, c_0, lengths, reset, c_reset, dgx, dc_reset,
                  idle, k, n, reverse, B, H: tl.constexpr, N: tl.constexpr, BLOCK_B: tl.constexpr,
                  BLOCK_H: tl.constexpr):  # fmt: skip
    """dgx at the step's time, and dc_next of dc. With a projection `arrived` [B, N] is the whole gradient of the state
    and dm = arrived W_hr; else both are None, and dh + gy is."""
    row, unit = rows(BLOCK_B), units(BLOCK_H)
    inside = unit < H
    valid = (row < B)[:, None] & inside[None, :]
    length = length_of(lengths, row, n, B)
    t = time_index(k, n, 1 - reverse)
    at = t * B + row
    lives = t < length
    live = lives[:, None] & inside[None, :]
    i, f, g, o = load4(gates, at, unit, H, live)
    c = load(c_all, at, unit, H, live)
    c_before = previous_state(c_all, c_0, c_reset, reset, t, row, unit, H, length, B, inside, reverse)
    if dm is not None:
        d = load(dm, row, unit, H, live)
    else:
        d = load(dh, row, unit, H, live) + load(gy, at, unit, H, live)
    d_c = load(dc, row, unit, H, live) + load(gc_all, at, unit, H, live)
    dai, daf, dag, dao, back_c = step_vjp(d, d_c, i, f, g, o, c_before, c)
    if idle is not None:
        if dm is not None:
            no = is_idle_row(arrived, None, t, row, N, lives, B, BLOCK_H)
        else:
            no = is_idle_row(dh, gy, t, row, N, lives, B, BLOCK_H)
        no = no & is_idle_row(dc, gc_all, t, row, H, lives, B, BLOCK_H)
        dai, daf, dag, dao = keep(dai, no), keep(daf, no), keep(dag, no), keep(dao, no)
        back_c = keep(back_c, no)
        tl.store(idle + row, no.to(tl.int32), mask=row < B)
    store4(dgx, at, unit, H, valid, dai, daf, dag, dao)
    new_dc = tl.where(live, back_c, load(dc, row, unit, H, valid))
    if reset is not None:
        cut = is_cut(reset, t, row, length, B, reverse)[:, None]
        store(dc_reset, row, unit, H, valid, load(dc_reset, row, unit, H, valid) + tl.where(cut, new_dc, 0.0))
        new_dc = tl.where(cut, 0.0, new_dc)
    store(dc_next, row, unit, H, valid, new_dc)
