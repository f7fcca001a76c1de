"""The persistent regime: one launch for all of time, a program for each tile of the batch, W_hh on chip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.spec import LayerInputs, LayerOutputs
from ..backends.triton.configs import LaunchConfig, tile
from ..cells import Cell
from ..reference.scan import ScanGradients
from . import gru, lstm, rnn
from .launch import Launch, contiguous_aligned, empty_grads, empty_outputs, operands, start, tiles, total_steps


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
    y, c_all, gates = empty_outputs(cell, gx, o, save)
    h_n = torch.empty_like(h, memory_format=torch.contiguous_format)
    c_n = None if c is None else torch.empty_like(c, memory_format=torch.contiguous_format)
    arguments: dict[str, Any] = {
        "gx": contiguous_aligned(gx),
        "w_hh": o.w_hh,
        "h_0": contiguous_aligned(h),
        "lengths": o.lengths,
        "reset": o.reset,
        "h_reset": o.h_reset,
        "y": y,
        "h_n": h_n,
        "n": n,
        "t0": t0,
        "total": total_steps(o, t0, n),
        "B": rows,
        **_shape(o.hidden, reverse, config),
    }
    if cell.has_c:
        arguments |= {
            "w_hr": o.w_hr,
            "c_0": contiguous_aligned(c),
            "c_reset": o.c_reset,
            "c_n": c_n,
            "c_all": c_all,
            "gates": gates,
        }
        arguments |= {"N": o.size, "BLOCK_N": tile(o.size)}
    elif cell.saved:
        arguments |= {"b_hn": o.b_hn, "gates": gates, "AFTER": cell.reset_after}
    else:
        arguments |= {"RELU": cell.name == "rnn_relu"}
    if rows:
        run(_file(cell).forward, (tiles(rows, config.block_b),), config, **arguments)
    return y, h_n, c_n, c_all, gates


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
    o, c_all, gates = operands(cell, t, b_hn), contiguous_aligned(c_all), contiguous_aligned(gates)
    found = empty_grads(cell, y, o, t.h_0.dtype)
    gy, gh_n, gc_n, gc_all = (contiguous_aligned(g) for g in grads)
    arguments: dict[str, Any] = {
        "gy": gy,
        "gh_n": gh_n,
        "w_hh": o.w_hh,
        "lengths": o.lengths,
        "reset": o.reset,
        "dgx": found.dgx,
        "dh_0": found.dh_0,
        "dh_reset": found.dh_reset,
        "n": n,
        "B": rows,
        **_shape(o.hidden, reverse, config),
    }
    if cell.has_c:
        arguments |= {"gc_n": gc_n, "gc_all": gc_all, "c_all": c_all, "gates": gates, "w_hr": o.w_hr}
        arguments |= {
            "c_0": contiguous_aligned(t.c_0),
            "c_reset": o.c_reset,
            "dp": found.dp,
            "dc_0": found.dc_0,
            "dc_reset": found.dc_reset,
        }
        arguments |= {"N": o.size, "BLOCK_N": tile(o.size)}
    elif cell.saved:
        arguments |= {
            "y": contiguous_aligned(y),
            "gates": gates,
            "h_0": contiguous_aligned(t.h_0),
            "h_reset": o.h_reset,
        }
        arguments |= {"dgh": found.dgh if cell.reset_after else None, "AFTER": cell.reset_after}
    else:
        arguments |= {"y": contiguous_aligned(y), "RELU": cell.name == "rnn_relu"}
    if rows:
        run(_file(cell).backward, (tiles(rows, config.block_b),), config, **arguments)
    return found


def _file(cell: Cell) -> Any:
    return lstm if cell.has_c else gru if cell.saved else rnn


def _shape(hidden: int, reverse: bool, config: LaunchConfig) -> dict[str, Any]:
    return {
        "H": hidden,
        "reverse": int(reverse),
        "PRECISION": config.precision,
        "BLOCK_B": config.block_b,
        "BLOCK_H": tile(hidden),
    }
