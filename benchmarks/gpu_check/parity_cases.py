"""What parity is examined on: every kind of layer, in sizes and with extras that each can go wrong on, in every dtype.

For the fused backends there is more: every persistent kernel that the device can run, sizes around its tiles, the step
regime, TF32, sequences and tensors beyond 16 and 31 bits, and the calls of bitwise_checks.py. The numbers are drawn in
float64 such that the dtype holds them exactly: what differs later was made by computing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import rnnkit
from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.backends.triton import configs as triton_configs
from rnnkit.cells import CELLS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Values = dict[str, Tensor]
POOLED, SAMPLES = 96, 16  # numbers that a state has at least, in so many runs at most: the largest of a few is luck


@dataclass(frozen=True)
class Kind:
    """A kind of layer: its class, what the class takes, and the cell's name in `ops.layer`."""

    layer: str
    cell: str
    options: dict[str, Any] = field(default_factory=dict)
    known: bool = True
    """Whether torch.nn has it."""

    @property
    def states(self) -> tuple[str, ...]:
        """The names of its states."""
        return ("h", "c") if self.cell == "lstm" else ("h",)


KINDS = {
    "rnn_tanh": Kind("RNN", "rnn_tanh"),
    "rnn_relu": Kind("RNN", "rnn_relu", {"nonlinearity": "relu"}),
    "lstm": Kind("LSTM", "lstm"),
    "lstm_proj": Kind("LSTM", "lstm"),
    "gru": Kind("GRU", "gru"),
    "gru_reset_before": Kind("GRU", "gru_reset_before", {"reset_after": False}, known=False),
}


@dataclass(frozen=True)
class Variant:
    """Sizes (T, B, I, H), and what a layer is called with."""

    size: tuple[int, int, int, int] = (6, 4, 5, 9)
    layers: int = 1
    both: bool = False
    """Both directions."""
    bias: bool = True
    hx: bool = True
    lengths: bool = False
    resets: bool = False
    reset_state: bool = False
    all_states: bool = False
    recompute: bool = False
    proj: int = 3
    """P, of kinds with a projection."""
    many: int = 0
    """Rows in all where there are more than the problem's: rnnkit is given those as the first and last of them."""

    def __str__(self) -> str:
        words = [f"{name} {n}" for name, n in zip("TBIH", self.size, strict=True)]
        words += [f"among {self.many} rows"] * (self.many > 0)
        words += [f"{self.layers} layers"] * (self.layers > 1) + ["both directions"] * self.both
        for name in ("lengths", "resets", "reset_state", "all_states", "recompute"):
            words += [name] * getattr(self, name)
        return ", ".join(words + [f"no {name}" for name in ("bias", "hx") if not getattr(self, name)])


@dataclass(frozen=True)
class Problem:
    """A kind of layer in one variant and dtype."""

    kind: str
    variant: Variant
    dtype: torch.dtype
    tf32: bool = False
    """Whether recurrent products may be TF32; of float32."""
    stepwise: bool = False
    """Whether the kernels are to run step by step at any size."""
    calls: bool = False
    """Whether bitwise_checks.py looks at it: in a CUDA graph, compiled, under autocast, among other rows."""
    fused: bool = False
    """Whether only the fused backends are asked."""

    def __str__(self) -> str:
        how = " step by step" * self.stepwise
        if self.kind == "lstm_proj":
            how += f" with P {self.variant.proj}"
        return f"{self.kind} in {self.precision}{how} ({self.variant})"

    @property
    def precision(self) -> str:
        """The dtype's name, or tf32."""
        return "tf32" if self.tf32 else str(self.dtype)[6:]

    @property
    def operands(self) -> str:
        """How the table of kernels calls it."""
        return "half" if self.dtype != torch.float32 else "tf32" if self.tf32 else "ieee"

    @property
    def proj(self) -> int:
        """P, 0 without a projection."""
        return self.variant.proj if self.kind == "lstm_proj" else 0

    @property
    def output_size(self) -> int:
        """H, or P with a projection."""
        return self.proj or self.variant.size[3]

    @property
    def samples(self) -> int:
        """Runs to pool."""
        return min(SAMPLES, -(-POOLED // (self.variant.size[1] * self.output_size)))

    @property
    def known(self) -> bool:
        """Whether torch.nn can be brought to do it."""
        return KINDS[self.kind].known and not self.variant.all_states

    @property
    def long(self) -> bool:
        """Whether a CPU would take minutes for the truth."""
        return self.variant.size[0] > LONG

    @property
    def memory(self) -> int:
        """Bytes that a device must have free, 0 where any has them: 12 tensors of gx's size in training at most."""
        steps, _, _, hidden = self.variant.size
        gates = CELLS[KINDS[self.kind].cell].gates
        return 12 * steps * self.variant.many * gates * hidden * self.dtype.itemsize


LONG = 10_000  # steps

EVERYTHING = Variant((7, 5, 4, 8), 2, True, lengths=True, resets=True, reset_state=True)
QUICK = (
    Variant(),
    Variant((1, 4, 5, 7)),
    Variant((3, 17, 33, 65)),
    Variant((9, 5, 3, 16), lengths=True, resets=True, reset_state=True, all_states=True),
    Variant(lengths=True, resets=True, recompute=True),
)
PLAIN = (
    Variant((1, 1, 1, 4)),
    Variant((3, 100, 8, 40), both=True),
    Variant(hx=False, bias=False),
    Variant(layers=2, both=True),
    Variant(lengths=True),
    Variant(lengths=True, both=True, hx=False),
    Variant(resets=True),
    Variant(resets=True, reset_state=True, both=True),
)
F32, BF16, F16 = DTYPES
CALLS = Variant((5, 20, 4, 24), lengths=True, resets=True, reset_state=True)
AROUND = tuple(tile + by for tile in triton_configs.TILES for by in (-1, 1))
"""Sizes that a tile just holds, and does not hold any more."""
MASKED = {"lengths": True, "resets": True, "reset_state": True}
BEYOND_16 = Variant((70_000, 4, 2, 24))  # persistent: step by step T is a loop on the host, as for any T
BEYOND_31 = Variant((64, 32, 1, 256), many=131_200)  # T·B·H is 2^31 + 2 Mi elements


def select(
    quick: bool = False, capability: int | None = None, compiled: Sequence[cuda_configs.CompiledKernel] = ()
) -> list[Problem]:
    """What is examined, in the order in which it matters where time is short.

    capability: of the GPU whose persistent Triton kernels are to be examined, as triton/configs.py numbers them; None:
    of none. compiled: the CUDA kernels that are to be examined.
    """
    whole = [Problem(kind, EVERYTHING, dtype) for dtype in (BF16, F32) for kind in KINDS]
    steps = [Problem(kind, EVERYTHING, BF16, stepwise=True, fused=True) for kind in KINDS]
    calls = [Problem(kind, CALLS, BF16, stepwise=by, calls=True, fused=True) for by in (False, True) for kind in KINDS]
    both = replace(CALLS, both=True)  # on two streams at once
    calls += [Problem("lstm", both, BF16, stepwise=by, calls=True, fused=True) for by in (False, True)]
    if quick:
        return [*whole, *steps, *(p for p in calls if p.kind == "lstm")]
    exact = [
        Problem(kind, EVERYTHING, F32, tf32=tf32, stepwise=True, fused=True) for tf32 in (True, False) for kind in KINDS
    ]
    rows = [] if capability is None else list(persistent(capability))
    rows += [*resident(compiled), *stepping(compiled)]
    half = [Problem(kind, EVERYTHING, F16) for kind in KINDS]
    some = [Problem(kind, variant, dtype) for variant in QUICK for dtype in (BF16, F32) for kind in KINDS]
    rest = [Problem(kind, variant, dtype) for variant in PLAIN for dtype in (BF16, F32) for kind in KINDS]
    far = [Problem("rnn_tanh", BEYOND_31, BF16, stepwise=by, fused=True) for by in (False, True)]
    far += [Problem(kind, BEYOND_16, BF16, fused=True) for kind in ("lstm", "gru", "rnn_tanh")]
    every = [*whole, *steps, *calls, *exact, *rows, *around(), *far, *half, *some, *rest]
    return [p for p in every if p.kind != "rnn_relu" or p.variant.bias]  # see `_relu`


def persistent(capability: int) -> Iterator[Problem]:
    """Everything in both directions, for each persistent kernel: the largest that it serves, three tiles of rows."""
    kinds = {"half": (BF16, False), "tf32": (F32, True), "ieee": (F32, False)}
    every = dict.fromkeys(
        (row.kernel, *triton_configs.fullest(row), row.kind) for row in triton_configs.rows_of(capability)
    )
    for kernel, hidden, proj, kind in every:
        dtype, tf32 = kinds[kind]
        variant = Variant((4, 33, 5, hidden), both=True, all_states=True, proj=proj, **MASKED)
        name = kernel if kernel in KINDS else triton_configs.CELLS_OF[kernel][0]
        yield Problem(name, variant, dtype, tf32=tf32, fused=True)


def resident(rows: Sequence[cuda_configs.CompiledKernel]) -> Iterator[Problem]:
    """Everything in both directions, for each CUDA kernel that keeps its weights where it computes: its units all
    taken, or, in turn, all but one; two blocks of rows."""
    for k, row in enumerate(row for row in rows if row.units):
        variant = Variant((4, 11, 5, row.units - k % 2), both=True, all_states=True, **MASKED)
        yield _of_row(row, k, variant)


def stepping(rows: Sequence[cuda_configs.CompiledKernel]) -> Iterator[Problem]:
    """The same for each CUDA kernel that goes step by step: two blocks of units, of rows or, where a row serves few of
    them, one."""
    for k, row in enumerate(row for row in rows if not row.units):
        size = (4, row.rows if row.rows <= cuda_configs.TALL else row.rows + 3, 5, 24 - k % 2)
        yield replace(_of_row(row, k, Variant(size, both=True, all_states=True, **MASKED)), stepwise=True)


def _of_row(row: cuda_configs.CompiledKernel, k: int, variant: Variant) -> Problem:
    kinds = {"bf16": (BF16, False), "fp16": (F16, False), "tf32": (F32, True), "ieee": (F32, False)}
    names = {kernel: cell for cell, kernel in cuda_configs.CELLS.items()}  # of an RNN the last, relu
    dtype, tf32 = kinds.get(row.kind, (torch.float64, False))
    name = "rnn_tanh" if row.kernel == "rnn" and k % 3 else names[row.kernel]
    return Problem(name, variant, dtype, tf32=tf32, fused=True)


def around() -> Iterator[Problem]:
    """Sizes around each tile, the batch just off a tile of rows or large; the precisions take turns."""
    precisions = ((BF16, False), (F32, False), (F16, False), (F32, True))
    for (k, hidden), (n, kind) in itertools.product(enumerate(AROUND), enumerate(KINDS)):
        dtype, tf32 = precisions[(k + k // 4 + n) % 4]
        rows = (15, 100, 33)[(k + n) % 3]
        variant = Variant((3, rows, 7, hidden), proj=min(hidden - 1, 33), **MASKED)
        yield Problem(kind, variant, dtype, tf32=tf32, fused=True)


def kernels_of(problem: Problem, capability: int) -> list[triton_configs.CompiledKernel]:
    """The persistent kernels that a problem runs by."""
    if problem.stepwise:
        return []
    facts = (problem.variant.size[3], problem.proj, problem.operands, capability)
    rows = [triton_configs.find(KINDS[problem.kind].cell, side, *facts) for side in triton_configs.SIDES]
    return [row for row in rows if row is not None]


def compiled_for(problem: Problem, capability: int) -> cuda_configs.CompiledKernel:
    """The CUDA kernel that a problem runs by."""
    cell, hidden, rows = KINDS[problem.kind].cell, problem.variant.size[3], problem.variant.many
    kind = "tf32" if problem.tf32 else cuda.KINDS.get(problem.dtype, "ieee")
    rows = rows or problem.variant.size[1]
    only = "step" if problem.stepwise else None
    return cuda_configs.plan(cell, hidden, problem.proj, kind, rows, capability, only)[0]


# What a problem is given: values in float64 that its dtype holds exactly.


@dataclass
class Given:
    """x [T, B, I]; h_0, c_0 and h_r, c_r [L·D, B, ·]; weights under torch's names; lengths [B], resets [T, B]."""

    leaves: Values
    weights: Values
    lengths: Tensor | None
    resets: Tensor | None

    @property
    def valid(self) -> list[int]:
        """How many steps each row has."""
        steps, rows = self.leaves["x"].shape[:2]
        return [steps] * rows if self.lengths is None else self.lengths.tolist()

    def to(self, dtype: torch.dtype, device: str) -> tuple[Values, Values]:
        """Leaves and weights, each to be differentiated by."""
        every = (self.leaves, self.weights)
        first, second = ({n: v.to(device, dtype).requires_grad_() for n, v in some.items()} for some in every)
        return first, second


def draw(problem: Problem, seed: int) -> Given:
    """Random numbers. Row 0 has all its steps, the last row none where there are several."""
    variant, kind, g = problem.variant, KINDS[problem.kind], torch.Generator().manual_seed(seed)
    steps, rows, features, hidden = variant.size

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=g) * 2 - 1).to(problem.dtype).double()

    count = variant.layers * (2 if variant.both else 1)
    leaves = {"x": uniform(steps, rows, features)}
    for suffix in ["0"] * variant.hx + ["r"] * variant.reset_state:
        for name, size in zip(kind.states, (problem.output_size, hidden), strict=False):
            leaves[f"{name}_{suffix}"] = uniform(count, rows, size)
    weights = {}
    for name, p in build(problem, rnnkit).named_parameters():
        scale = _relu(name, p.shape) if problem.kind == "rnn_relu" else hidden**-0.5
        v = uniform(*p.shape)
        if problem.kind == "rnn_relu" and name.startswith("bias"):
            sign = torch.ones(hidden)
            sign[::3] = -1
            v = (1.75 + v / 8) * sign
        weights[name] = (v * scale).to(problem.dtype).double()
    lengths = resets = None
    if variant.lengths:
        lengths = torch.randint(1, steps + 1, (rows,), generator=g)
        lengths[0] = steps
        if rows > 1:
            lengths[-1] = 0
    if variant.resets:
        resets = torch.rand(steps, rows, generator=g) < 0.3
    return Given(leaves, weights, lengths, resets)


def _relu(name: str, shape: torch.Size) -> float:
    """How large a weight of an RNN with relu may be, so that no rounding takes a sum over the kink.

    There the derivative is that of another function, and no budget says how far it is off. Both biases together are
    between 3.2 and 3.8 in size; |W_ih x| stays below 0.5 and |W_hh h|, with h below 6.7, below 2.4.
    """
    if name.startswith("bias"):
        return 1.0
    most = 0.35 if name.startswith("weight_hh") else 0.5 if "l0" in name else 0.07
    return most / shape[1]


def build(problem: Problem, library: Any, **more: Any) -> nn.Module:
    """The layer, of rnnkit or of torch.nn."""
    variant, kind = problem.variant, KINDS[problem.kind]
    _, _, features, hidden = variant.size
    how = dict(num_layers=variant.layers, bias=variant.bias, bidirectional=variant.both, **kind.options)
    how |= {"proj_size": problem.proj} if problem.proj else {}
    return getattr(library, kind.layer)(features, hidden, **how, **more)
