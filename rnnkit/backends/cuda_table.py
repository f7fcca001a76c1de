"""The CUDA kernels: a literal table, each row compiled as a source of its own, and which of them runs a scan.

A row is one configuration of one regime for one cell and one kind of operands; it serves any H up to its `units` that
no smaller row holds. `setup.py` compiles the rows (csrc/cuda/), `python -m rnnkit.benchmarks.cuda_table` proves them
for every chip: no spill, and within its shared memory (benchmarks/results/cuda-compile.csv). What has no row runs step
by step. A regime is a name here and a file there: another one brings rows, and nothing else changes.

Read by setup.py on its own, so it imports nothing of the package.
"""

from __future__ import annotations

from typing import NamedTuple

CHIPS = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}
"""What is compiled for, and bytes of shared memory that a block may take there."""
OLDEST = 80
"""The least compute capability that kernels run on."""
SMALL = (86, 89, 120, 121)
"""Capabilities with 99 KiB a block."""
SMALL_SHARED = 99 * 1024

CELLS = {"rnn_tanh": "rnn", "rnn_relu": "rnn", "lstm": "lstm", "gru": "gru", "gru_reset_before": "gru_before"}
"""The kernel of each cell."""
GATES = {"rnn": 1, "lstm": 4, "gru": 3, "gru_before": 3}
KINDS = ("bf16", "fp16", "tf32", "ieee", "f64")
"""Operands of the recurrent product: bfloat16, float16, float32 rounded to TF32, float32 as it is, float64."""
HALF = ("bf16", "fp16")
TALL = 8
"""Step: more rows than this take the kernel whose tile has 32."""


class Row(NamedTuple):
    """One configuration."""

    regime: str
    kernel: str
    """rnn, lstm, gru or gru_before: forward and backward."""
    kind: str
    units: int
    """Hidden units it holds; 0: any number."""
    warps: int
    rows: int
    """Rows of the batch in a block."""
    resident: tuple[int, int] = (0, 0)
    """cta: fragments of weights that a warp keeps in registers, forward and backward; the others are in shared memory.
    A fragment is 16 rows by 32 bytes."""

    @property
    def name(self) -> str:
        size = self.units or self.rows
        return f"{self.regime}_{self.kernel}_{self.kind}_{size}"


CTA = (
    # cell, kinds, units, warps, resident
    ("rnn", HALF, 64, 4, (4, 4)),
    ("rnn", HALF, 128, 8, (8, 8)),
    ("rnn", HALF, 256, 8, (32, 32)),
    ("rnn", HALF, 384, 12, (24, 24)),
    ("lstm", HALF, 32, 2, (8, 8)),
    ("lstm", HALF, 64, 4, (16, 16)),
    ("lstm", HALF, 128, 8, (32, 32)),
    ("lstm", HALF, 192, 12, (22, 22)),
    ("gru", HALF, 32, 2, (6, 6)),
    ("gru", HALF, 64, 4, (12, 12)),
    ("gru", HALF, 128, 8, (24, 24)),
    ("gru", HALF, 224, 14, (14, 14)),
    ("gru_before", HALF, 64, 4, (12, 12)),
    ("gru_before", HALF, 128, 8, (24, 24)),
    ("gru_before", HALF, 224, 14, (14, 14)),
    ("rnn", ("tf32",), 64, 4, (8, 8)),
    ("rnn", ("tf32",), 128, 8, (16, 16)),
    ("rnn", ("tf32",), 256, 16, (16, 16)),
    ("lstm", ("tf32",), 32, 2, (16, 16)),
    ("lstm", ("tf32",), 64, 4, (32, 32)),
    ("lstm", ("tf32",), 128, 8, (40, 40)),
    ("gru", ("tf32",), 32, 2, (12, 12)),
    ("gru", ("tf32",), 64, 4, (24, 24)),
    ("gru", ("tf32",), 128, 8, (40, 40)),
    ("gru_before", ("tf32",), 64, 4, (24, 24)),
    ("gru_before", ("tf32",), 128, 8, (40, 40)),
    ("rnn", ("ieee",), 64, 4, (0, 0)),
    ("rnn", ("ieee",), 128, 8, (0, 0)),
    ("rnn", ("ieee",), 208, 13, (0, 0)),
    ("lstm", ("ieee",), 32, 2, (0, 0)),
    ("lstm", ("ieee",), 64, 4, (0, 0)),
    ("lstm", ("ieee",), 96, 6, (0, 0)),
    ("gru", ("ieee",), 32, 2, (0, 0)),
    ("gru", ("ieee",), 64, 4, (0, 0)),
    ("gru", ("ieee",), 112, 7, (0, 0)),
    ("gru_before", ("ieee",), 64, 4, (0, 0)),
    ("gru_before", ("ieee",), 112, 7, (0, 0)),
)

ROWS: tuple[Row, ...] = (
    *(
        Row("cta", cell, kind, units, warps, 8, resident)
        for cell, kinds, units, warps, resident in CTA
        for kind in kinds
    ),
    *(Row("step", cell, kind, 0, 8, rows) for cell in GATES for kind in KINDS for rows in (8, 32)),
)


def source(row: Row) -> str:
    """The whole of the .cu file that compiles a row."""
    parts = ", ".join(str(v) for v in (row.units, row.warps, *row.resident))
    macro = f"RNNKIT_CTA({row.name}, {row.kernel}, {row.kind}, {parts})"
    if row.regime == "step":
        macro = f"RNNKIT_STEP({row.name}, {row.kernel}, {row.kind}, {row.warps}, {row.rows // 8})"
    return f'#include "{row.regime}.cuh"\n\n{macro}\n'
