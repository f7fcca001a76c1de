"""The benchmark as a command, for its tests: on a machine that is made up, everything for a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_rows import Made

from rnnkit.__main__ import main
from rnnkit.benchmarks.speed import roofline


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command, on the made-up machine, writing to `tmp_path`; everything for a moment."""
    monkeypatch.setattr(roofline, "Machine", Made)

    def call(*options: str) -> int:
        return main(["bench", "--out", str(tmp_path), "--seconds", "0.001", *options])

    return call
