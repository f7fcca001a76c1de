"""Every row of the table of CUDA kernels, forward and backward, executed on the CPU from its own source, against
float64; and every kind of operands in the sizes at which a row can go wrong.

A row has everything on: lengths, resets, states at a reset, both directions, a batch that is no multiple of the tile.
It is judged in one order of threads, each row in another, and gives the same bits in twenty.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from sequences import F32, F64, compare
from simt import run as simt
from support import some
from torch import Tensor

import rnnkit
from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.benchmarks.gpu_check import parity, parity_cases, reference_runs
from rnnkit.benchmarks.gpu_check.bitwise_checks import differing
from rnnkit.benchmarks.gpu_check.parity_cases import BF16, F16, KINDS, MASKED, ParityCase, Variant

pytestmark = pytest.mark.usefixtures("on_cpu")

OPERANDS = {"bf16": BF16, "fp16": F16, "tf32": F32, "ieee": F32, "f64": F64}
CELLS = {"rnn": "rnn_relu", "lstm": "lstm_proj", "gru": "gru", "gru_reset_before": "gru_reset_before"}
SEEDS = range(20)


def of_step(row: cuda_configs.CompiledKernel) -> ParityCase:
    """Two blocks of units and of rows; of a row that serves few of them, one of rows that it does not fill."""
    few = row.rows <= cuda_configs.TALL
    size = (3, row.rows + (-1 if few else 3), 3, 19 if few else 40)
    variant = Variant(size, both=True, all_states=True, proj=9, **MASKED)
    return case(CELLS[row.kernel], row.kind, "step", variant)


def case(cell: str, operands: str, regime: str, variant: Variant) -> ParityCase:
    """A case of the CUDA kernels alone."""
    return ParityCase(cell, variant, OPERANDS[operands], tf32=operands == "tf32", stepwise=regime == "step", fused=True)


CTA = [row for row in cuda_configs.ROWS if row.regime == "cta"]
STEP = [row for row in cuda_configs.ROWS if row.regime == "step"]
ROWS = {
    **{row.name: p for row, p in zip(CTA, parity_cases.resident(cuda_configs.ROWS), strict=True)},
    **{row.name: of_step(row) for row in STEP},
}
assert ROWS.keys() == {row.name for row in cuda_configs.ROWS}
# Every regime that serves a cell by a kind of operands; a projection and float64 go step by step alone.
WAYS = [
    (cell, operands, regime)
    for cell, operands, regime in itertools.product(KINDS, OPERANDS, ("cta", "step"))
    if regime == "step" or (cell != "lstm_proj" and operands != "f64")
]
every_way = pytest.mark.parametrize(("cell", "operands", "regime"), WAYS)


def computed(case: ParityCase, runner: reference_runs.Runner) -> parity_cases.Values:
    """What a way gives for the case's first numbers, gradients included."""
    with parity.precision_and_regime(case):
        return reference_runs.numbers(runner, case, parity_cases.draw(case, 0), case.dtype, "cpu")


def found(case: ParityCase) -> None:
    """The backend against float64; float64 itself to a few ulp of accumulation."""
    if case.dtype == F64:
        compare(
            computed(case, reference_runs.named("cuda")),
            computed(case, reference_runs.by_pieces if case.known else reference_runs.by_steps),
        )
        return
    findings = parity.Findings()
    parity.examine(findings, "cpu", [case], ("cuda",))
    complaints = [*findings.wrong, *findings.failing]
    assert not complaints, "; ".join(complaints)
    assert sum(findings.ran.values()) == 1


@pytest.mark.parametrize("name", some(ROWS, 4))
def test_every_row(name: str) -> None:
    of_row = ROWS[name]
    assert parity_cases.compiled_for(of_row, 90).name == name
    with simt.scheduled(seed=list(ROWS).index(name)):
        found(of_row)


@pytest.mark.parametrize("name", some(ROWS))
def test_twenty_schedules(name: str) -> None:
    """The same bits whatever the order of threads and blocks, all four manners of drawing one among them."""
    first: parity_cases.Values = {}
    for seed in SEEDS:
        with simt.scheduled(seed=seed):
            got = computed(ROWS[name], reference_runs.named("cuda"))
        first = first or got
        assert differing(got, first) == [], seed


@every_way
@pytest.mark.parametrize(
    "size", [(1, 1, 2, 5), (1, 9, 2, 18), (3, 1, 2, 18), (2, 7, 2, 33), (2, 9, 2, 5)], ids=lambda s: f"T{s[0]}B{s[1]}"
)
def test_one_step_and_odd_batches(cell: str, operands: str, regime: str, size: tuple[int, int, int, int]) -> None:
    found(case(cell, operands, regime, Variant(size, both=True, all_states=True, **MASKED)))


@pytest.mark.parametrize("hidden", [290, 304])
@pytest.mark.parametrize(("cell", "operands"), [runner[:2] for runner in WAYS if runner[2] == "step"])
def test_step_by_step_in_several_rounds(cell: str, operands: str, hidden: int) -> None:
    """More terms than a block's warps take in one round; rows of weights that are read 16 bytes at a time, or not."""
    found(case(cell, operands, "step", Variant((2, 3, 2, hidden), proj=280, resets=True)))


Rounding = Callable[[Tensor], Tensor]


def to_nearest(dtype: torch.dtype) -> Rounding:
    """As torch rounds: ties to even."""
    return lambda v: v.to(dtype).to(v.dtype)


def to_tf32(v: Tensor) -> Tensor:
    """11 bits of the significand, ties away from zero."""
    return ((v.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# What operands of products are rounded to, and what is stored.
ROUNDED: dict[str, tuple[Rounding, Rounding]] = {
    "bf16": (to_nearest(BF16), to_nearest(BF16)),
    "fp16": (to_nearest(F16), to_nearest(F16)),
    "tf32": (to_tf32, to_nearest(F32)),
    "ieee": (to_nearest(F32), to_nearest(F32)),
    "f64": (to_nearest(F64), to_nearest(F64)),
}


@pytest.mark.parametrize(("operands", "regime"), dict.fromkeys(runner[1:] for runner in WAYS))
@pytest.mark.parametrize("hidden", [40, 128])
def test_every_number_is_rounded_once(operands: str, regime: str, hidden: int) -> None:
    """An RNN whose recurrent weights are a permutation with signs and sizes: each sum has one term, which is exact, so
    every bit is known."""
    dtype, (operand, stored) = OPERANDS[operands], ROUNDED[operands]
    wide = F64 if dtype == F64 else F32
    steps, rows = 4, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64).to(dtype)

    x, h_0, gy = normal(steps, rows, hidden), normal(1, rows, hidden), normal(steps, rows, hidden)
    w_hh = torch.zeros(hidden, hidden, dtype=dtype)
    w_hh[torch.arange(hidden), torch.randperm(hidden)] = normal(hidden)

    layer = rnnkit.RNN(hidden, hidden, bias=False, nonlinearity="relu", backend="cuda", dtype=dtype)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(hidden))
        layer.weight_hh_l0.copy_(w_hh)
    leaves = [x.requires_grad_(), h_0.requires_grad_()]
    with parity.precision_and_regime(case("rnn_relu", operands, regime, Variant())):
        y, _ = layer(*leaves)
        dx, dh_0 = torch.autograd.grad(y, leaves, gy)

    w, h, expected = operand(w_hh.to(wide)), h_0[0].detach().to(wide), []
    for x_t in x.detach().to(wide):
        h = (x_t + operand(h) @ w.T).relu()
        expected.append(stored(h))
        h = expected[-1]
    assert torch.equal(y.to(wide), torch.stack(expected)), "y has other bits"
    back = torch.zeros(rows, hidden, dtype=wide)
    for t in reversed(range(steps)):
        d = stored((gy[t].to(wide) + back) * (expected[t] > 0))
        assert torch.equal(dx[t].to(wide), d), f"dx at step {t} has other bits"
        back = operand(d) @ w
    assert torch.equal(dh_0[0].to(wide), stored(back)), "dh_0 has other bits"
