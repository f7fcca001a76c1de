"""The gated recurrent unit in Triton, blocks r, z, n, in its two forms.

    r = σ(x_r + W_hr h)     z = σ(x_z + W_hz h)     h_t = (1 − z) ⊙ n + z ⊙ h

    AFTER:      n = tanh(x_n + r ⊙ (W_hn h + b_hn))       torch.nn.GRU, cuDNN
    otherwise:  n = tanh(x_n + W_hn (r ⊙ h))              the original

`gx` [n, B, 3H] holds the x with every bias that r does not multiply. The formulas and their derivatives on values; then
the scans that keep W_hh on chip through all of time; then one step of each, for products made outside
(kernels/product.py). The original has two products in a step, one after the other.
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
def after_step(ar, az, xn, hn, h):
    """hn: W_hn h + b_hn."""
    r, z = sigmoid(ar), sigmoid(az)
    n = tanh(xn + r * hn)
    return (1 - z) * n + z * h, r, z, n


@triton.jit
def after_step_vjp(dh, h, r, z, n, hn):
    """Gradients of ar, az, xn and hn, and of h beside the products."""
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h - n) * z * (1 - z)
    dr = dn * hn * r * (1 - r)
    return dr, dz, dn, dn * r, dh * z


@triton.jit
def before_step(az, an, h):
    """an: x_n + W_hn (r ⊙ h)."""
    z = sigmoid(az)
    n = tanh(an)
    return (1 - z) * n + z * h, z, n


@triton.jit
def before_step_vjp_n(dh, z, n):
    """Gradient of an; W_hn makes drh of it, the gradient of r ⊙ h."""
    return dh * (1 - z) * (1 - n * n)


@triton.jit
def before_step_vjp(dh, drh, h, r, z, n):
    """Gradients of ar and az, and of h beside the products."""
    dz = dh * (h - n) * z * (1 - z)
    dr = drh * h * r * (1 - r)
    return dr, dz, dh * z + drh * r


@triton.jit
def blocks(w_hh, k, unit, along_k, along_unit, H: tl.constexpr):
    """The parts of W_hh for r, z, n."""
    wr = matrix(w_hh, k, unit, along_k, along_unit, H, H)
    wz = matrix(w_hh + H * H, k, unit, along_k, along_unit, H, H)
    wn = matrix(w_hh + 2 * H * H, k, unit, along_k, along_unit, H, H)
    return wr, wz, wn


@triton.jit
def load3(p, row, unit, H: tl.constexpr, width, mask):
    """The first three blocks of H columns."""
    return load(p, row, unit, width, mask), load(p, row, unit + H, width, mask), load(p, row, unit + 2 * H, width, mask)


@triton.jit
def store3(p, row, unit, H: tl.constexpr, width, mask, v1, v2, v3):
    store(p, row, unit, width, mask, v1)
    store(p, row, unit + H, width, mask, v2)
    store(p, row, unit + 2 * H, width, mask, v3)


@triton.jit
def load_bias(b_hn, unit, inside):
    """[1, units], zeros where there is none."""
    if b_hn is None:
        v = tl.zeros((1, unit.shape[0]), tl.float32)
    else:
        v = tl.load(b_hn + unit, mask=inside, other=0.0).to(tl.float32)[None, :]
    return v


@triton.jit(do_not_specialize=["n", "t0", "total", "reverse", "B"])
def forward(gx, w_hh, b_hn, h_0, lengths, reset, h_reset, y, h_n, gates, n, t0, total, reverse, B, AFTER: tl.constexpr,
            H: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    SAVED: tl.constexpr = 4 * H if AFTER else 3 * H
    row, unit = rows(BLOCK_B), tl.arange(0, BLOCK_H)
    inside = unit < H
    valid = (row < B)[:, None] & inside[None, :]
    length = length_of(lengths, row, total, B)
    wr, wz, wn = blocks(w_hh, unit, unit, 1, H, H)
    bias = load_bias(b_hn, unit, inside)
    h = load(h_0, row, unit, H, valid)
    for k in tl.range(0, n):
        j = time_index(k, n, reverse)
        at = j * B + row
        t = t0 + j
        live = (t < length)[:, None] & inside[None, :]
        xr, xz, xn = load3(gx, at, unit, H, 3 * H, live)
        if reset is not None:
            h = replaced(h, h_reset, is_cut(reset, t, row, length, B, reverse), row, unit, H, inside)
        zero = zero_accumulator(h, BLOCK_H)
        ar, az = xr + dot(h, wr, zero, PRECISION), xz + dot(h, wz, zero, PRECISION)
        if AFTER:
            hn = dot(h, wn, zero, PRECISION) + bias
            new, r, z, c = after_step(ar, az, xn, hn, h)
            store(gates, at, unit + 3 * H, SAVED, valid, hn)
        else:
            r = sigmoid(ar)
            rh = tl.where(inside[None, :], r * h, 0.0)
            new, z, c = before_step(az, xn + dot(rh, wn, zero, PRECISION), h)
        store3(gates, at, unit, H, SAVED, valid, r, z, c)
        h = tl.where(live, new, h)
        store(y, at, unit, H, valid, tl.where(live, new, 0.0))
    store(h_n, row, unit, H, valid, h)


@triton.jit(do_not_specialize=["n", "reverse", "B"])
def backward(gy, gh_n, y, gates, w_hh, h_0, lengths, reset, h_reset, dgx, dgh, dh_0, dh_reset, n, reverse, B,
             AFTER: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
             BLOCK_H: tl.constexpr):  # fmt: skip
    """dgh is None where it is dgx."""
    SAVED: tl.constexpr = 4 * H if AFTER else 3 * H
    row, unit = rows(BLOCK_B), tl.arange(0, BLOCK_H)
    inside = unit < H
    valid = (row < B)[:, None] & inside[None, :]
    length = length_of(lengths, row, n, B)
    wr, wz, wn = blocks(w_hh, unit, unit, H, 1, H)
    dh = load(gh_n, row, unit, H, valid)
    to_r = tl.zeros_like(dh)
    for k in tl.range(0, n):
        t = time_index(k, n, 1 - reverse)
        at = t * B + row
        live = (t < length)[:, None] & inside[None, :]
        r, z, c = load3(gates, at, unit, H, SAVED, live)
        h = previous_state(y, h_0, h_reset, reset, t, row, unit, H, length, B, inside, reverse)
        d = tl.where(live, dh + load(gy, at, unit, H, live), 0.0)
        zero = zero_accumulator(d, BLOCK_H)
        if AFTER:
            hn = load(gates, at, unit + 3 * H, SAVED, live)
            dr, dz, dn, dhn, direct = after_step_vjp(d, h, r, z, c, hn)
        else:
            dn = before_step_vjp_n(d, z, c)
            if lengths is not None or reset is not None:
                dn = keep(dn, is_idle(d))
            drh = tl.where(live, dot(dn, wn, zero, PRECISION), 0.0)
            dr, dz, direct = before_step_vjp(d, drh, h, r, z, c)
            dhn = dn
        if lengths is not None or reset is not None:
            idle = is_idle(d)
            dr, dz, dn, dhn, direct = (
                keep(dr, idle),
                keep(dz, idle),
                keep(dn, idle),
                keep(dhn, idle),
                keep(direct, idle),
            )
        store3(dgx, at, unit, H, 3 * H, valid, dr, dz, dn)
        store3(dgh, at, unit, H, 3 * H, valid, dr, dz, dhn)
        back = dot(dz, wz, dot(dr, wr, zero, PRECISION), PRECISION)
        if AFTER:
            back = dot(dhn, wn, back, PRECISION)
        if lengths is not None or reset is not None:
            back = keep(back, idle)
        dh = tl.where(live, direct + back, dh)
        if reset is not None:
            cut = is_cut(reset, t, row, length, B, reverse)[:, None]
            to_r += tl.where(cut, dh, 0.0)
            dh = tl.where(cut, 0.0, dh)
    store(dh_0, row, unit, H, valid, dh)
    store(dh_reset, row, unit, H, valid, to_r)


@triton.jit(do_not_specialize=["k", "n", "reverse", "B"])
def reset_step(gx, gh, h, rh, k, n, reverse, B, H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """rh [B, H] = r ⊙ h of the original form, from the first blocks of gh [B, 3H]."""
    row, unit = rows(BLOCK_B), units(BLOCK_H)
    valid = (row < B)[:, None] & (unit < H)[None, :]
    ar = load(gx, time_index(k, n, reverse) * B + row, unit, 3 * H, valid) + load(gh, row, unit, 3 * H, valid)
    store(rh, row, unit, H, valid, sigmoid(ar) * load(h, row, unit, H, valid))


@triton.jit(do_not_specialize=["k", "n", "t0", "total", "reverse", "B"])
def forward_step(gx, gh, b_hn, h, lengths, reset, h_reset, y, gates, k, n, t0, total, reverse, B, AFTER: tl.constexpr,
                 H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """gh [B, 3H] = h W_hhᵀ, its n block (r ⊙ h) W_hnᵀ unless AFTER; h becomes the next step's."""
    SAVED: tl.constexpr = 4 * H if AFTER else 3 * H
    row, unit = rows(BLOCK_B), units(BLOCK_H)
    inside = unit < H
    valid = (row < B)[:, None] & inside[None, :]
    length = length_of(lengths, row, total, B)
    j = time_index(k, n, reverse)
    at = j * B + row
    live = (t0 + j < length)[:, None] & inside[None, :]
    xr, xz, xn = load3(gx, at, unit, H, 3 * H, live)
    hr, hz, hn = load3(gh, row, unit, H, 3 * H, live)
    before = load(h, row, unit, H, live)
    if AFTER:
        hn = hn + load_bias(b_hn, unit, inside)
        new, r, z, c = after_step(xr + hr, xz + hz, xn, hn, before)
        store(gates, at, unit + 3 * H, SAVED, valid, hn)
    else:
        r = sigmoid(xr + hr)
        new, z, c = before_step(xz + hz, xn + hn, before)
    store3(gates, at, unit, H, SAVED, valid, r, z, c)
    store(y, at, unit, H, valid, tl.where(live, new, 0.0))
    carry(h, new, h_reset, reset, k, n, t0 + j, row, unit, H, length, B, inside, reverse)


@triton.jit(do_not_specialize=["k", "n", "reverse", "B"])
def candidate_back(gy, dh, gates, lengths, reset, dgx, k, n, reverse, B, H: tl.constexpr, BLOCK_B: tl.constexpr,
                   BLOCK_H: tl.constexpr):  # fmt: skip
    """The n block of dgx of the original form, for the product that makes drh of it."""
    row, unit = rows(BLOCK_B), units(BLOCK_H)
    inside = unit < H
    t = time_index(k, n, 1 - reverse)
    at = t * B + row
    lives = t < length_of(lengths, row, n, B)
    live = lives[:, None] & inside[None, :]
    d = load(dh, row, unit, H, live) + load(gy, at, unit, H, live)
    z, c = load(gates, at, unit + H, 3 * H, live), load(gates, at, unit + 2 * H, 3 * H, live)
    dn = before_step_vjp_n(d, z, c)
    if lengths is not None or reset is not None:
        dn = keep(dn, is_idle_row(dh, gy, t, row, H, lives, B, BLOCK_H))
    store(dgx, at, unit + 2 * H, 3 * H, (row < B)[:, None] & inside[None, :], dn)


@triton.jit(do_not_specialize=["k", "n", "reverse", "B"])
def backward_step(gy, dh, drh, y, gates, h_0, lengths, reset, h_reset, dgx, dgh, direct, idle, k, n, reverse, B,
                  AFTER: tl.constexpr, H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """dgx and, AFTER, dgh at the step's time; direct [B, H], what reaches h beside the products. Unless AFTER, dgx has
    its n block and drh [B, H] is that block times W_hn."""
    SAVED: tl.constexpr = 4 * H if AFTER else 3 * H
    row, unit = rows(BLOCK_B), units(BLOCK_H)
    inside = unit < H
    valid = (row < B)[:, None] & inside[None, :]
    length = length_of(lengths, row, n, B)
    t = time_index(k, n, 1 - reverse)
    at = t * B + row
    lives = t < length
    live = lives[:, None] & inside[None, :]
    r, z, c = load3(gates, at, unit, H, SAVED, live)
    h = previous_state(y, h_0, h_reset, reset, t, row, unit, H, length, B, inside, reverse)
    d = load(dh, row, unit, H, live) + load(gy, at, unit, H, live)
    if AFTER:
        hn = load(gates, at, unit + 3 * H, SAVED, live)
        dr, dz, dn, dhn, straight = after_step_vjp(d, h, r, z, c, hn)
    else:
        dr, dz, straight = before_step_vjp(d, load(drh, row, unit, H, live), h, r, z, c)
    if idle is not None:
        no = is_idle_row(dh, gy, t, row, H, lives, B, BLOCK_H)
        dr, dz, straight = keep(dr, no), keep(dz, no), keep(straight, no)
        tl.store(idle + row, no.to(tl.int32), mask=row < B)
    store(dgx, at, unit, 3 * H, valid, dr)
    store(dgx, at, unit + H, 3 * H, valid, dz)
    if AFTER:
        if idle is not None:
            dn, dhn = keep(dn, no), keep(dhn, no)
        store(dgx, at, unit + 2 * H, 3 * H, valid, dn)
        store3(dgh, at, unit, H, 3 * H, valid, dr, dz, dhn)
    store(direct, row, unit, H, valid, straight)
