"""The step regime's recurrent product, and what follows it for every cell: the next step's state, or its gradient.

Here h and c are fp32 [B, ·] in memory, already replaced where the next step's state is cut; the kernels of a step
follow one another on the stream and never wait for the host. Programs share a matrix as tiles of rows by units.

A product's sizes are numbers at run time, so one serves every H. Triton compiles a kernel anew for each set of numbers
and addresses that are multiples of 16, or 1: so there are two of each product, of one source. The one is started
where all its sizes are multiples of 16, which it knows then, and reads rows 16 bytes at once; `unaligned` makes
the other, which knows nothing of its sizes and addresses.
"""

from typing import Any

import triton
import triton.language as tl

from .shared import dot, is_cut, length_of, load, matrix, replaced, rows, store, time_index


@triton.jit
def units(BLOCK: tl.constexpr):
    """The units of this program's tile."""
    return tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)


def unaligned(kernel: Any, sizes: list[str], pointers: list[str]) -> Any:
    """The same kernel, compiled once whatever these sizes and the pointers' addresses are."""
    return triton.jit(kernel.fn, do_not_specialize=sizes, do_not_specialize_on_alignment=pointers)


@triton.jit
def sums(a, at, a_width, w, along_k, along_unit, unit, live, K, N, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """[rows, units] of a w: a [·, K] in rows `at` of a_width columns, w [K, N] by its strides."""
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for first in tl.range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        value = load(a, at, k, a_width, live[:, None] & (k < K)[None, :])
        acc = dot(value, matrix(w, k, unit, along_k, along_unit, K, N), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["B"])
def product(a, a_width, w, out, out_width, B, K, N, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
            BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """out [B, N] = a w: a [B, K] of a_width columns, w [K, N] or, TRANSPOSED, its transpose; out fp32 of out_width."""
    row, unit = rows(BLOCK_B), units(BLOCK_N)
    live = row < B
    along_k, along_unit = (1, K) if TRANSPOSED else (N, 1)
    acc = sums(a, row, a_width, w, along_k, along_unit, unit, live, K, N, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K)
    store(out, row, unit, out_width, live[:, None] & (unit < N)[None, :], acc)


product_unaligned = unaligned(product, sizes=["a_width", "out_width", "B", "K", "N"], pointers=["a", "w", "out"])


@triton.jit
def carry(state, new, by, reset, k, n, t, row, unit, width, length, B, inside, reverse):
    """`state` from entering step t to entering the step after it, or to what is left at the end of the range."""
    mask = (row < B)[:, None] & inside[None, :]
    after = tl.where((t < length)[:, None], new, load(state, row, unit, width, mask))
    if reset is not None:
        following = t + 1 - 2 * reverse
        at = is_cut(reset, following, row, length, B, reverse) & (k + 1 < n)
        after = replaced(after, by, at, row, unit, width, inside)
    store(state, row, unit, width, mask, after)


@triton.jit(do_not_specialize=["k", "n", "t0", "total", "reverse", "B"])
def settle(new, h, lengths, reset, h_reset, y, k, n, t0, total, reverse, B, N: tl.constexpr, BLOCK_B: tl.constexpr,
           BLOCK_N: tl.constexpr):  # fmt: skip
    """The projected state of a step, new [B, N], becomes its output and the state of the next."""
    row, unit = rows(BLOCK_B), units(BLOCK_N)
    length = length_of(lengths, row, total, B)
    j = time_index(k, n, reverse)
    inside = unit < N
    valid = (row < B)[:, None] & inside[None, :]
    value = load(new, row, unit, N, valid)
    store(y, j * B + row, unit, N, valid, tl.where((t0 + j < length)[:, None], value, 0.0))
    carry(h, value, h_reset, reset, k, n, t0 + j, row, unit, N, length, B, inside, reverse)


@triton.jit(do_not_specialize=["k", "n", "reverse", "B"])
def arrive(gy, dh, lengths, arrived, dp, k, n, reverse, B, N: tl.constexpr, BLOCK_B: tl.constexpr,
           BLOCK_N: tl.constexpr):  # fmt: skip
    """The whole gradient of a projected state, into `arrived` [B, N] fp32 and dp [n, B, N]; 0 beyond a length."""
    row, unit = rows(BLOCK_B), units(BLOCK_N)
    j = time_index(k, n, 1 - reverse)
    live = j < length_of(lengths, row, n, B)
    valid = (row < B)[:, None] & (unit < N)[None, :]
    d = load(dh, row, unit, N, valid) + load(gy, j * B + row, unit, N, valid)
    d = tl.where(live[:, None], d, 0.0)
    store(arrived, row, unit, N, valid, d)
    store(dp, j * B + row, unit, N, valid, d)


@triton.jit
def is_idle_row(d, g, j, row, width, live, B, BLOCK: tl.constexpr):
    """Rows where d [B, width] + g [n, B, width] at time j is all zero, or that do not live."""
    busy = tl.zeros_like(row.to(tl.int32))
    for first in tl.range(0, width, BLOCK):
        unit = first + tl.arange(0, BLOCK)
        mask = live[:, None] & (unit < width)[None, :]
        value = load(d, row, unit, width, mask) + load(g, j * B + row, unit, width, mask)
        busy = tl.maximum(busy, tl.max((value != 0).to(tl.int32), axis=1))
    return busy == 0


@triton.jit(do_not_specialize=["k", "n", "reverse", "B"])
def product_back(dgh, dgh_width, w, direct, dh, dh_reset, idle, lengths, reset, k, n, reverse, B, K, N,
                 PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """dh [B, N] of a step becomes that of the step before: direct + dgh W. A cut sends it to dh_reset instead.

    dgh: K of dgh_width columns at the step's time; w [K, N]; idle [B]: rows that pass on zeros, None where none does.
    """
    row, unit = rows(BLOCK_B), units(BLOCK_N)
    length = length_of(lengths, row, n, B)
    j = time_index(k, n, 1 - reverse)
    inside = unit < N
    valid = (row < B)[:, None] & inside[None, :]
    acc = sums(dgh, j * B + row, dgh_width, w, N, 1, unit, row < B, K, N, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K)
    back = acc + load(direct, row, unit, N, valid)
    if idle is not None:
        back = tl.where((tl.load(idle + row, mask=row < B, other=1) != 0)[:, None], 0.0, back)
    d = tl.where((j < length)[:, None], back, load(dh, row, unit, N, valid))
    if reset is not None:
        at = is_cut(reset, j, row, length, B, reverse)[:, None]
        store(dh_reset, row, unit, N, valid, load(dh_reset, row, unit, N, valid) + tl.where(at, d, 0.0))
        d = tl.where(at, 0.0, d)
    store(dh, row, unit, N, valid, d)


product_back_unaligned = unaligned(
    product_back,
    sizes=["k", "n", "reverse", "dgh_width", "B", "K", "N"],
    pointers=["dgh", "w", "direct", "dh", "dh_reset", "idle", "lengths", "reset"],
)
