"""The tests of the CUDA kernels can fail: an error planted in the source of each turns the comparison red, and a
barrier that is missing is found in some order of threads.

A copy of csrc/ with one line changed is compiled in place of the source. Without a change the comparison is silent.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from sequences import F32, Case, check
from simt import run as simt

from rnnkit.backends import cuda

SOURCE = Path(__file__).resolve().parents[2] / "csrc"


class Error(NamedTuple):
    """`right` in a file of csrc/ becomes `wrong`, `which` of its places (from 0)."""

    file: str
    right: str
    wrong: str
    kind: str
    regime: str
    which: int = 0


GATES = [  # a wrong gate, or a wrong derivative of one; both regimes call these
    ("cells/rnn.h", "dh * (M::set(1) - h * h)", "dh * (M::set(1) - h)", "rnn_tanh"),
    ("cells/lstm.h", "s.c = s.f * c_before + s.i * s.g", "s.c = s.i * c_before + s.f * s.g", "lstm"),
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
    ("cuda/cta_forward.cuh", "part * F::terms, lane);", "0, lane);", "rnn_tanh"),
    ("cuda/cta_forward.cuh", "FIRST + gate);", "gate);", "gru_reset_before"),
    ("cuda/cta_backward.cuh", "(FIRST + gate) * C::width + part * F::terms", "(FIRST + gate) * C::width", "gru"),
    ("cuda/cta.cuh", "unit < at.H ? at.H : 0", "unit < at.H ? at.H - 1 : 0", "lstm"),
    # resets, lengths, states
    ("cuda/cta_forward.cuh", "if (cut[i]) enter(i);", "if (cut[i] && i > 1) enter(i);", "lstm"),
    ("cuda/cta_forward.cuh", "if (cut_before(0, i)) enter(i);", "", "gru"),
    ("cuda/cta_forward.cuh", "if (lives && u < inside) h", "if (u < inside) h", "rnn_tanh"),
    ("cuda/cta_forward.cuh", "if (Cell::has_c && t < me.length[j % 2]) c", "if (Cell::has_c) c", "lstm"),
    ("cuda/cta_backward.cuh", "if (!cut[0][i]) continue;", "continue;", "gru"),
    ("cuda/cta_backward.cuh", "cut[2][i] = cut_before(k + 1, i)", "cut[2][i] = cut_before(k + 2, i)", "lstm"),
    ("cuda/cta_backward.cuh", "if (alive) dc[block][j] = d_c;", "dc[block][j] = d_c;", "lstm"),
    ("cuda/cta_backward.cuh", "earlier >= 0 && !replaced", "earlier >= 0", "lstm"),
    # barriers: without one a warp that runs ahead reads what is not there yet, or writes what is still read
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
STEP = [
    ("cuda/step.cuh", "part = warp;", "part = warp + 1;", "rnn_tanh"),
    ("cuda/step.cuh", "unit < m.units ? m.terms : 0", "unit < m.units ? m.terms - 1 : 0", "lstm"),
    ("cuda/step.cuh", "arch::sync();", "", "lstm"),
    ("cuda/step_forward.cuh", "if (cut_before(k + 1, row)) v = Mem::load(f.h_r, at);", "", "gru"),
    ("cuda/step_forward.cuh", "if (cut_before(k + 1, row)) v = Mem::load(f.c_r, at);", "", "lstm"),
    ("cuda/step_forward.cuh", "lives ? fresh : h[at]", "fresh", "rnn_tanh"),
    ("cuda/step_forward.cuh", "turns[(k + 1) % 2][at]", "turns[k % 2][at]", "lstm_proj"),
    ("cuda/step_backward.cuh", "const Real d = aside[at] + sum;", "const Real d = sum;", "gru"),
    ("cuda/step_backward.cuh", "return Real(0);\n  }\n  // The state", "return d;\n  }\n  // The state", "lstm"),
    ("cuda/step_backward.cuh", "alive ? direct : came", "direct", "rnn_tanh"),
    ("cuda/step_backward.cuh", "s.aside[at] = alive ? Real(0) : came", "s.aside[at] = came", "lstm_proj"),
    ("cuda/step_backward.cuh", "if (alive) s.aside[at] = direct;", "", "gru_reset_before"),
    ("cuda/step_backward.cuh", "            d_c = Real(0);", "", "lstm"),
]
ERRORS = [Error(*e, regime) for e in (*GATES, *TIME) for regime in ("cta", "step")]
ERRORS += [Error(*e[:4], "cta", *e[4:]) for e in CTA] + [Error(*e[:4], "step", *e[4:]) for e in STEP]
SEEDS = 20
pytestmark = pytest.mark.usefixtures("on_cpu")


def compare(kind: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions, in every order of threads until one of them shows it."""
    monkeypatch.setattr(cuda, "REGIME", "step" if regime == "step" else None)
    resets = ((0, 0), (2, 0), (1, 2), (3, 2), (2, 1))
    case = Case(
        kind, bidirectional=True, steps=4, rows=3, hidden=21, lengths=(4, 2, 3), resets=resets, reset_state=True
    )
    for seed in range(SEEDS):
        with simt.scheduled(seed=seed):
            check(case, "cuda", F32)


@pytest.mark.parametrize("regime", ["cta", "step"])
@pytest.mark.parametrize("kind", sorted({error.kind for error in ERRORS}))
def test_silent_without_an_error(kind: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(kind, regime, monkeypatch)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: f"{e.regime}-{e.file}-{e.wrong or 'without'}-{e.which}")
def test_red(error: Error, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("*.cpp"))
    path = copy / error.file
    pieces = path.read_text(encoding="utf-8").split(error.right)
    assert len(pieces) > error.which + 1, f"{error.file} has no {error.right!r} number {error.which}"
    at = error.which + 1
    path.write_text(error.right.join(pieces[:at]) + error.wrong + error.right.join(pieces[at:]), encoding="utf-8")
    with (
        simt.sources(copy, tmp_path),
        pytest.raises((AssertionError, RuntimeError), match=r"off by|budget|rnnkit: kernel"),
    ):
        compare(error.kind, error.regime, monkeypatch)
