"""`fit`: it learns, stops early with the best parameters, resumes bit for bit, and says what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkit
from rnnkit.sequence import AutoregressiveModel, LatentAutoregressiveModel, MarkovModel, SequenceModel, fit, windows


def waves(rows: int = 12, steps: int = 30, seed: int = 0) -> Tensor:
    """x_t = 1.6 x_{t-1} - 0.9 x_{t-2} + noise: an oscillation that two past values explain and one does not."""
    noise = torch.randn(rows, steps + 50, generator=torch.Generator().manual_seed(seed))
    x = [noise[:, 0], noise[:, 1]]
    for t in range(2, steps + 50):
        x.append(1.6 * x[-1] - 0.9 * x[-2] + 0.5 * noise[:, t])
    return torch.stack(x[50:], 1)


def latent(dropout: float = 0.0) -> SequenceModel:
    torch.manual_seed(0)
    return LatentAutoregressiveModel(rnnkit.GRU(1, 8, 2, dropout=dropout, batch_first=True))


def test_finds_the_coefficients() -> None:
    m = AutoregressiveModel(2)
    result = fit(m, waves(40, 400), epochs=60, batch_size=40, learning_rate=0.1, progress=False)
    assert m.weight.flatten().tolist() == pytest.approx([-0.9, 1.6], abs=0.05)
    assert float(m.log_scale.detach().exp()) == pytest.approx(0.5, abs=0.05)
    assert result.losses[-1] < result.losses[0] and result.best == 59 and not result.stopped


def test_two_past_values_explain_what_one_does_not() -> None:
    held = []
    for order in (1, 2):
        result = fit(AutoregressiveModel(order), waves(100), epochs=60, batch_size=100, learning_rate=0.1,
                     held_out=waves(100, seed=1), progress=False)  # fmt: skip
        held.append(min(result.held_out))
    assert held[0] - held[1] > 0.3  # nats for each observation; theory: ½ ln (1 / (1 - 0.9²)) = 0.83


def test_stops_early_and_keeps_the_best() -> None:
    m = latent()
    held = waves(6, seed=3)
    result = fit(m, waves(2), epochs=200, learning_rate=0.05, held_out=held, patience=5, progress=False)
    assert result.stopped and len(result.losses) == result.best + 6
    assert result.held_out[result.best] == min(result.held_out)
    with torch.no_grad():
        assert -float(m.log_prob(held).mean()) / held.shape[1] == pytest.approx(result.held_out[result.best], rel=1e-6)


@pytest.mark.parametrize("broken", [1, 4])
def test_resumes_bit_for_bit(tmp_path: Path, broken: int) -> None:
    """With dropout and ragged rows: the order of the rows and the masks go on as they would have."""
    x, lengths = waves(), torch.arange(12) + 10
    how: dict[str, Any] = {"batch_size": 5, "held_out": (x, lengths), "progress": False, "seed": 7}
    whole, parts = latent(0.3), latent(0.3)
    torch.manual_seed(11)
    expected = fit(whole, x, lengths, epochs=6, **how)
    torch.manual_seed(11)
    fit(parts, x, lengths, epochs=broken, checkpoint=tmp_path / "fit.pt", **how)
    torch.manual_seed(99)
    torch.rand(3)
    again = latent(0.3)
    found = fit(again, x, lengths, epochs=6, checkpoint=tmp_path / "fit.pt", resume=True, **how)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_clips() -> None:
    """One step of plain gradient descent moves by learning rate times the largest norm."""
    m = AutoregressiveModel(1)
    before = [p.detach().clone() for p in m.parameters()]
    fit(m, 100 * waves(), epochs=1, batch_size=12, clip=0.25, progress=False,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1))  # fmt: skip
    moved = torch.cat([(a - b).flatten() for a, b in zip(m.parameters(), before, strict=True)])
    assert float(moved.norm().detach()) == pytest.approx(0.025, rel=1e-4)


def test_a_loss_that_is_not_finite_ends_it_and_spoils_nothing() -> None:
    m = AutoregressiveModel(1)
    with torch.no_grad():
        m.weight.fill_(1e30)
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(FloatingPointError, match="in epoch 0: a smaller learning rate, or standardised data"):
        fit(m, 1e30 * waves(), progress=False)
    assert all(torch.equal(v, before[name]) for name, v in m.state_dict().items())


def test_shows_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    fit(AutoregressiveModel(1), waves(), epochs=5, held_out=waves())
    said = capsys.readouterr().err
    assert "epoch 5/5" in said and "held out" in said and "s left" in said


def test_windows() -> None:
    series = torch.arange(10.0)
    assert windows(series, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(series, 4, 3)[:, 0].tolist() == [0, 3, 6]
    assert windows(torch.stack([series, -series], 1), 5)[1, :, 1].tolist() == [-5, -6, -7, -8, -9]
    with pytest.raises(ValueError, match="a window of 11 needs at least 11 points, the series has 10"):
        windows(series, 11)
    with pytest.raises(ValueError, match=r"series must be \[T\] or \[T, D\], got \[\]"):
        windows(torch.tensor(1.0), 1)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"batch_size": -1}, "batch_size must be 1 or more"),
        ({"patience": 3}, "patience needs held_out"),
        ({"clip": 0}, "clip must be above 0, or None, got 0"),
        ({"resume": True}, "resume=True needs checkpoint=FILE"),
        ({"lengths": torch.zeros(12).long()}, "every length is 0"),
        ({"x": torch.zeros(0, 3)}, "x has no rows"),
        ({"x": torch.zeros(3, 0)}, "needs at least 1 point"),
        ({"held_out": torch.full((1, 2), torch.nan)}, "got nan at row 0, step 0"),
    ],
)
def test_bad_input(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(MarkovModel(), **{"x": waves(), "progress": False, **how})


def test_a_checkpoint_of_another_training(tmp_path: Path) -> None:
    file = tmp_path / "fit.pt"
    fit(MarkovModel(), waves(), epochs=1, checkpoint=file, progress=False)
    with pytest.raises(ValueError, match=r"of another training \(seed: 0 there, 1 here\)"):
        fit(MarkovModel(), waves(), epochs=2, checkpoint=file, resume=True, seed=1, progress=False)
    with pytest.raises(TypeError, match=r"one of rnnkit.sequence's, got Linear"):
        fit(torch.nn.Linear(1, 1), waves())  # type: ignore[arg-type]
