"""The programs under examples/ run as they stand and say what their comments promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="not a clone: examples/ is not here")


def run(name: str, *options: str) -> str:
    done = subprocess.run([sys.executable, str(ROOT / "examples" / name), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("place", ["rnnkit", "torch.nn"])
def test_the_first_program(place: str, tmp_path: Path) -> None:
    text = (ROOT / "examples" / "first_program.py").read_text(encoding="utf-8")
    assert "from rnnkit import RNN" in text
    file = tmp_path / "first.py"
    file.write_text(text.replace("from rnnkit import", f"from {place} import"), encoding="utf-8")
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:6] == [
        "weight_ih_l0   [16, 8]",
        "weight_hh_l0   [16, 16]",
        "bias_ih_l0     [16]",
        "bias_hh_l0     [16]",
        "out [1, 5, 16]",
        "h_n [1, 1, 16]",
    ]
    assert "the last output is the last state: True" in done.stdout


def test_the_story(tmp_path: Path) -> None:
    """Its claims hold in the numbers that it prints: two past values beat one and the naive model, gradients vanish and
    explode with the spectral radius, the LSTM keeps them, the GRU solves what a memoryless guess does not."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install rnnkit[plots]")
    said = run("story.py", "--out", str(tmp_path))
    held = {name: float(v) for name, v in re.findall(r"^(naive|Markov|order 2|latent GRU) +(-?[\d.]+)", said, re.M)}
    assert held["order 2"] < min(held["Markov"], held["naive"]) - 0.1 and held["latent GRU"] < held["Markov"] - 0.2
    rates = [float(v) for v in re.findall(r"× ([\d.]+) a step", said)]
    assert rates[0] < 0.6 and rates[2] > 1.1 and 0.95 < rates[3] <= 1.05
    error, baseline = map(float, re.findall(r"error ([\d.]+), .* ([\d.]+)$", said, re.M)[0])
    assert error < baseline / 4
    assert {path.name for path in tmp_path.iterdir()} == {"gradient.png", "gates.png"}
