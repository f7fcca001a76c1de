"""The table of cells: the facts about each that layouts, shapes and products depend on.

The mathematics stands in `rnnkit.reference`; here is only what the code around it has to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cell:
    """One kind of recurrence. H is the hidden size."""

    name: str
    gates: int
    """Blocks of H rows in each weight, in torch's order."""
    has_c: bool
    """Whether there is a cell state c beside h."""
    saved: int
    """Blocks of H columns that the scan saves per step for its backward; 0: the output is enough."""
    reset_after: bool = False
    """GRU of torch.nn: the reset gate multiplies W_hn h + b_hn, so b_hn cannot join the input projection."""
    reset_before: bool = False
    """Textbook GRU: the reset gate multiplies h, so the n block's recurrent input is r * h."""


CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", gates=1, has_c=False, saved=0),
        Cell("rnn_relu", gates=1, has_c=False, saved=0),
        Cell("lstm", gates=4, has_c=True, saved=4),  # i f g o
        Cell("gru", gates=3, has_c=False, saved=4, reset_after=True),  # r z n, and W_hn h + b_hn
        Cell("gru_reset_before", gates=3, has_c=False, saved=3, reset_before=True),  # r z n
    )
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which states are carried and gates computed: never narrower than float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
