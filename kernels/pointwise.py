"""What kernels generated from a cell's step call (rnnkit/custom/triton_source.py): torch's functions, rows, time.

Everything works in float32 and in float64, whichever type `F` its values have. A program owns whole rows, so a row's
sum is one more operation; lanes outside of the row are left out by selection, for they may hold NaN. Where a function
is written out, it is as exact as its neighbours: 1 + x and e^x - 1 lose digits near 0, and get them back here.
"""

import triton
import triton.language as tl

from .shared import INTERPRETED, is_cut, length_of, narrow, relu, rows, sigmoid  # noqa: F401 (generated text imports them)
from .shared import tanh as tanh_of_float32


@triton.jit
def expm1(x):
    """Kahan's way: the error of u = e^x cancels in (u - 1) / log u."""
    u = tl.exp(x)
    down = u - 1.0
    plain = (u == 1.0) | (down == -1.0) | (u > 1e30)
    between = down * (x / tl.log(tl.where(plain, 2.0, u)))
    return tl.where(u == 1.0, x, tl.where(plain, down, between))


@triton.jit
def log1p(x):
    u = 1.0 + x
    d = u - 1.0
    small, large = d == 0.0, u == x
    between = tl.log(u) * (x / tl.where(small | large, 1.0, d))
    return tl.where(small, x, tl.where(large, tl.log(u), between))


@triton.jit
def tanh(x):
    if x.dtype == tl.float64:
        e = expm1(-2.0 * tl.abs(x))
        y = -e / (e + 2.0)
        r = tl.where(x < 0, -y, y)
    else:
        r = tanh_of_float32(x)
    return r


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def nearest(x):
    """Halves go to the even neighbour."""
    low = tl.floor(x)
    odd = tl.floor(low * 0.5) * 2.0 != low
    up = (x - low > 0.5) | ((x - low == 0.5) & odd)
    return tl.where(up, low + 1.0, low)


@triton.jit
def power(x, exponent):
    """NaN of a negative number."""
    return tl.exp(exponent * tl.log(x))


@triton.jit
def even_power(x, exponent):
    return power(tl.abs(x), exponent)


@triton.jit
def odd_power(x, exponent):
    size = power(tl.abs(x), exponent)
    return tl.where(x < 0, -size, size)


@triton.jit
def square(x):
    return x * x


@triton.jit
def maximum(a, b):
    """NaN wins, as in torch."""
    return tl.where((a != a) | (a > b), a, b)


@triton.jit
def minimum(a, b):
    return tl.where((a != a) | (a < b), a, b)


@triton.jit
def row_sum(x, inside):
    """[rows, 1] of a tile whose lanes outside of the row count for nothing."""
    return tl.sum(tl.where(inside, x, 0.0), axis=1)[:, None]


@triton.jit
def row_max(x, inside):
    most = tl.max(tl.where(inside, x, float("-inf")), axis=1)
    broken = tl.max((inside & (x != x)).to(tl.int32), axis=1)
    return tl.where(broken != 0, float("nan"), most)[:, None]


# Memory. `at` [rows] int64 is where a row begins, `unit` the place within it.


@triton.jit
def read(p, at, unit, mask, F: tl.constexpr):
    return tl.load(p + at[:, None] + unit[None, :], mask=mask, other=0.0).to(F)


@triton.jit
def read_row(p, at, mask, F: tl.constexpr):
    """A number for each row: [rows, 1]."""
    return tl.load(p + at, mask=mask, other=0.0).to(F)[:, None]


@triton.jit
def read_units(p, unit, inside, F: tl.constexpr):
    """A number for each unit: [1, units]."""
    return tl.load(p + unit[None, :], mask=inside, other=0.0).to(F)


@triton.jit
def cast(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:
        r = narrow(x.to(tl.float32), dtype)
    else:
        r = x.to(dtype)
    return r


@triton.jit
def write(p, at, unit, mask, value):
    """Nothing where there is no memory."""
    if p is not None:
        value = tl.broadcast_to(value, mask.shape[0], mask.shape[1])
        tl.store(p + at[:, None] + unit[None, :], cast(value, p.dtype.element_ty), mask=mask)


@triton.jit
def write_row(p, at, mask, value):
    if p is not None:
        value = tl.broadcast_to(value, mask.shape[0], 1)
        tl.store(p + at[:, None], cast(value, p.dtype.element_ty), mask=mask[:, None])


@triton.jit
def product_at(row, unit, block, B, H: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr):
    """Where a block of a product's result stands, [HEADS, B, BLOCKS·H/HEADS]."""
    head: tl.constexpr = H // HEADS
    place = row[:, None] * (BLOCKS * head) + block * head
    return place + (unit // head)[None, :] * (B.to(tl.int64) * BLOCKS * head) + (unit % head)[None, :]


@triton.jit
def read_product(p, bias, row, unit, mask, inside, block, B, H: tl.constexpr, BLOCKS: tl.constexpr,
                 HEADS: tl.constexpr, F: tl.constexpr):  # fmt: skip
    v = tl.load(p + product_at(row, unit, block, B, H, BLOCKS, HEADS), mask=mask, other=0.0).to(F)
    if bias is not None:
        v += read_units(bias + block * H, unit, inside, F)
    return v


# Time. t is the step, of `total`; `live` [rows, units] says where the step belongs to its row.


@triton.jit
def previous(after, first, by, reset, t, row, unit, live, length, B, reverse, H: tl.constexpr, F: tl.constexpr):
    """The state from which step t started, of `after` each step. by: at a reset, zeros where None."""
    before = t - 1 + 2 * reverse
    starts = ((before < 0) | (before >= length))[:, None]
    v = read(after, (before * B + row) * H, unit, live & ~starts, F)
    v = tl.where(starts, read(first, row * H, unit, live & starts, F), v)
    if reset is not None:
        v = replaced(v, by, is_cut(reset, t, row, length, B, reverse)[:, None], row, unit, live, H, F)
    return v


@triton.jit
def replaced(state, by, at, row, unit, mask, H: tl.constexpr, F: tl.constexpr):
    """`state` with the rows `at` [rows, 1] taken from `by`."""
    if by is None:
        v = tl.where(at, 0.0, state)
    else:
        v = tl.where(at, read(by, row * H, unit, mask & at, F), state)
    return v


@triton.jit
def carry(state, short, new, old, by, reset, t, more, row, unit, live, valid, length, B, reverse, H: tl.constexpr,
          F: tl.constexpr):  # fmt: skip
    """A state from entering step t to entering the next one, where there is `more`. short: again, in the type in which
    products read it."""
    after = tl.where(live, new, old)
    if reset is not None:
        at = is_cut(reset, t + 1 - 2 * reverse, row, length, B, reverse) & (more != 0)
        after = replaced(after, by, at[:, None], row, unit, valid, H, F)
    write(state, row * H, unit, valid, after)
    write(short, row * H, unit, valid, after)


@triton.jit
def give_back(d, d_reset, new, old, reset, t, row, unit, live, good, valid, length, B, reverse, H: tl.constexpr,
              F: tl.constexpr):  # fmt: skip
    """The gradient of the state before step t; before a reset it is the reset state's."""
    before = tl.where(live, tl.where(good, new, 0.0), old)
    if reset is not None:
        cut = is_cut(reset, t, row, length, B, reverse)[:, None]
        write(d_reset, row * H, unit, valid, read(d_reset, row * H, unit, valid, F) + tl.where(cut, before, 0.0))
        before = tl.where(cut, 0.0, before)
    write(d, row * H, unit, valid, before)


@triton.jit
def busy(d):
    """[rows]: gradients that are not all zero, NaN among them."""
    return tl.max((d != 0).to(tl.int32), axis=1) != 0
