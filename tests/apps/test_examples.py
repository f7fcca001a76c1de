"""The programs under examples/ run as they stand and say what their comments promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="a wheel carries no examples")


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


@pytest.mark.long
def test_the_story(tmp_path: Path) -> None:
    """Its claims hold in the numbers that it prints: two past values beat one and the naive model, a forecast's band
    grows, gradients vanish and explode with the spectral radius, the LSTM keeps them, the GRU's weights sum to one, and
    it solves what the vanilla RNN and a memoryless guess do not."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install rnnkit[plots]")
    said = run("story.py", "--out", str(tmp_path))
    held = {name: float(v) for name, v in re.findall(r"^(naive|Markov|order 2|latent GRU) +(-?[\d.]+)", said, re.M)}
    assert held["order 2"] < min(held["Markov"], held["naive"]) - 0.1 and held["latent GRU"] < held["Markov"] - 0.2
    rates = [float(v) for v in re.findall(r"× ([\d.]+) a step", said)]
    assert rates[0] < 0.6 < rates[1] < 0.9 and rates[2] > 1.1 and 0.95 < rates[3] <= 1.05
    near, far = map(float, re.findall(r"the band grows from ([\d.]+) to ([\d.]+)$", said, re.M)[0])
    assert far > 2 * near  # 6.85 and 1.98
    (off,) = re.findall(r"weights that sum to one: off by ([\d.e+-]+)$", said, re.M)
    assert float(off) < 1e-6
    errors = {cell: float(v) for cell, v in re.findall(r"^adding problem, (\w+): .*error of ([\d.]+)$", said, re.M)}
    (nothing,) = map(float, re.findall(r"remembers nothing: ([\d.]+)$", said, re.M))
    assert errors["GRU"] < nothing / 4 and errors["RNN"] > nothing / 2, errors
    assert {path.name for path in tmp_path.iterdir()} == {"gradient.png", "gates.png"}


@pytest.mark.parametrize("place", ["file", "file/below", "taken"])
def test_the_story_looks_for_room_before_it_begins(place: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install rnnkit[plots]")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "gates.png").mkdir(parents=True)
    check_refused(refused("--out", str(tmp_path / place)), f"cannot write to {tmp_path}")


def test_the_story_without_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ModuleNotFoundError('as if it were not there')\n")
    done = refused("--out", str(tmp_path / "new"), PYTHONPATH=str(tmp_path))
    check_refused(done, "pip install rnnkit[plots]")
    assert not (tmp_path / "new").exists()


def refused(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    story = [sys.executable, str(ROOT / "examples" / "story.py"), *options]
    return subprocess.run(story, capture_output=True, text=True, env={**os.environ, **environment})


def check_refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
