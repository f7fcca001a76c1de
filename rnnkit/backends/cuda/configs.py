"""The CUDA kernels: a literal table, each row compiled as a source of its own, and which of them runs a scan.

A row is one configuration of one regime for one cell and one kind of operands; it serves any H up to its `units` that
no smaller row holds. `setup.py` compiles the rows (csrc/cuda/), `python -m rnnkit.benchmarks.usage.cuda_usage` proves
them for every chip: no spill, and within its shared memory (benchmarks/results/cuda-compile.csv). What has no row runs
step by step.

Another regime is an entry of REGIMES, rows, and csrc/cuda/<regime>.cuh with the macro RNNKIT_<REGIME>; choice, sources,
parity and the proof then take its rows as they do these. What its launches need beyond that stands nowhere yet:
`arch::launch` gives no attributes (the size of a cluster, all blocks of a grid resident), and CompiledKernel has no
number of blocks that share the units.

Read by setup.py on its own, so it imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

CHIPS = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}
"""What is compiled for, and bytes of shared memory that a block may take there."""
SMALL = (86, 89, 120, 121)
"""Capabilities with 99 KiB a block."""
SMALL_SHARED = 99 * 1024

KERNEL_OF = {"rnn_tanh": "rnn", "rnn_relu": "rnn", "lstm": "lstm", "gru": "gru", "gru_reset_before": "gru_reset_before"}
"""The kernel of each cell."""
GATES = {"rnn": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}
KINDS = {"bf16": "bfloat16", "fp16": "float16", "tf32": "TF32", "ieee": "exact float32", "f64": "float64"}
"""Operands of the recurrent product, in words; TF32 is float32 rounded to it."""
HALF = ("bf16", "fp16")
TALL = 8
"""Step: more rows than this take the kernel whose tile has 32."""


class CompiledKernel(NamedTuple):
    """One configuration."""

    regime: str
    kernel: str
    """rnn, lstm, gru or gru_reset_before: forward and backward."""
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


class LaunchConfig(NamedTuple):
    """How one scan runs."""

    kernel: CompiledKernel
    reason: str

    @property
    def regime(self) -> str:
        return self.kernel.regime


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
    ("gru_reset_before", HALF, 64, 4, (6, 6)),
    ("gru_reset_before", HALF, 128, 8, (12, 12)),
    ("gru_reset_before", ("bf16",), 192, 6, (10, 5)),
    ("rnn", ("tf32",), 64, 4, (4, 4)),
    ("rnn", ("tf32",), 128, 8, (8, 8)),
    ("rnn", ("tf32",), 256, 8, (12, 12)),
    ("lstm", ("tf32",), 32, 2, (8, 8)),
    ("lstm", ("tf32",), 64, 4, (16, 16)),
    ("lstm", ("tf32",), 128, 8, (14, 9)),
    ("gru", ("tf32",), 32, 2, (6, 6)),
    ("gru", ("tf32",), 64, 4, (12, 12)),
    ("gru", ("tf32",), 128, 8, (14, 12)),
    ("gru_reset_before", ("tf32",), 64, 4, (12, 12)),
    ("gru_reset_before", ("tf32",), 128, 8, (12, 10)),
    ("rnn", ("ieee",), 64, 4, (0, 0)),
    ("rnn", ("ieee",), 128, 8, (0, 0)),
    ("rnn", ("ieee",), 192, 12, (0, 0)),
    ("lstm", ("ieee",), 32, 2, (0, 0)),
    ("lstm", ("ieee",), 64, 4, (0, 0)),
    ("lstm", ("ieee",), 96, 6, (0, 0)),
    ("gru", ("ieee",), 32, 2, (0, 0)),
    ("gru", ("ieee",), 64, 4, (0, 0)),
    ("gru", ("ieee",), 112, 7, (0, 0)),
    ("gru_reset_before", ("ieee",), 64, 4, (0, 0)),
    ("gru_reset_before", ("ieee",), 96, 6, (0, 0)),
)

ROWS: tuple[CompiledKernel, ...] = (
    *(
        CompiledKernel("cta", cell, kind, units, warps, 8, resident)
        for cell, kinds, units, warps, resident in CTA
        for kind in kinds
    ),
    *(CompiledKernel("step", cell, kind, 0, 8, rows) for cell in GATES for kind in KINDS for rows in (8, 32)),
)


def element(row: CompiledKernel) -> int:
    """Bytes of an operand."""
    return {"f64": 8, "tf32": 4, "ieee": 4}.get(row.kind, 2)


def cta_shared(row: CompiledKernel, side: int) -> int:
    """h or the gradients of the gates, twice where a step reads what the one before it wrote; weights beyond the
    resident."""
    size, exact = element(row), row.kind == "ieee"
    gates, terms = GATES[row.kernel], 16 // size * (1 if exact else 4)
    parts = -(-row.units // terms)
    fragments = row.units // 16 // row.warps * gates * parts
    columns = parts * terms * size * (gates if side else 1)
    aligned = -(-columns // 128) * 128
    pitch = aligned + 16 if exact else columns if columns % 128 == 64 else aligned + 64
    buffers = 1 if side and row.kernel == "gru_reset_before" else 2
    return buffers * row.rows * pitch + row.warps * (fragments - row.resident[side]) * (256 if exact else 1024)


def step_shared(row: CompiledKernel, side: int) -> int:
    """The sums of every warp."""
    blocks = 1 if side else 2 if row.kernel == "gru_reset_before" else GATES[row.kernel]
    return row.warps * blocks * row.rows * 16 * max(element(row), 4)


def smallest(rows: list[CompiledKernel], hidden: int, proj: int, batch: int) -> CompiledKernel | str | None:
    """The row of fewest units that holds the weights."""
    if proj:
        return "a projection has two products a step"
    rows = sorted(rows, key=lambda row: row.units)
    return next((row for row in rows if hidden <= row.units), None)


def tallest(rows: list[CompiledKernel], hidden: int, proj: int, batch: int) -> CompiledKernel | None:
    """The row of fewest rows of the batch, beyond TALL of most."""
    rows = sorted(rows, key=lambda row: row.rows)
    return rows[-1 if batch > TALL else 0] if rows else None


class Regime(NamedTuple):
    """A way to run a scan, and all that depends on which it is."""

    oldest: int
    """The least compute capability, as 90 for 9.0."""
    weights_in: str
    """Where the recurrent weights are."""
    why: str
    """What speaks for it."""
    choose: Callable[[list[CompiledKernel], int, int, int], CompiledKernel | str | None]
    """choose(rows, H, P, B): of the rows of a cell and kind that a GPU can hold one; why none; None: all too small."""
    shared: Callable[[CompiledKernel, int], int]
    """Bytes of shared memory of a block, forward (0) or backward (1), as the sources compute it."""
    asks: tuple[str, str]
    """The same in C++, behind a source."""
    arguments: Callable[[CompiledKernel], tuple[int, ...]]
    """What the macro of a source is given behind the row's name, kernel and kind."""


REGIMES = {
    "cta": Regime(
        oldest=80,
        weights_in="one multiprocessor",
        why="the recurrent weights stay on one multiprocessor for the whole sequence",
        choose=smallest,
        shared=cta_shared,
        asks=("ForwardConfiguration::forward_bytes", "BackwardConfiguration::backward_bytes"),
        arguments=lambda row: (row.units, row.warps, *row.resident),
    ),
    "step": Regime(
        oldest=80,
        weights_in="memory",
        why="it takes any size",
        choose=tallest,
        shared=step_shared,
        asks=(
            "step_bytes<Configuration>(Configuration::Cell::two_products ? 2 : Configuration::Cell::G)",
            "step_bytes<Configuration>(1)",
        ),
        arguments=lambda row: (row.warps, row.rows // 8),
    ),
}
"""In the order in which `find_kernel` asks; the last has a row for every cell and kind."""


def shared_bytes(row: CompiledKernel, side: int) -> int:
    """Shared memory of a block, forward (0) or backward (1); a test holds it to what the sources say."""
    return REGIMES[row.regime].shared(row, side)


def limit(capability: int) -> int:
    """Bytes of shared memory that a block may take on a GPU of this compute capability."""
    if capability in SMALL:
        return SMALL_SHARED
    return CHIPS["sm_80"] if capability < 90 else CHIPS["sm_90a"]


def too_old(capability: int) -> str | None:
    """Why a GPU runs no row at all."""
    oldest = min(regime.oldest for regime in REGIMES.values())
    if capability >= oldest:
        return None
    return (
        f"needs compute capability {oldest / 10} or later, got a GPU of {capability / 10}: of its regimes "
        f"({', '.join(REGIMES)}) none runs there, the backends torch and reference do"
    )


def able(capability: int) -> list[CompiledKernel]:
    """The rows whose blocks such a GPU can hold."""
    most = limit(capability)
    rows = [row for row in ROWS if REGIMES[row.regime].oldest <= capability]
    return [row for row in rows if max(shared_bytes(row, 0), shared_bytes(row, 1)) <= most]


def find_kernel(
    cell: str, hidden: int, proj: int, kind: str, batch: int, capability: int, only: str | None = None
) -> tuple[CompiledKernel, str]:
    """The row that runs a scan, and why.

    only: the one regime that may. Raises ValueError where that cannot run it, or the GPU is too old.
    """
    old = too_old(capability)
    if old is not None:
        raise ValueError(old)
    kernel, rows, against = KERNEL_OF[cell], able(capability), []
    for name, regime in REGIMES.items():
        if only not in (None, name):
            continue
        if capability < regime.oldest:
            against.append(f"{name} needs compute capability {regime.oldest / 10} or later, got {capability / 10}")
            continue
        mine = [row for row in rows if (row.regime, row.kernel, row.kind) == (name, kernel, kind)]
        found = regime.choose(mine, hidden, proj, batch)
        if isinstance(found, CompiledKernel):
            return found, "; ".join(against) or regime.why
        where = f"{regime.weights_in} of sm_{capability} ({limit(capability) // 1024} KiB of shared memory a block)"
        most = max((row.units for row in mine), default=0)
        none = f"no weights of {cell} in {KINDS[kind]} fit on {where}"
        some = f"on {where} fit up to {most} units of {cell} in {KINDS[kind]}, got H={hidden}"
        against.append(found or (some if most else none))
    raise ValueError("; ".join(against))


def source(row: CompiledKernel) -> str:
    """The whole of the .cu file that compiles a row."""
    arguments = ", ".join(str(v) for v in (row.name, row.kernel, row.kind, *REGIMES[row.regime].arguments(row)))
    return f'#include "{row.regime}.cuh"\n\nRNNKIT_{row.regime.upper()}({arguments})\n'
