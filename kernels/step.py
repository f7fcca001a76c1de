"""The step regime, for any size: at each step a product with W_hh over all multiprocessors, then a kernel of the cell.

Two launches a step (four for an LSTM with a projection and for the original GRU, each of which has two products), none
of which waits for the host, so a CUDA graph can hold the whole scan. h and c stand in memory in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..backends.spec import LayerInputs, LayerOutputs
from ..backends.triton.configs import ROWS, LaunchConfig
from ..cells import Cell
from ..reference.scan import ScanGradients
from . import gru, lstm, product, rnn
from .launch import (
    ALIGNED,
    Launch,
    Operands,
    contiguous_aligned,
    empty_grads,
    empty_outputs,
    operands,
    start,
    tiles,
    total_steps,
)

POINTWISE = 128
"""Units of a tile in the kernels without a product; it has ROWS rows."""


def fitting(kernel: Any, unaligned: Any, *sizes: int) -> Any:
    """Which of the two a product of these sizes is."""
    return kernel if all(size % ALIGNED == 0 for size in sizes) else unaligned


class Scan:
    """What all launches of one scan share."""

    def __init__(self, o: Operands, rows: int, reverse: bool, config: LaunchConfig, run: Launch) -> None:
        self.o, self.rows, self.config, self.run = o, rows, config, run
        aligned = o.hidden % ALIGNED == o.size % ALIGNED == 0
        self.small = config._replace(block_b=ROWS, warps=4 if aligned else 8, stages=1)  # else a thread's numbers spill
        self.common = {"lengths": o.lengths, "reset": o.reset, "B": rows, "reverse": int(reverse)}

    def product(self, a: Tensor, w: Tensor, out: Tensor, *, transpose: bool = True) -> None:
        """out [B, N] = a wᵀ, or a w, rows of a matrix. a and out may be some columns of a wider one."""
        count, k = w.shape if transpose else (w.shape[1], w.shape[0])
        config = self.config
        self.run(
            fitting(product.product, product.product_unaligned, k, count, a.stride(0), out.stride(0)),
            (tiles(self.rows, config.block_b), tiles(count, config.block_n)),
            config,
            a=a,
            a_width=a.stride(0),
            w=w,
            out=out,
            out_width=out.stride(0),
            B=self.rows,
            K=k,
            N=count,
            TRANSPOSED=transpose,
            PRECISION=config.precision,
            BLOCK_B=config.block_b,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
        )

    def product_back(self, source: Tensor, w: Tensor, **arguments: Any) -> None:
        """dh of the step before: the first columns of `source` at the step's time by `w`, rows of W_hh."""
        config = self.config
        given = {**arguments, "dgh": source, "dgh_width": source.shape[2], "w": w, "K": w.shape[0], "N": self.o.size}
        given |= {"PRECISION": config.precision, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        kernel = fitting(product.product_back, product.product_back_unaligned, w.shape[0], self.o.size, source.shape[2])
        self._start(kernel, config, tiles(self.o.size, config.block_n), given)

    def cell(self, kernel: Any, **arguments: Any) -> None:
        """A kernel over rows and hidden units."""
        given = {**arguments, "H": self.o.hidden, "BLOCK_H": POINTWISE}
        self._start(kernel, self.small, tiles(self.o.hidden, POINTWISE), given)

    def state(self, kernel: Any, **arguments: Any) -> None:
        """A kernel over rows and the units of the state."""
        given = {**arguments, "N": self.o.size, "BLOCK_N": POINTWISE}
        self._start(kernel, self.small, tiles(self.o.size, POINTWISE), given)

    def _start(self, kernel: Any, config: LaunchConfig, across: int, given: dict[str, Any]) -> None:
        given = {**self.common, **given, "BLOCK_B": config.block_b}
        arguments = {name: given[name] for name in kernel.arg_names}
        self.run(kernel, (tiles(self.rows, config.block_b), across), config, **arguments)


def forward(
    cell: Cell,
    gx: Tensor,
    h: Tensor,
    c: Tensor | None,
    t: LayerInputs,
    b_hn: Tensor | None,
    *,
    t0: int,
    reverse: bool,
    save: bool,
    config: LaunchConfig,
    run: Launch = start,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, h_n, c_n, c_all, gates of the steps [t0, t0 + n), as `ScanBackend.scan_forward` says."""
    n, rows = gx.shape[:2]
    o = operands(cell, t, b_hn)
    scan = Scan(o, rows, reverse, config, run)
    y, c_all, gates = empty_outputs(cell, gx, o, save)
    first = t0 + n if reverse else t0  # a reset at this step cuts before the first step that is processed
    now = _entering(h, o.h_reset, o, first, n)
    now_c = None if c is None else _entering(c, o.c_reset, o, first, n)
    buffer = now.new_empty((rows, o.w_hh.shape[0]))
    state = {"gx": contiguous_aligned(gx), "gh": buffer, "h": now, "h_reset": o.h_reset, "y": y, "n": n, "t0": t0}
    state |= {"total": total_steps(o, t0, n), "gates": gates}
    m = None if o.w_hr is None else now.new_empty((rows, o.hidden))
    inside = 2 * o.hidden  # where the GRU's n block begins
    for k in range(n if rows else 0):
        if cell.reset_before:
            rh = now.new_empty((rows, o.hidden))
            scan.product(now, o.w_hh[:inside], buffer)
            scan.cell(gru.reset_step, rh=rh, k=k, **state)
            scan.product(rh, o.w_hh[inside:], buffer[:, inside:])
        else:
            scan.product(now, o.w_hh, buffer)
        if cell.has_c:
            scan.cell(lstm.forward_step, c=now_c, c_reset=o.c_reset, c_all=c_all, m=m, k=k, **state)
        elif cell.saved:
            scan.cell(gru.forward_step, b_hn=o.b_hn, AFTER=cell.reset_after, k=k, **state)
        else:
            scan.cell(rnn.forward_step, RELU=cell.name == "rnn_relu", k=k, **state)
        if m is not None and o.w_hr is not None:
            new = torch.empty_like(now)
            scan.product(m, o.w_hr, new)
            scan.state(product.settle, new=new, k=k, **state)
    return y, now.to(h.dtype), None if c is None or now_c is None else now_c.to(c.dtype), c_all, gates


def backward(
    cell: Cell,
    grads: LayerOutputs,
    y: Tensor,
    c_all: Tensor | None,
    gates: Tensor | None,
    t: LayerInputs,
    b_hn: Tensor | None,
    *,
    reverse: bool,
    config: LaunchConfig,
    run: Launch = start,
) -> ScanGradients:
    """The gradients of the scan over all T."""
    n, rows = y.shape[:2]
    o, c_all, gates, c_0 = (
        operands(cell, t, b_hn),
        contiguous_aligned(c_all),
        contiguous_aligned(gates),
        contiguous_aligned(t.c_0),
    )
    scan = Scan(o, rows, reverse, config, run)
    found = empty_grads(cell, y, o, torch.float32)
    gy, gh_n, gc_n, gc_all = (contiguous_aligned(g) for g in grads)
    dh, dc = _arriving(gh_n, found.dh_0), _arriving(gc_n, found.dc_0)
    for v in (found.dh_reset, found.dc_reset):
        if v is not None:
            v.zero_()
    guarded = o.lengths is not None or o.reset is not None
    idle = torch.empty(rows, dtype=torch.int32, device=y.device) if guarded else None
    direct = torch.empty_like(dh) if cell.saved and not cell.has_c else None
    state = {
        "gy": gy,
        "y": contiguous_aligned(y),
        "gates": gates,
        "dgx": found.dgx,
        "idle": idle,
        "n": n,
        "direct": direct,
    }
    state |= {"dgh": found.dgh if cell.reset_after else None, "h_0": contiguous_aligned(t.h_0), "h_reset": o.h_reset}
    state |= {"dh_reset": found.dh_reset, "dp": found.dp}
    inside = 2 * o.hidden
    multiplied = inside if cell.reset_before else o.w_hh.shape[0]  # the rows of W_hh by which h itself was multiplied
    for k in range(n if rows else 0):
        if cell.has_c:
            arrived = dm = None
            if o.w_hr is not None:
                arrived, dm = torch.empty_like(dh), dh.new_empty((rows, o.hidden))
                scan.state(product.arrive, dh=dh, arrived=arrived, k=k, **state)
                scan.product(arrived, o.w_hr, dm, transpose=False)
            following = torch.empty_like(dc)
            more = {"gc_all": gc_all, "arrived": arrived, "dm": dm, "dc": dc, "dc_next": following, "c_all": c_all}
            more |= {"c_0": c_0, "c_reset": o.c_reset, "dc_reset": found.dc_reset, "N": o.size}
            scan.cell(lstm.backward_step, dh=dh, k=k, **state, **more)
            dc = following
        elif cell.saved:
            drh = None
            if cell.reset_before:
                drh = dh.new_empty((rows, o.hidden))
                scan.cell(gru.candidate_back, dh=dh, k=k, **state)
                at = k if reverse else n - 1 - k
                scan.product(found.dgx[at][:, inside:], o.w_hh[inside:], drh, transpose=False)
            scan.cell(gru.backward_step, dh=dh, drh=drh, AFTER=cell.reset_after, k=k, **state)
        else:
            scan.cell(rnn.backward_step, dh=dh, RELU=cell.name == "rnn_relu", k=k, **state)
        scan.product_back(found.dgh, o.w_hh[:multiplied], dh=dh, k=k, **state)
    dtype = t.h_0.dtype
    dc_0, dh_reset, dc_reset = (None if v is None else v.to(dtype) for v in (dc, found.dh_reset, found.dc_reset))
    return ScanGradients(found.dgx, found.dgh, dh.to(dtype), dc_0, dh_reset, dc_reset, found.dp)


def _entering(state: Tensor, by: Tensor | None, o: Operands, border: int, n: int) -> Tensor:
    """A copy in fp32 of the state before the first of n steps, replaced where a reset stands at `border`."""
    if o.reset is None or border >= o.reset.shape[0] or n == 0:
        return state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    at = o.reset[border] if o.lengths is None else o.reset[border] & (border < o.lengths)
    return masks.replace(state.float(), at.unsqueeze(-1), None if by is None else by.float())


def _arriving(given: Tensor | None, like: Tensor | None) -> Any:
    """A copy in fp32 of the gradient of a final state, zeros where None."""
    if like is None:
        return None
    return torch.zeros_like(like) if given is None else like.copy_(given)
