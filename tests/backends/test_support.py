"""README's table of what is supported, held against what the backends themselves say.

The machine is made up: GPUs that are there, with kernels that are built. What a backend says of a cell, a dtype or an
option is its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rnnkit.backends import BACKENDS, BY_NAME, LayerSpec
from rnnkit.benchmarks.speed import pages, report

ROOT = Path(__file__).resolve().parents[2]
CELLS = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru", "textbook GRU": "gru_reset_before"}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_DOUBLE = tuple(dtype for dtype in DTYPES if dtype != torch.float64)
# What a line names -> machines that say the same: type in torch, backends that it lacks, dtypes.
DEVICES = {
    "CPU": [("cpu", (), DTYPES)],
    "NVIDIA GPU, sm_80 and later": [("cuda", (), DTYPES)],
    "AMD GPU, gfx942": [("cuda", ("cuda",), NO_DOUBLE)],
    "any other, and float64 on AMD": [("mps", (), NO_DOUBLE), ("cuda", ("cuda",), (torch.float64,))],
}
FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "projection": {"proj_size": 8},
    "lengths": {"lengths": True},
    "resets": {"reset": True, "reset_state": True},
    "all states": {"all_states": True},
    "recompute": {"recompute": True, "train": True},
}
FUSED = ("cpu", "cuda", "triton")


def said(cell: str, device: str, dtype: torch.dtype, options: dict[str, object]) -> str:
    """How a layer can run: what auto asks first, and what can be named beside it."""
    if "proj_size" in options and cell != "lstm":
        return "no"
    facts: dict[str, object] = {"proj_size": 0, "bias": True, **options}
    problem = LayerSpec(cell, device, dtype, 20, 4, 16, 16, **facts)  # type: ignore[arg-type]
    able = {backend.name for backend in BACKENDS if not backend.unsupported(problem)}
    assert "reference" in able
    words = [word for word, yes in (("torch", "torch" in able), ("fused", bool(able & set(FUSED)))) if yes]
    if "cpu" in able:
        return "fused"
    return ", ".join(words) or "reference"


def table(lacking: Callable[[tuple[str, ...]], None]) -> str:
    """Cells that say the same are one line. `lacking`: makes a machine without these backends."""
    lines = []
    for name, machines in DEVICES.items():
        found: dict[tuple[str, ...], list[str]] = {}
        for kind, cell in CELLS.items():
            every = set()
            for device, without, dtypes in machines:
                lacking(without)
                every |= {tuple(said(cell, device, dtype, o) for o in FEATURES.values()) for dtype in dtypes}
            assert len(every) == 1, f"{name}, {kind}: the line would hide a difference: {every}"
            found.setdefault(every.pop(), []).append(kind)
        lines += [[name, ", ".join(kinds), *line] for line, kinds in found.items()]
    return report.table(["device", "cells", *FEATURES], lines)


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[str, ...]], None]:
    """Machines with GPUs and with built kernels, but for some backends."""

    def make(without: tuple[str, ...]) -> None:
        for name in ("cuda", "triton"):
            module = sys.modules[type(BY_NAME[name]).__module__]
            answer = "lacking" if name in without else None
            monkeypatch.setattr(module, "missing", lambda index=None, answer=answer: answer)

    return make


@pytest.mark.skipif(BY_NAME["cpu"].available() is not None, reason="needs the C++ extension")
def test_the_readme_says_what_the_backends_say(lacking: Callable[[tuple[str, ...]], None]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = table(lacking)
    assert pages.put(readme, "support", expected) == readme, f"README.md has another table than:\n{expected}"


@pytest.mark.skipif(BY_NAME["cpu"].available() is not None, reason="needs the C++ extension")
def test_a_backend_that_learns_to_refuse_changes_the_table(
    lacking: Callable[[tuple[str, ...]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "| CPU | LSTM | fused | fused |" in table(lacking)
    kind = type(BY_NAME["cpu"])
    usual = kind.unsupported

    def refuses(self: object, problem: LayerSpec) -> list[str]:
        return [*usual(self, problem), *(["no projection"] if problem.proj_size else [])]  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "unsupported", refuses)
    assert "| CPU | LSTM | fused | torch |" in table(lacking)
    monkeypatch.setattr(kind, "unsupported", lambda self, p: ["no"] if p.dtype == torch.float16 else usual(self, p))
    with pytest.raises(AssertionError, match="CPU, RNN: the line would hide a difference"):
        table(lacking)
