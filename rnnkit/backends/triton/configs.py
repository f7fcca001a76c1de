"""Which regime a scan runs in, and with which tiles: a literal table, decided by compiling ahead of time.

A row stands here when its kernel compiles for its chips without a spill and within their shared memory
(`python -m rnnkit.benchmarks.usage.triton_usage`, whose figures are benchmarks/results/triton-compile.csv). What has no
row runs step by step. Sizes that are no multiples of 16 have rows of their own, since their kernels read each number
by itself and take more registers; compiled is the largest problem that a row serves. The direction of time is a number
at run time, so a row holds for both. It holds for each of VERSIONS too: ptxas and LLVM come with Triton, and another
one gives registers differently, so what spilled with either was given other warps or lost the chip.

The step regime reads W_hh once for each tile of rows, so with many rows its tiles are tall; but a tile is a program,
and fewer programs than a GPU has multiprocessors leave some of it idle, so few rows by few columns are cut small.

Nothing is searched at a first call; times on a device may change the rows one day.
"""

from __future__ import annotations

from typing import NamedTuple

from ...cells import CELLS

VERSIONS = ("3.6.0", "3.7.1")
"""Of Triton, that the rows hold for: what torch 2.11 and 2.13 bring."""
SHARED = {  # bytes of shared memory a block may take
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
CHIPS = tuple(SHARED)
"""What kernels are compiled for ahead of time; `chip_of` says which of them another one goes by."""
SMALL = (86, 89, 120, 121)
"""Capabilities with 99 KiB a block."""
SMALL_SHARED = 99 * 1024
OLDEST = 80
"""The least capability that Triton's kernels hold for."""
INTERPRETER = 90
"""The capability that Triton's interpreter goes by."""
AMD = 0
"""In the place of a compute capability: GPUs of AMD's."""

KERNELS = ("rnn", "lstm", "lstm_proj", "gru", "gru_reset_before")
CELLS_OF = {
    "rnn": ("rnn_tanh", "rnn_relu"),
    "lstm": ("lstm",),
    "lstm_proj": ("lstm",),
    "gru": ("gru",),
    "gru_reset_before": ("gru_reset_before",),
}
SIDES = ("forward", "backward")
TILES = (32, 64, 128, 256)
"""Units of a tile that hold a whole state."""
KINDS = ("half", "tf32", "ieee")
"""Operands of a product: bfloat16 and float16; float32 rounded to TF32; float32."""
MULTIPLES = (16, 1)
"""Of what a kernel's sizes are multiples. By 16 every row of a matrix is aligned, and is read 16 bytes at a time."""
ROWS = 16
"""Rows of a tile unless it is a tall one: what one matrix instruction takes."""
PROGRAMS = 100
"""About as many as a GPU has multiprocessors: 108 an A100, 132 an H100."""


class LaunchConfig(NamedTuple):
    """How one scan runs."""

    regime: str
    """persistent or step"""
    block_b: int
    """Rows of a tile."""
    block_n: int
    """Units of a tile of a product, step regime only."""
    block_k: int
    """Terms that a product adds at a time, step regime only."""
    warps: int
    stages: int
    registers: int
    """What a thread may take on NVIDIA's, all there are: without a number ptxas spills a few words to let more blocks
    in."""
    precision: str
    """What products may lose of float32 operands: tf32 or ieee."""
    reason: str


class CompiledKernel(NamedTuple):
    """A persistent kernel that fits."""

    kernel: str
    side: str
    hidden: int
    """Units of its tile: serves any H up to it that no smaller tile holds."""
    size: int
    """Units of its state's tile: with a projection P's, else `hidden`."""
    kind: str
    multiple: int
    """Serves sizes that are multiples of it: 16, or any, which are not aligned and take more registers."""
    chips: tuple[str, ...]
    warps: int
    shared: int
    """Bytes that it takes, on the chip where it takes most."""


class Tile(NamedTuple):
    """A tile of a product of the step regime."""

    rows: int
    units: int
    warps: int


STEP = (Tile(16, 32, 4), Tile(16, 64, 4), Tile(32, 64, 4), Tile(64, 64, 4), Tile(128, 64, 8))
"""From small to large, each compiled for every chip and kind, within SMALL_SHARED on NVIDIA's."""
UNALIGNED_STEP = STEP[:3]
"""Those of sizes that are not aligned: by taller ones their products spill."""

NVIDIA = ("sm_80", "sm_90", "sm_100")
EVERY = CHIPS

PERSISTENT: tuple[CompiledKernel, ...] = (
    CompiledKernel("rnn", "forward", 32, 32, "half", 16, EVERY, 4, 2048),
    CompiledKernel("rnn", "forward", 32, 32, "half", 1, EVERY, 4, 3072),
    CompiledKernel("rnn", "forward", 32, 32, "tf32", 16, EVERY, 4, 8192),
    CompiledKernel("rnn", "forward", 32, 32, "tf32", 1, EVERY, 4, 8192),
    CompiledKernel("rnn", "forward", 32, 32, "ieee", 16, EVERY, 4, 6144),
    CompiledKernel("rnn", "forward", 32, 32, "ieee", 1, EVERY, 4, 6144),
    CompiledKernel("rnn", "forward", 64, 64, "half", 16, EVERY, 4, 10240),
    CompiledKernel("rnn", "forward", 64, 64, "half", 1, EVERY, 4, 10240),
    CompiledKernel("rnn", "forward", 64, 64, "tf32", 16, EVERY, 4, 24576),
    CompiledKernel("rnn", "forward", 64, 64, "tf32", 1, EVERY, 4, 24576),
    CompiledKernel("rnn", "forward", 64, 64, "ieee", 16, EVERY, 4, 20480),
    CompiledKernel("rnn", "forward", 64, 64, "ieee", 1, ("gfx942",), 4, 16384),
    CompiledKernel("rnn", "forward", 128, 128, "half", 16, EVERY, 8, 36864),
    CompiledKernel("rnn", "forward", 128, 128, "half", 1, EVERY, 8, 36864),
    CompiledKernel("rnn", "forward", 128, 128, "tf32", 16, EVERY, 8, 81920),
    CompiledKernel("rnn", "forward", 128, 128, "tf32", 1, EVERY, 8, 81920),
    CompiledKernel("rnn", "forward", 128, 128, "ieee", 16, ("gfx942",), 8, 65536),
    CompiledKernel("rnn", "forward", 128, 128, "ieee", 1, ("gfx942",), 8, 65536),
    CompiledKernel("rnn", "forward", 256, 256, "half", 16, NVIDIA, 8, 139264),
    CompiledKernel("rnn", "backward", 32, 32, "half", 16, EVERY, 4, 3072),
    CompiledKernel("rnn", "backward", 32, 32, "half", 1, EVERY, 4, 3072),
    CompiledKernel("rnn", "backward", 32, 32, "tf32", 16, EVERY, 4, 6144),
    CompiledKernel("rnn", "backward", 32, 32, "tf32", 1, EVERY, 4, 6144),
    CompiledKernel("rnn", "backward", 32, 32, "ieee", 16, EVERY, 4, 6144),
    CompiledKernel("rnn", "backward", 32, 32, "ieee", 1, EVERY, 4, 6144),
    CompiledKernel("rnn", "backward", 64, 64, "half", 16, EVERY, 4, 10240),
    CompiledKernel("rnn", "backward", 64, 64, "half", 1, EVERY, 4, 10240),
    CompiledKernel("rnn", "backward", 64, 64, "tf32", 16, EVERY, 4, 20480),
    CompiledKernel("rnn", "backward", 64, 64, "tf32", 1, EVERY, 4, 20480),
    CompiledKernel("rnn", "backward", 64, 64, "ieee", 16, EVERY, 8, 20480),
    CompiledKernel("rnn", "backward", 64, 64, "ieee", 1, ("sm_100", "gfx942"), 8, 20480),
    CompiledKernel("rnn", "backward", 128, 128, "half", 16, EVERY, 8, 36864),
    CompiledKernel("rnn", "backward", 128, 128, "half", 1, EVERY, 8, 36864),
    CompiledKernel("rnn", "backward", 128, 128, "tf32", 16, EVERY, 8, 73728),
    CompiledKernel("rnn", "backward", 128, 128, "tf32", 1, EVERY, 8, 73728),
    CompiledKernel("rnn", "backward", 128, 128, "ieee", 16, EVERY, 8, 73728),
    CompiledKernel("rnn", "backward", 128, 128, "ieee", 1, ("gfx942",), 8, 65536),
    CompiledKernel("rnn", "backward", 256, 256, "half", 16, NVIDIA, 8, 139264),
    CompiledKernel("lstm", "forward", 32, 32, "half", 16, EVERY, 4, 2048),
    CompiledKernel("lstm", "forward", 32, 32, "half", 1, EVERY, 4, 9216),
    CompiledKernel("lstm", "forward", 32, 32, "tf32", 16, EVERY, 4, 20480),
    CompiledKernel("lstm", "forward", 32, 32, "tf32", 1, EVERY, 4, 20480),
    CompiledKernel("lstm", "forward", 32, 32, "ieee", 16, EVERY, 4, 18432),
    CompiledKernel("lstm", "forward", 32, 32, "ieee", 1, EVERY, 8, 20480),
    CompiledKernel("lstm", "forward", 64, 64, "half", 16, EVERY, 4, 34816),
    CompiledKernel("lstm", "forward", 64, 64, "half", 1, EVERY, 4, 36864),
    CompiledKernel("lstm", "forward", 64, 64, "tf32", 16, EVERY, 4, 73728),
    CompiledKernel("lstm", "forward", 64, 64, "tf32", 1, NVIDIA, 8, 73728),
    CompiledKernel("lstm", "forward", 64, 64, "ieee", 16, NVIDIA, 8, 69632),
    CompiledKernel("lstm", "forward", 128, 128, "half", 16, EVERY, 8, 135168),
    CompiledKernel("lstm", "forward", 128, 128, "half", 1, EVERY, 8, 139264),
    CompiledKernel("lstm", "backward", 32, 32, "half", 16, EVERY, 4, 13312),
    CompiledKernel("lstm", "backward", 32, 32, "half", 1, EVERY, 4, 13312),
    CompiledKernel("lstm", "backward", 32, 32, "tf32", 16, EVERY, 4, 26624),
    CompiledKernel("lstm", "backward", 32, 32, "tf32", 1, EVERY, 4, 26624),
    CompiledKernel("lstm", "backward", 32, 32, "ieee", 16, EVERY, 4, 24576),
    CompiledKernel("lstm", "backward", 32, 32, "ieee", 1, ("gfx942",), 4, 4096),
    CompiledKernel("lstm", "backward", 64, 64, "half", 16, EVERY, 4, 43008),
    CompiledKernel("lstm", "backward", 64, 64, "half", 1, ("sm_90", "sm_100", "gfx942"), 4, 43008),
    CompiledKernel("lstm", "backward", 64, 64, "tf32", 16, EVERY, 4, 86016),
    CompiledKernel("lstm", "backward", 64, 64, "tf32", 1, ("sm_90", "gfx942"), 4, 86016),
    CompiledKernel("lstm", "backward", 64, 64, "ieee", 16, NVIDIA, 8, 81920),
    CompiledKernel("lstm", "backward", 128, 128, "half", 16, EVERY, 8, 151552),
    CompiledKernel("lstm", "backward", 128, 128, "half", 1, ("gfx942",), 8, 32768),
    CompiledKernel("lstm_proj", "forward", 32, 32, "half", 16, EVERY, 4, 2048),
    CompiledKernel("lstm_proj", "forward", 32, 32, "half", 1, EVERY, 4, 11264),
    CompiledKernel("lstm_proj", "forward", 32, 32, "tf32", 16, EVERY, 4, 24576),
    CompiledKernel("lstm_proj", "forward", 32, 32, "tf32", 1, EVERY, 4, 24576),
    CompiledKernel("lstm_proj", "forward", 32, 32, "ieee", 16, EVERY, 8, 24576),
    CompiledKernel("lstm_proj", "forward", 32, 32, "ieee", 1, EVERY, 8, 24576),
    CompiledKernel("lstm_proj", "forward", 64, 32, "half", 16, EVERY, 4, 22528),
    CompiledKernel("lstm_proj", "forward", 64, 32, "half", 1, EVERY, 4, 24576),
    CompiledKernel("lstm_proj", "forward", 64, 32, "tf32", 16, EVERY, 4, 47104),
    CompiledKernel("lstm_proj", "forward", 64, 32, "tf32", 1, NVIDIA, 8, 47104),
    CompiledKernel("lstm_proj", "forward", 64, 32, "ieee", 16, NVIDIA, 8, 45056),
    CompiledKernel("lstm_proj", "forward", 64, 32, "ieee", 1, NVIDIA, 8, 45056),
    CompiledKernel("lstm_proj", "forward", 64, 64, "half", 16, EVERY, 4, 43008),
    CompiledKernel("lstm_proj", "forward", 64, 64, "half", 1, EVERY, 4, 45056),
    CompiledKernel("lstm_proj", "forward", 64, 64, "tf32", 16, NVIDIA, 8, 90112),
    CompiledKernel("lstm_proj", "forward", 64, 64, "tf32", 1, NVIDIA, 8, 90112),
    CompiledKernel("lstm_proj", "forward", 128, 32, "half", 16, NVIDIA, 8, 45056),
    CompiledKernel("lstm_proj", "forward", 128, 32, "half", 1, NVIDIA, 8, 49152),
    CompiledKernel("lstm_proj", "forward", 128, 32, "tf32", 16, NVIDIA, 8, 92160),
    CompiledKernel("lstm_proj", "forward", 128, 32, "tf32", 1, NVIDIA, 8, 92160),
    CompiledKernel("lstm_proj", "forward", 128, 64, "half", 16, NVIDIA, 8, 86016),
    CompiledKernel("lstm_proj", "forward", 128, 64, "half", 1, NVIDIA, 8, 90112),
    CompiledKernel("lstm_proj", "forward", 128, 64, "tf32", 16, ("sm_90",), 8, 176128),
    CompiledKernel("lstm_proj", "forward", 128, 64, "tf32", 1, ("sm_90",), 8, 176128),
    CompiledKernel("lstm_proj", "backward", 32, 32, "half", 16, EVERY, 4, 15360),
    CompiledKernel("lstm_proj", "backward", 32, 32, "half", 1, EVERY, 4, 15360),
    CompiledKernel("lstm_proj", "backward", 32, 32, "tf32", 16, EVERY, 4, 30720),
    CompiledKernel("lstm_proj", "backward", 32, 32, "tf32", 1, EVERY, 4, 30720),
    CompiledKernel("lstm_proj", "backward", 32, 32, "ieee", 16, EVERY, 8, 30720),
    CompiledKernel("lstm_proj", "backward", 32, 32, "ieee", 1, EVERY, 8, 30720),
    CompiledKernel("lstm_proj", "backward", 64, 32, "half", 16, NVIDIA, 4, 30720),
    CompiledKernel("lstm_proj", "backward", 64, 32, "half", 1, ("sm_90", "sm_100"), 4, 30720),
    CompiledKernel("lstm_proj", "backward", 64, 32, "tf32", 16, NVIDIA, 8, 61440),
    CompiledKernel("lstm_proj", "backward", 64, 32, "tf32", 1, NVIDIA, 8, 61440),
    CompiledKernel("lstm_proj", "backward", 64, 64, "half", 16, NVIDIA, 8, 51200),
    CompiledKernel("lstm_proj", "backward", 64, 64, "half", 1, NVIDIA, 8, 51200),
    CompiledKernel("lstm_proj", "backward", 64, 64, "tf32", 16, NVIDIA, 8, 102400),
    CompiledKernel("lstm_proj", "backward", 64, 64, "tf32", 1, NVIDIA, 8, 102400),
    CompiledKernel("lstm_proj", "backward", 64, 64, "ieee", 16, ("gfx942",), 4, 16384),
    CompiledKernel("lstm_proj", "backward", 64, 64, "ieee", 1, ("gfx942",), 4, 16384),
    CompiledKernel("lstm_proj", "backward", 128, 32, "half", 16, NVIDIA, 8, 61440),
    CompiledKernel("lstm_proj", "backward", 128, 32, "half", 1, ("sm_90", "sm_100"), 8, 61440),
    CompiledKernel("lstm_proj", "backward", 128, 32, "tf32", 16, ("sm_100",), 8, 122880),
    CompiledKernel("lstm_proj", "backward", 128, 32, "tf32", 1, ("sm_100",), 8, 122880),
    CompiledKernel("lstm_proj", "backward", 128, 32, "ieee", 16, ("sm_80",), 16, 122880),
    CompiledKernel("lstm_proj", "backward", 128, 64, "half", 16, NVIDIA, 8, 102400),
    CompiledKernel("lstm_proj", "backward", 128, 64, "tf32", 16, ("sm_90", "sm_100"), 8, 204800),
    CompiledKernel("lstm_proj", "backward", 128, 64, "tf32", 1, ("sm_100",), 8, 204800),
    CompiledKernel("gru", "forward", 32, 32, "half", 16, EVERY, 4, 2048),
    CompiledKernel("gru", "forward", 32, 32, "half", 1, EVERY, 4, 7168),
    CompiledKernel("gru", "forward", 32, 32, "tf32", 16, EVERY, 4, 16384),
    CompiledKernel("gru", "forward", 32, 32, "tf32", 1, EVERY, 4, 16384),
    CompiledKernel("gru", "forward", 32, 32, "ieee", 16, EVERY, 4, 14336),
    CompiledKernel("gru", "forward", 32, 32, "ieee", 1, ("sm_80", "sm_90", "gfx942"), 4, 14336),
    CompiledKernel("gru", "forward", 64, 64, "half", 16, EVERY, 4, 26624),
    CompiledKernel("gru", "forward", 64, 64, "half", 1, EVERY, 4, 28672),
    CompiledKernel("gru", "forward", 64, 64, "tf32", 16, EVERY, 4, 57344),
    CompiledKernel("gru", "forward", 64, 64, "tf32", 1, NVIDIA, 8, 57344),
    CompiledKernel("gru", "forward", 64, 64, "ieee", 16, ("sm_80", "sm_90", "gfx942"), 4, 53248),
    CompiledKernel("gru", "forward", 64, 64, "ieee", 1, ("gfx942",), 4, 16384),
    CompiledKernel("gru", "forward", 128, 128, "half", 16, EVERY, 8, 102400),
    CompiledKernel("gru", "forward", 128, 128, "half", 1, EVERY, 8, 106496),
    CompiledKernel("gru", "forward", 128, 128, "tf32", 16, ("sm_90", "sm_100", "gfx942"), 8, 212992),
    CompiledKernel("gru", "forward", 128, 128, "tf32", 1, ("sm_90", "sm_100", "gfx942"), 8, 212992),
    CompiledKernel("gru", "forward", 128, 128, "ieee", 16, ("gfx942",), 8, 65536),
    CompiledKernel("gru", "forward", 128, 128, "ieee", 1, ("gfx942",), 8, 65536),
    CompiledKernel("gru", "backward", 32, 32, "half", 16, EVERY, 4, 10240),
    CompiledKernel("gru", "backward", 32, 32, "half", 1, EVERY, 4, 10240),
    CompiledKernel("gru", "backward", 32, 32, "tf32", 16, EVERY, 4, 20480),
    CompiledKernel("gru", "backward", 32, 32, "tf32", 1, EVERY, 4, 20480),
    CompiledKernel("gru", "backward", 32, 32, "ieee", 16, EVERY, 4, 18432),
    CompiledKernel("gru", "backward", 32, 32, "ieee", 1, ("gfx942",), 4, 4096),
    CompiledKernel("gru", "backward", 64, 64, "half", 16, EVERY, 4, 32768),
    CompiledKernel("gru", "backward", 64, 64, "half", 1, EVERY, 4, 32768),
    CompiledKernel("gru", "backward", 64, 64, "tf32", 16, EVERY, 4, 65536),
    CompiledKernel("gru", "backward", 64, 64, "tf32", 1, EVERY, 4, 65536),
    CompiledKernel("gru", "backward", 64, 64, "ieee", 16, NVIDIA, 8, 61440),
    CompiledKernel("gru", "backward", 128, 128, "half", 16, EVERY, 8, 114688),
    CompiledKernel("gru", "backward", 128, 128, "half", 1, ("sm_80", "sm_90", "gfx942"), 8, 114688),
    CompiledKernel("gru", "backward", 128, 128, "tf32", 16, ("sm_90", "sm_100", "gfx942"), 8, 229376),
    CompiledKernel("gru", "backward", 128, 128, "tf32", 1, ("sm_90", "gfx942"), 8, 229376),
    CompiledKernel("gru", "backward", 128, 128, "ieee", 16, ("gfx942",), 8, 65536),
    CompiledKernel("gru", "backward", 128, 128, "ieee", 1, ("gfx942",), 8, 65536),
    CompiledKernel("gru_reset_before", "forward", 32, 32, "half", 16, EVERY, 4, 2048),
    CompiledKernel("gru_reset_before", "forward", 32, 32, "half", 1, EVERY, 4, 7168),
    CompiledKernel("gru_reset_before", "forward", 32, 32, "tf32", 16, EVERY, 4, 16384),
    CompiledKernel("gru_reset_before", "forward", 32, 32, "tf32", 1, EVERY, 4, 16384),
    CompiledKernel("gru_reset_before", "forward", 32, 32, "ieee", 16, EVERY, 4, 14336),
    CompiledKernel("gru_reset_before", "forward", 32, 32, "ieee", 1, ("sm_80", "sm_90", "gfx942"), 4, 14336),
    CompiledKernel("gru_reset_before", "forward", 64, 64, "half", 16, EVERY, 4, 26624),
    CompiledKernel("gru_reset_before", "forward", 64, 64, "half", 1, EVERY, 4, 28672),
    CompiledKernel("gru_reset_before", "forward", 64, 64, "tf32", 16, EVERY, 4, 57344),
    CompiledKernel("gru_reset_before", "forward", 64, 64, "tf32", 1, EVERY, 4, 57344),
    CompiledKernel("gru_reset_before", "forward", 64, 64, "ieee", 16, EVERY, 8, 53248),
    CompiledKernel("gru_reset_before", "forward", 64, 64, "ieee", 1, ("sm_80", "sm_90"), 8, 53248),
    CompiledKernel("gru_reset_before", "forward", 128, 128, "half", 16, EVERY, 4, 102400),
    CompiledKernel("gru_reset_before", "forward", 128, 128, "half", 1, ("gfx942",), 4, 32768),
    CompiledKernel("gru_reset_before", "forward", 128, 128, "tf32", 16, ("sm_90", "sm_100"), 8, 212992),
    CompiledKernel("gru_reset_before", "backward", 32, 32, "half", 16, EVERY, 4, 9216),
    CompiledKernel("gru_reset_before", "backward", 32, 32, "half", 1, EVERY, 4, 9216),
    CompiledKernel("gru_reset_before", "backward", 32, 32, "tf32", 16, EVERY, 4, 18432),
    CompiledKernel("gru_reset_before", "backward", 32, 32, "tf32", 1, EVERY, 4, 18432),
    CompiledKernel("gru_reset_before", "backward", 32, 32, "ieee", 16, EVERY, 4, 16384),
    CompiledKernel("gru_reset_before", "backward", 32, 32, "ieee", 1, ("sm_100", "gfx942"), 4, 18432),
    CompiledKernel("gru_reset_before", "backward", 64, 64, "half", 16, EVERY, 4, 30720),
    CompiledKernel("gru_reset_before", "backward", 64, 64, "half", 1, EVERY, 4, 30720),
    CompiledKernel("gru_reset_before", "backward", 64, 64, "tf32", 16, EVERY, 4, 61440),
    CompiledKernel("gru_reset_before", "backward", 64, 64, "tf32", 1, EVERY, 4, 61440),
    CompiledKernel("gru_reset_before", "backward", 64, 64, "ieee", 16, NVIDIA, 8, 57344),
    CompiledKernel("gru_reset_before", "backward", 128, 128, "half", 16, NVIDIA, 8, 110592),
    CompiledKernel("gru_reset_before", "backward", 128, 128, "half", 1, NVIDIA, 8, 110592),
    CompiledKernel("gru_reset_before", "backward", 128, 128, "tf32", 16, ("sm_90", "sm_100"), 8, 221184),
)


def plan(cell: str, side: str, hidden: int, proj: int, kind: str, capability: int, rows: int) -> LaunchConfig:
    """How a scan of B = rows, H = hidden, P = proj runs on a device of this capability (90 for 9.0), or AMD."""
    row = find(cell, side, hidden, proj, kind, capability)
    if row is not None:
        return persistent(row, "the recurrent weights stay on chip for the whole sequence")
    operands = {"half": "half precision", "tf32": "TF32", "ieee": "exact float32"}[kind]
    size = f"H={hidden}" + (f" P={proj}" if proj else "")
    most = largest(cell, side, hidden, proj, kind, capability)
    some = "" if multiple_of(hidden, proj) == MULTIPLES[0] else "of sizes that are no multiples of 16 "
    fit = f"{some}up to {most} units fit" if most else f"{some}none fit"
    chip = device_description(capability)
    reason = f"no kernel keeps the recurrent weights of {size} on chip in {operands} on {chip}, {fit}"
    return stepwise(cell, side, hidden, proj, kind, rows, reason)


def find(cell: str, side: str, hidden: int, proj: int, kind: str, capability: int) -> CompiledKernel | None:
    """The persistent kernel that a scan runs by, None where there is none."""
    wanted = (kernel_of(cell, proj), side, tile(hidden), tile(proj or hidden), kind, multiple_of(hidden, proj))
    return next((row for row in rows_of(capability) if row[:6] == wanted), None)


def largest(cell: str, side: str, hidden: int, proj: int, kind: str, capability: int) -> int:
    """Units that the largest persistent kernel below H serves, of sizes aligned as these are and a P of this size; 0
    where there is none."""
    wanted = (kernel_of(cell, proj), side, kind, multiple_of(hidden, proj))
    rows = [row for row in rows_of(capability) if (row.kernel, row.side, row.kind, row.multiple) == wanted]
    units = [fullest(row)[0] for row in rows if not proj or row.size == tile(proj)]
    return max((most for most in units if most < hidden), default=0)


def multiple_of(hidden: int, proj: int) -> int:
    """Of MULTIPLES the first that these sizes are multiples of."""
    return next(multiple for multiple in MULTIPLES if hidden % multiple == proj % multiple == 0)


def kernel_of(cell: str, proj: int) -> str:
    """Of KERNELS the one that runs a cell."""
    return "lstm_proj" if proj else "rnn" if cell.startswith("rnn_") else cell


def device_description(capability: int) -> str:
    """A chip and its shared memory, in words."""
    chip, shared = chip_of(capability)
    name = chip if capability == AMD else f"sm_{capability}"
    return f"{name} ({shared // 1024} KiB of shared memory a block)"


def rows_of(capability: int) -> list[CompiledKernel]:
    """What a device of this capability, or AMD, can run."""
    chip, shared = chip_of(capability)
    small = capability in SMALL  # else what a row's chips have is known from the record
    return [row for row in PERSISTENT if chip in row.chips and (not small or row.shared <= shared)]


def fullest(row: CompiledKernel) -> tuple[int, int]:
    """H and P of the largest problem that a row serves, both odd where any size may be; P is below H, or 0."""
    any_size = row.multiple == 1
    hidden = row.hidden - any_size
    proj = min(row.size - any_size, hidden - (2 if any_size else row.multiple))
    return hidden, proj if row.kernel == "lstm_proj" else 0


def tile(size: int) -> int:
    """Units of the tile that holds `size`: a power of two, 32 at least."""
    return max(TILES[0], 1 << (size - 1).bit_length())


def chip_of(capability: int) -> tuple[str, int]:
    """Of CHIPS the one to go by, and the bytes of shared memory that a block has."""
    if capability == AMD:
        chip = "gfx942"
    else:
        chip = "sm_100" if capability >= 100 else "sm_90" if capability >= 90 else "sm_80"
    return chip, SMALL_SHARED if capability in SMALL else SHARED[chip]


def persistent(row: CompiledKernel, reason: str) -> LaunchConfig:
    """How a scan runs by a row."""
    return LaunchConfig(
        "persistent", ROWS, 0, 0, row.warps, 1, min(255, 2048 // row.warps), precision(row.kind), reason
    )


def stepwise(cell: str, side: str, hidden: int, proj: int, kind: str, rows: int, reason: str) -> LaunchConfig:
    """The step regime, for any size. Of STEP the largest tile that is no more than half empty and leaves
    PROGRAMS programs to the product with W_hh."""
    columns = CELLS[cell].gates * hidden if side == "forward" else proj or hidden
    chosen, *larger = STEP if multiple_of(hidden, proj) == MULTIPLES[0] else UNALIGNED_STEP
    for some in larger:
        programs = -(-rows // some.rows) * -(-columns // some.units)
        if some.rows < max(2 * rows, ROWS + 1) and programs >= PROGRAMS:
            chosen = some
    return step(chosen, kind, reason)


def step(some: Tile, kind: str, reason: str) -> LaunchConfig:
    """How a scan runs by a tile. A tall one of 64 terms spills, or takes more shared memory than gfx942 has."""
    block_k, stages = 64 if kind == "half" and some.rows == ROWS else 32, 1 if kind == "ieee" else 3
    return LaunchConfig("step", some.rows, some.units, block_k, some.warps, stages, 255, precision(kind), reason)


def precision(kind: str) -> str:
    """As `tl.dot` names it. It says nothing of half precision, where most of AMD's chips refuse tf32 all the same."""
    return "tf32" if kind == "tf32" else "ieee"
