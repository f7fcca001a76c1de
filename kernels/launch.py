"""How a kernel is started, and what both regimes ask of their operands.

A launch is a kernel, a grid and arguments by name; `start` runs it. Whoever wants to see the launches instead (the
ahead-of-time compiler, a count) passes another function of the same form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.spec import LayerInputs
from ..backends.triton.configs import LaunchConfig
from ..cells import Cell
from ..reference.scan import ScanGradients

ALIGNED = 16
"""Of what Triton looks for multiples: in bytes of an address, and of a number."""
Launch = Callable[..., None]
"""run(kernel, grid, config, **arguments)"""


def start(kernel: Any, grid: tuple[int, ...], config: LaunchConfig, **arguments: Any) -> None:
    """Run a kernel on its tensors' device, on the current stream. Never waits."""
    kernel[grid](**arguments, **options(config, amd=torch.version.hip is not None))


def options(config: LaunchConfig, *, amd: bool) -> dict[str, Any]:
    """What the compiler is asked for."""
    asked = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return asked if amd else {**asked, "maxnreg": config.registers}


class Operands(NamedTuple):
    """What a scan reads besides gx and the state it starts from, contiguous. N is the state's size."""

    w_hh: Tensor  # [G·H, N]
    b_hn: Tensor | None  # [H]
    w_hr: Tensor | None  # [N, H]
    lengths: Tensor | None  # [B]
    reset: Tensor | None  # [T, B]
    h_reset: Tensor | None  # [B, N]
    c_reset: Tensor | None  # [B, H]
    hidden: int
    size: int
    """N"""


def operands(cell: Cell, t: LayerInputs, b_hn: Tensor | None) -> Operands:
    w_hh, b_hn, w_hr, lengths, reset, h_reset, c_reset = map(
        contiguous_aligned, (t.w_hh, b_hn, t.w_hr, t.lengths, t.reset, t.h_reset, t.c_reset)
    )
    hidden, size = t.w_hh.shape[0] // cell.gates, t.w_hh.shape[1]
    return Operands(w_hh, b_hn, w_hr, lengths, reset, h_reset, c_reset, hidden, size)  # type: ignore[arg-type]


def contiguous_aligned(v: Tensor | None) -> Tensor | None:
    """Contiguous: an expanded gradient is written out. And aligned: of a part of another tensor that is not a copy is
    made, or Triton would compile a kernel for each such operand, which nobody has seen before."""
    v = None if v is None else v.contiguous()
    return v if v is None or v.data_ptr() % ALIGNED == 0 else v.clone()


def tiles(count: int, block: int) -> int:
    return -(-count // block)


def total_steps(o: Operands, t0: int, n: int) -> int:
    """Steps of the whole sequence, as far as resets and lengths speak of it."""
    return t0 + n if o.reset is None else o.reset.shape[0]


class Saved(NamedTuple):
    """What a forward leaves: y [n, B, N] and, where they are kept, c_all [n, B, H] and gates [n, B, S·H]."""

    y: Tensor
    c_all: Tensor | None
    gates: Tensor | None


def empty_outputs(cell: Cell, gx: Tensor, o: Operands, save: bool) -> Saved:
    n, rows = gx.shape[:2]
    return Saved(
        gx.new_empty((n, rows, o.size)),
        gx.new_empty((n, rows, o.hidden)) if cell.has_c and save else None,
        gx.new_empty((n, rows, cell.saved * o.hidden)) if cell.saved and save else None,
    )


def empty_grads(cell: Cell, y: Tensor, o: Operands, dtype: torch.dtype) -> ScanGradients:
    """`dtype`: that of the gradients of states."""
    n, rows, size = y.shape
    dgx = y.new_empty((n, rows, o.w_hh.shape[0]))
    state, cells = y.new_empty((rows, size), dtype=dtype), y.new_empty((rows, o.hidden), dtype=dtype)
    has_reset = o.reset is not None
    return ScanGradients(
        dgx,
        torch.empty_like(dgx) if cell.reset_after else dgx,
        state,
        cells if cell.has_c else None,
        torch.empty_like(state) if has_reset else None,
        torch.empty_like(cells) if has_reset and cell.has_c else None,
        torch.empty_like(y) if o.w_hr is not None else None,
    )
