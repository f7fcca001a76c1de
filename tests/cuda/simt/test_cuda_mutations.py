"""The tests of the CUDA kernels can fail: an error planted in the source of each turns the comparison red, and a
barrier that is missing is found in some order of threads.

A copy of csrc/ with one line changed is compiled in place of the source. Without a change the comparison is silent.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_rows
from sequences import F32, Case, check
from simt import run as simt
from support import some

from rnnkit.backends.cuda import backend as cuda
from rnnkit.benchmarks.gpu_check.parity_cases import MASKED, Variant

SOURCE = Path(__file__).resolve().parents[3] / "csrc"


class Mutation(NamedTuple):
    """`right` in a file of csrc/ becomes `wrong`, `which` of its places (from 0)."""

    file: str
    right: str
    wrong: str
    kind: str
    regime: str
    which: int = 0
    operands: str = "ieee"
    hidden: int = 21


TENSOR = ("bf16", "fp16", "tf32")  # in the order of operands.cuh

GATES = [  # a wrong gate, or a wrong derivative of one; both regimes call these
    ("cells/rnn.h", "dh * (M::set(1) - h * h)", "dh * (M::set(1) - h)", "rnn_tanh"),
    ("cells/lstm.h", "c = f * c_before + i * g", "c = i * c_before + f * g", "lstm"),
    ("cells/lstm.h", "d.ai = dc * g * i * (one - i)", "d.ai = dc * g * i", "lstm"),
    ("cells/gru.h", "(M::set(1) - z) * n + z * h_before", "(M::set(1) - z) * h_before + z * n", "gru"),
    ("cells/gru.h", "d.hn = d.n * r", "d.hn = d.n", "gru"),
    ("cells/gru.h", "d.h_before = drh * r", "d.h_before = drh", "gru_reset_before"),
]
TIME = [  # a row that lives one step too long, a reset at the wrong step, a state from the wrong one
    (
        "cuda/cells.cuh",
        "s.lengths[row] < s.total ? s.lengths[row]",
        "s.lengths[row] < s.total ? s.lengths[row] + 1",
        "lstm",
    ),
    ("cuda/cells.cuh", "t + (s.reverse ? 1 : 0)", "t", "gru"),
    ("cuda/cells.cuh", "s.reverse ? t + 1 : t - 1", "t - 1", "lstm"),
    ("cuda/cells.cuh", "s.reverse != backward ? s.n - 1 - k : k", "s.reverse ? s.n - 1 - k : k", "rnn_tanh"),
]
CTA = [
    # products
    ("cuda/cta_forward.cuh", "k_tile * F::terms, lane);", "0, lane);", "rnn_tanh"),
    ("cuda/cta_forward.cuh", "FIRST + gate);", "gate);", "gru_reset_before"),
    ("cuda/cta_backward.cuh", "(FIRST + gate) * C::width + k_tile * F::terms", "(FIRST + gate) * C::width", "gru"),
    ("cuda/cta.cuh", "unit < at.H ? at.H : 0", "unit < at.H ? at.H - 1 : 0", "lstm"),
    # resets, lengths, states
    ("cuda/cta_forward.cuh", "if (reset[i]) apply_reset(i);", "if (reset[i] && i > 1) apply_reset(i);", "lstm"),
    ("cuda/cta_forward.cuh", "if (reset_before(0, i)) apply_reset(i);", "", "gru"),
    ("cuda/cta_forward.cuh", "if (valid && u < inside) h", "if (u < inside) h", "rnn_tanh"),
    ("cuda/cta_forward.cuh", "if (Cell::has_c && t < me.length[j % 2]) c", "if (Cell::has_c) c", "lstm"),
    ("cuda/cta_backward.cuh", "if (!reset[0][i]) continue;", "continue;", "gru"),
    ("cuda/cta_backward.cuh", "reset[2][i] = reset_before(k + 1, i)", "reset[2][i] = reset_before(k + 2, i)", "lstm"),
    ("cuda/cta_backward.cuh", "if (active) dc[block][j] = d_c;", "dc[block][j] = d_c;", "lstm"),
    ("cuda/cta_backward.cuh", "earlier >= 0 && !replaced", "earlier >= 0", "lstm"),
]
STEP = [
    ("cuda/step_forward.cuh", "reset = s.reset_before(0, i / f.N)", "reset = false", "gru"),
    ("cuda/step_backward.cuh", "        Mem::store(b.dh_r, i, Real(0));", "", "gru"),
    ("cuda/step.cuh", "k_tile = warp;", "k_tile = warp + 1;", "rnn_tanh"),
    ("cuda/step.cuh", "unit < m.units ? m.terms : 0", "unit < m.units ? m.terms - 1 : 0", "lstm"),
    ("cuda/step_forward.cuh", "if (reset_before(k + 1, row)) v = Mem::load(f.h_r, at);", "", "gru"),
    ("cuda/step_forward.cuh", "if (reset_before(k + 1, row)) v = Mem::load(f.c_r, at);", "", "lstm"),
    ("cuda/step_forward.cuh", "valid ? new_state : h[at]", "new_state", "rnn_tanh"),
    ("cuda/step_forward.cuh", "double_buffer[(k + 1) % 2][at]", "double_buffer[k % 2][at]", "lstm_proj"),
    ("cuda/step_backward.cuh", "const Real d = direct_grad[at] + sum;", "const Real d = sum;", "gru"),
    ("cuda/step_backward.cuh", "return Real(0);\n  }\n  // The state", "return d;\n  }\n  // The state", "lstm"),
    ("cuda/step_backward.cuh", "valid ? direct : incoming", "direct", "rnn_tanh"),
    (
        "cuda/step_backward.cuh",
        "s.direct_grad[at] = valid ? Real(0) : incoming",
        "s.direct_grad[at] = incoming",
        "lstm_proj",
    ),
    ("cuda/step_backward.cuh", "if (valid) s.direct_grad[at] = direct;", "", "gru_reset_before"),
    ("cuda/step_backward.cuh", "            d_c = Real(0);", "", "lstm"),
]
BARRIERS = [  # without one a warp that runs ahead reads what is not there yet, or writes what is still read
    ("cuda/cta_forward.cuh", "arch::sync();", "", "lstm", 0),
    ("cuda/cta_backward.cuh", "arch::sync();", "", "lstm", 0),
    ("cuda/cta_forward.cuh", "arch::sync();", "", "lstm", 1),
    ("cuda/cta_forward.cuh", "arch::sync();", "", "gru_reset_before", 2),
    ("cuda/cta_forward.cuh", "arch::sync();", "", "lstm", 3),
    ("cuda/cta_forward.cuh", "? 0 : k % 2 * C::forward_buffer", "? 0 : 0", "lstm"),
    ("cuda/cta_backward.cuh", "arch::sync();", "", "gru_reset_before", 1),
    ("cuda/cta_backward.cuh", "arch::sync();", "", "gru_reset_before", 2),
    ("cuda/cta_backward.cuh", "arch::sync();", "", "lstm", 3),
    ("cuda/cta_backward.cuh", "? 0 : k % 2 * C::backward_buffer", "? 0 : 0", "lstm"),
]
IN_STEP = [("cuda/step.cuh", "arch::sync();", "", "lstm")]
# What tensor cores alone use. Every bit of such an RNN is known, see test_rows.py.
ROUNDING = [  # a number cut instead of rounded, an operand that is not, a bit that is lost
    ("bf16", "{arch::to_bf16(v)}", "{static_cast<uint16_t>(arch::bits(v) >> 16)}"),
    ("bf16", "arch::from_bf16(v.bits)", "arch::from_bf16(v.bits & 0xfffe)"),
    ("fp16", "{arch::to_fp16(v)}", "{arch::to_fp16(arch::from_bits(arch::bits(v) & ~0x1fffu))}"),
    ("fp16", "arch::from_fp16(v.bits)", "arch::from_fp16(v.bits & 0xfffe)"),
    ("tf32", "return arch::to_tf32(v)", "return word"),
    ("tf32", "v.w[i] = O::operand(v.w[i])", "(void)v"),
]
PUT = [
    ("tf32", "words[0] = O::operand(words[0]), ", ""),
    ("tf32", ", words[1] = O::operand(words[1])", ""),
]
A, B = "a0.w[s], a1.w[s], a0.w[s + 1], a1.w[s + 1]", "b.w[s], b.w[s + 1]"
WORDS = [  # which of a lane's words are which terms of which units and rows
    *((kind, A, "a0.w[s], a0.w[s + 1], a1.w[s], a1.w[s + 1]", which) for which, kind in enumerate(TENSOR)),
    *((kind, A, "a1.w[s], a0.w[s], a1.w[s + 1], a0.w[s + 1]", which) for which, kind in enumerate(TENSOR)),
    *((kind, B, "b.w[s + 1], b.w[s]", which) for which, kind in enumerate(TENSOR)),
    *((kind, "O::mma(acc, a0, a1, b[0], 2)", "O::mma(acc, a0, a1, b[0], 0)") for kind in TENSOR),
    *((kind, "O::tensor ? lane % 4 * count", "O::tensor ? lane % 2 * count") for kind in TENSOR),
    *((kind, "O::tensor ? lane / 4 :", "O::tensor ? lane % 8 :") for kind in TENSOR),
]
FRAGMENTS = [  # some of the weights in registers, the others in shared memory
    ("cuda/cta.cuh", "kept[kept_at(n)][i] = v", "kept[kept_at(n)][0] = v"),
    ("cuda/cta.cuh", "? kept[kept_at(n)][i]", "? kept[kept_at(n)][1 - i]"),
    (
        "cuda/cta.cuh",
        "shared[((n - kept_at(n)) * 2 + i) * F::pieces] = v",
        "shared[(n - kept_at(n)) * 2 * F::pieces] = v",
    ),
    ("cuda/cta.cuh", ": shared[((n - kept_at(n)) * 2 + i)", ": shared[((n - kept_at(n)) * 2 + 1 - i)"),
    ("cuda/cta.cuh", "(n - kept_at(n))", "(n / 2)"),
    ("cuda/cta.cuh", "F::piece(at.lane);", "0;"),
    ("cuda/cta.cuh", "memory + at.warp * C::shared_fragments", "memory + 0 * C::shared_fragments"),
    ("cuda/operands.cuh", "O::tensor ? lane : lane / 4", "O::tensor ? lane / 2 : lane / 4"),
    ("cuda/cta_forward.cuh", "memory + 2 * C::forward_buffer", "memory + C::forward_buffer"),
    ("cuda/cta_backward.cuh", "memory + BUFFERS * C::backward_buffer", "memory + (BUFFERS - 1) * C::backward_buffer"),
]


def exact(table: list[Any], *regimes: str) -> Iterator[Mutation]:
    """Errors in float32 as it is."""
    for (file, right, wrong, kind, *which), regime in itertools.product(table, regimes):
        yield Mutation(file, right, wrong, kind, regime, *which)


def rounded(file: str, table: list[Any], *regimes: str, hidden: int = 40) -> Iterator[Mutation]:
    """Errors in a kind of operands, looked for in every bit of an RNN."""
    for (operands, right, wrong, *which), regime in itertools.product(table, regimes):
        yield Mutation(file, right, wrong, "rnn_relu", regime, *(which or (0,)), operands=operands, hidden=hidden)


MUTATIONS = [
    *exact([*GATES, *TIME], "cta", "step"),
    *exact([*CTA, *BARRIERS], "cta"),
    *exact([*STEP, *IN_STEP], "step"),
    *(error._replace(operands="bf16") for error in (*exact(BARRIERS, "cta"), *exact(IN_STEP, "step"))),
    *rounded("cuda/operands.cuh", [*ROUNDING, *WORDS], "cta", "step"),
    *rounded("cuda/cta.cuh", PUT, "cta"),
    *rounded("cuda/step.cuh", [("bf16", "k_tile += S::warps", "k_tile += 2 * S::warps")], "step", hidden=290),
    *(Mutation(*e, "lstm", "cta", operands="bf16", hidden=160) for e in FRAGMENTS),
    *(Mutation(*e, "lstm", "cta", operands="tf32", hidden=128) for e in FRAGMENTS),
]
SEEDS = 20
pytestmark = pytest.mark.usefixtures("on_cpu")


def compare(like: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions, in every order of threads until one of them shows it."""
    monkeypatch.setattr(cuda.regimes, "only", "step" if like.regime == "step" else None)
    resets = ((0, 0), (2, 0), (1, 2), (3, 2), (2, 1))
    case = Case(
        like.kind,
        bidirectional=True,
        steps=4,
        rows=3,
        hidden=like.hidden,
        lengths=(4, 2, 3),
        resets=resets,
        reset_state=True,
    )
    variant = Variant((4, 3, 3, like.hidden), both=True, **MASKED)
    for seed in range(SEEDS):
        with simt.scheduled(seed=seed):
            if like.operands == "ieee":
                check(case, "cuda", F32)
            elif like.kind == "rnn_relu":
                test_rows.test_every_number_is_rounded_once(like.operands, like.regime, like.hidden)
            else:
                test_rows.found(test_rows.case(like.kind, like.operands, like.regime, variant))


def where(error: Mutation) -> tuple[str, ...]:
    """What an error is looked for in."""
    return (error.kind, error.operands, error.regime, str(error.hidden))


@pytest.mark.parametrize("error", {where(e): e for e in MUTATIONS}.values(), ids=lambda e: "-".join(where(e)))
def test_silent_without_an_error(error: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(error, monkeypatch)


def said(error: Mutation) -> str:
    """A test's name."""
    return f"{error.operands}-{error.regime}-{error.file}-{error.wrong or 'without'}-{error.which}"


@pytest.mark.parametrize("error", some(MUTATIONS), ids=said)
def test_red(error: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("*.cpp"))
    path = copy / error.file
    pieces = path.read_text(encoding="utf-8").split(error.right)
    assert len(pieces) > error.which + 1, f"{error.file} has no {error.right!r} number {error.which}"
    at = error.which + 1
    path.write_text(error.right.join(pieces[:at]) + error.wrong + error.right.join(pieces[at:]), encoding="utf-8")
    with (
        simt.sources(copy, tmp_path),
        pytest.raises((AssertionError, RuntimeError), match=r"off by|other bits|rnnkit: kernel"),
    ):
        compare(error, monkeypatch)
