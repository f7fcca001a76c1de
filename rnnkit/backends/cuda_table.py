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
    A fragment is 16 units by 64 bytes."""

    @property
    def name(self) -> str:
        size = self.units or self.rows
        return f"{self.regime}_{self.kernel}_{self.kind}_{size}"


CTA = (
    # cell, kinds, units, warps, resident
    ("rnn", HALF, 64, 4, (2, 2)),
    ("rnn", HALF, 128, 8, (4, 4)),
    ("rnn", HALF, 256, 8, (16, 16)),
    ("rnn", HALF, 384, 8, (11, 10)),
    ("lstm", HALF, 32, 2, (4, 4)),
    ("lstm", HALF, 64, 4, (8, 8)),
    ("lstm", HALF, 128, 8, (16, 14)),
    ("lstm", HALF, 160, 5, (10, 3)),
    ("gru", HALF, 32, 2, (3, 3)),
    ("gru", HALF, 64, 4, (6, 6)),
    ("gru", HALF, 128, 8, (12, 12)),
    ("gru", HALF, 192, 6, (10, 6)),
    ("gru_before", HALF, 64, 4, (6, 6)),
    ("gru_before", HALF, 128, 8, (12, 12)),
    ("gru_before", ("bf16",), 192, 6, (10, 5)),
    ("rnn", ("tf32",), 64, 4, (4, 4)),
    ("rnn", ("tf32",), 128, 8, (8, 8)),
    ("rnn", ("tf32",), 256, 8, (12, 12)),
    ("lstm", ("tf32",), 32, 2, (8, 8)),
    ("lstm", ("tf32",), 64, 4, (16, 16)),
    ("lstm", ("tf32",), 128, 8, (14, 9)),
    ("gru", ("tf32",), 32, 2, (6, 6)),
    ("gru", ("tf32",), 64, 4, (12, 12)),
    ("gru", ("tf32",), 128, 8, (14, 12)),
    ("gru_before", ("tf32",), 64, 4, (12, 12)),
    ("gru_before", ("tf32",), 128, 8, (12, 10)),
    ("rnn", ("ieee",), 64, 4, (0, 0)),
    ("rnn", ("ieee",), 128, 8, (0, 0)),
    ("rnn", ("ieee",), 192, 12, (0, 0)),
    ("lstm", ("ieee",), 32, 2, (0, 0)),
    ("lstm", ("ieee",), 64, 4, (0, 0)),
    ("lstm", ("ieee",), 96, 6, (0, 0)),
    ("gru", ("ieee",), 32, 2, (0, 0)),
    ("gru", ("ieee",), 64, 4, (0, 0)),
    ("gru", ("ieee",), 112, 7, (0, 0)),
    ("gru_before", ("ieee",), 64, 4, (0, 0)),
    ("gru_before", ("ieee",), 96, 6, (0, 0)),
)

ROWS: tuple[Row, ...] = (
    *(
        Row("cta", cell, kind, units, warps, 8, resident)
        for cell, kinds, units, warps, resident in CTA
        for kind in kinds
    ),
    *(Row("step", cell, kind, 0, 8, rows) for cell in GATES for kind in KINDS for rows in (8, 32)),
)


def shared_bytes(row: Row, side: int) -> int:
    """Shared memory of a block, forward (0) or backward (1), as the sources compute it; a test holds them together."""
    size = {"f64": 8, "tf32": 4, "ieee": 4}.get(row.kind, 2)
    if row.regime == "step":
        blocks = 1 if side else 2 if row.kernel == "gru_before" else GATES[row.kernel]
        return row.warps * blocks * row.rows * 16 * max(size, 4)
    exact = row.kind == "ieee"
    gates, terms = GATES[row.kernel], 16 // size * (1 if exact else 4)
    parts = -(-row.units // terms)
    fragments = row.units // 16 // row.warps * gates * parts
    columns = parts * terms * size * (gates if side else 1)
    aligned = -(-columns // 128) * 128
    pitch = aligned + 16 if exact else columns if columns % 128 == 64 else aligned + 64
    buffers = 1 if side and row.kernel == "gru_before" else 2
    return buffers * row.rows * pitch + row.warps * (fragments - row.resident[side]) * (256 if exact else 1024)


def limit(capability: int) -> int:
    """Bytes of shared memory that a block may take on a GPU of this compute capability."""
    if capability in SMALL:
        return SMALL_SHARED
    return CHIPS["sm_80"] if capability < 90 else CHIPS["sm_90a"]


def able(capability: int) -> list[Row]:
    """The rows whose blocks such a GPU can hold."""
    most = limit(capability) if capability >= OLDEST else 0
    return [row for row in ROWS if max(shared_bytes(row, 0), shared_bytes(row, 1)) <= most]


def plan(cell: str, hidden: int, proj: int, kind: str, batch: int, capability: int) -> tuple[Row, str]:
    """The row that runs a scan, and why."""
    kernel = CELLS[cell]
    largest = 0
    for row in sorted((row for row in able(capability) if row.regime == "cta"), key=lambda row: row.units):
        if (row.kernel, row.kind) != (kernel, kind):
            continue
        if proj == 0 and hidden <= row.units:
            return row, "the recurrent weights stay on one multiprocessor for the whole sequence"
        largest = row.units
    why = f"on one multiprocessor fit up to {largest} units, got H={hidden}"
    if proj:
        why = "a projection has two products a step"
    elif not largest:
        why = f"no row holds {kind} weights of this cell on one multiprocessor"
    return stepwise(cell, kind, batch, capability), why


def stepwise(cell: str, kind: str, batch: int, capability: int) -> Row:
    """The row that runs any size, step by step."""
    asked = ("step", CELLS[cell], kind)
    fit = [row for row in able(capability) if (row.regime, row.kernel, row.kind) == asked]
    return fit[-1] if batch > TALL else fit[0]


def source(row: Row) -> str:
    """The whole of the .cu file that compiles a row."""
    parts = ", ".join(str(v) for v in (row.units, row.warps, *row.resident))
    macro = f"RNNKIT_CTA({row.name}, {row.kernel}, {row.kind}, {parts})"
    if row.regime == "step":
        macro = f"RNNKIT_STEP({row.name}, {row.kernel}, {row.kind}, {row.warps}, {row.rows // 8})"
    return f'#include "{row.regime}.cuh"\n\n{macro}\n'
