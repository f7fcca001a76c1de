"""What the kernels of every cell share: activations, loads and stores, products, and where in time a step stands.

Values are fp32 tiles, rows of the batch by units. Whatever is stored narrower is widened when loaded and rounded when
stored. A tile is padded to a power of two with rows and units that are never loaded nor stored and hold zeros. Offsets
are 64 bits wide: a row's number is an int64 from the start.

Triton's interpreter computes wrongly with bfloat16 (it adds bit patterns, and truncates where a GPU rounds), so under
INTERPRETED products are made in fp32 of operands rounded here.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Within 2 ε of its value, relative. Near 0 an odd polynomial fitted to tanh, since 1 - 2 / (e^2x + 1) cancels."""
    z = x * x
    q = -0.005583278834819794 * z + 0.020531065762043
    q = (q * z - 0.053706977516412735) * z + 0.13331055641174316
    near = x + x * z * (q * z - 0.33333268761634827)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.64, near, tl.where(x < 0, -far, far))


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays, as in torch


# Tiles: `row` [rows] int64 and `unit` [units] index a matrix of `width` columns; `mask` is the tile's.


# What is absent is None: it loads as zeros, and storing there does nothing.


@triton.jit
def load(p, row, unit, width, mask):
    if p is None:
        v = tl.zeros((row.shape[0], unit.shape[0]), tl.float32)
    else:
        v = tl.load(p + row[:, None] * width + unit[None, :], mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def store(p, row, unit, width, mask, value):
    if p is not None:
        tl.store(p + row[:, None] * width + unit[None, :], narrow(value, p.dtype.element_ty), mask=mask)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 rounded to `dtype`; in the interpreter bfloat16's values stay fp32."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        r = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    else:
        r = x.to(dtype)
    return r


@triton.jit
def matrix(w, k, unit, along_k, along_unit, K, N):
    """[k, unit] of a matrix by its two strides, K by N; in its own type."""
    mask = (k < K)[:, None] & (unit < N)[None, :]
    row, column = k.to(tl.int64)[:, None] * along_k, unit.to(tl.int64)[None, :] * along_unit
    return tl.load(w + row + column, mask=mask, other=0.0)


@triton.jit
def dot(a, w, acc, PRECISION: tl.constexpr):
    """acc + a w: `a` rounded to the type of `w`, sums in fp32. PRECISION says what fp32 operands may lose."""
    if INTERPRETED:
        r = acc + tl.dot(narrow(a, w.dtype).to(tl.float32), w.to(tl.float32), input_precision="ieee")
    else:
        r = tl.dot(a.to(w.dtype), w, acc=acc, input_precision=PRECISION)
    return r


@triton.jit
def zero_accumulator(a, BLOCK: tl.constexpr):
    """An empty sum for a product of `a` with a matrix of BLOCK columns."""
    return tl.zeros((a.shape[0], BLOCK), tl.float32)


# Time: n steps from t0 on, of a sequence of `total`; k counts them in the order in which they are processed. `reverse`
# is 1 where that order goes backwards in time, else 0: a number at run time, so one compilation serves both.


@triton.jit
def rows(BLOCK_B: tl.constexpr):
    """The rows of this program's tile of the batch."""
    return tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)


@triton.jit
def time_index(k, n, reverse):
    """Where in time the k-th step stands. A sum, since a choice between two made ptxas keep both and spill."""
    j = tl.full((), 0, tl.int64) + k
    return j + reverse * (n - 1 - 2 * j)


@triton.jit
def length_of(lengths, row, total, B):
    """Steps of each row; 0 for rows that pad the tile."""
    if lengths is None:
        n = tl.where(row < B, total, 0)
    else:
        n = tl.minimum(tl.load(lengths + row, mask=row < B, other=0), total)
    return n


@triton.jit
def is_cut(reset, t, row, length, B, reverse):
    """Rows whose state is replaced before step t. Backwards a reset at t + 1 lies there, between t and t + 1."""
    at = t + reverse
    return tl.load(reset + at * B + row, mask=at < length, other=0) != 0


@triton.jit
def replaced(state, by, at, row, unit, width, inside):
    """`state` with the rows `at` taken from `by`, zeros where None."""
    return tl.where(at[:, None], load(by, row, unit, width, at[:, None] & inside[None, :]), state)


@triton.jit
def previous_state(states, first, by, reset, t, row, unit, width, length, B, inside, reverse):
    """The state from which step t started, of `states` after each step; zeros where the row does not live."""
    before = t - 1 + 2 * reverse
    starts = (before < 0) | (before >= length)
    mask = (t < length)[:, None] & inside[None, :]
    v = load(states, before * B + row, unit, width, mask & ~starts[:, None])
    v = tl.where(starts[:, None], load(first, row, unit, width, mask & starts[:, None]), v)
    if reset is not None:
        v = replaced(v, by, is_cut(reset, t, row, length, B, reverse), row, unit, width, inside)
    return v


@triton.jit
def is_idle(d):
    """Rows of a gradient that are all zero: they pass on zeros, whatever was saved for them."""
    return tl.max((d != 0).to(tl.int32), axis=1) == 0


@triton.jit
def keep(g, idle):
    return tl.where(idle[:, None], 0.0, g)
