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


@pytest.mark.parametrize("broken", [1, 3, 50])
def test_resumes_bit_for_bit_with_patience(tmp_path: Path, broken: int) -> None:
    """Broken off before its end, at its last epoch, and when it had stopped by itself."""
    file = tmp_path / "fit.pt"
    how: dict[str, Any] = {"learning_rate": 0.05, "held_out": waves(6, seed=3), "patience": 3, "progress": False}
    whole, parts, again = latent(0.3), latent(0.3), latent(0.3)
    torch.manual_seed(11)
    expected = fit(whole, waves(2), epochs=50, **how)
    assert expected.stopped and len(expected.losses) > 3
    torch.manual_seed(11)
    fit(parts, waves(2), epochs=len(expected.losses) if broken == 3 else broken, checkpoint=file, **how)
    for _ in range(2):  # and once more, when there is nothing left to do
        assert fit(again, waves(2), epochs=50, checkpoint=file, resume=True, **how) == expected
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_goes_on_with_more_patience_or_epochs(tmp_path: Path) -> None:
    how: dict[str, Any] = {"learning_rate": 0.2, "held_out": waves(6, seed=3), "progress": False}
    expected = fit(latent(), waves(2), epochs=12, **how)
    for shorter in ({"epochs": 12, "patience": 1}, {"epochs": 4}):
        file = tmp_path / f"{len(shorter)}.pt"
        assert len(fit(latent(), waves(2), checkpoint=file, **shorter, **how).losses) < 12
        assert fit(latent(), waves(2), epochs=12, checkpoint=file, resume=True, **how) == expected


@pytest.mark.parametrize("held", [False, True])
def test_leaves_every_module_in_its_mode(held: bool) -> None:
    m = latent(0.3)
    m.rnn.eval()  # type: ignore[operator, union-attr]
    before = [part.training for part in m.modules()]
    assert len(set(before)) == 2
    fit(m, waves(2), epochs=2, held_out=waves(1) if held else None, progress=False)
    assert [part.training for part in m.modules()] == before


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
    with pytest.raises(TypeError, match=r"series must be a Tensor, got list; torch\.tensor\(series\) makes it one$"):
        windows([1, 2, 3], 2)  # type: ignore[arg-type]


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
        ({"held_out": (waves(1),)}, r"held_out must be series, or \(series, lengths\), got a tuple of 1"),
    ],
)
def test_bad_input(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(MarkovModel(), **{"x": waves(), "progress": False, **how})


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed: got 0, expected 1"),
    "batch size": ({"batch_size": 3}, "batch_size: got 32, expected 3"),
    "clip": ({"clip": None}, "clip: got 1.0, expected None"),
    "learning rate": ({"learning_rate": 0.5}, "lr: got 0.01, expected 0.5"),
    "optimizer": ({"optimizer": torch.optim.AdamW}, "optimizer: got torch.optim.adam.Adam, expected torch.optim.adamw"),
    "its options": (
        {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9))},
        r"betas: got \(0.9, 0.999\), expected \(0.5, 0.9\)",
    ),
    "as many rows": (
        {"x": waves(seed=1)},
        r"x: got \[12, 30\] of float32, sha256 \w{16}, expected \[12, 30\] of float32",
    ),
    "lengths": ({"lengths": torch.full((12,), 30)}, r"x: got .* with lengths, sha256 \w{16}"),
    "other held out": ({"held_out": waves(2, seed=1)}, r"held_out: got \[2, 30\] .*, expected \[2, 30\]"),
    "none held out": ({"held_out": None}, r"held_out: got \[2, 30\] of float32, sha256 \w{16}, expected none"),
    "model": (
        {"model": AutoregressiveModel(2)},
        r"parameter start: got \[1, 1\] of float32, expected \[2, 1\] of float32; parameter weight: got",
    ),
    "other names": (
        {"model": latent()},
        r"parameter log_scale: got \[1\] of float32, expected none; .*; and \d+ more differences",
    ),
    "dtype": (
        {"model": MarkovModel().double()},
        r"parameter start: got \[1, 1\] of float32, expected \[1, 1\] of float64",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_training(tmp_path: Path, name: str) -> None:
    file = tmp_path / "fit.pt"
    how: dict[str, Any] = {"model": MarkovModel(), "x": waves(), "held_out": waves(2), "progress": False}
    fit(**how, epochs=1, checkpoint=file)
    other, said = OTHERS[name]
    again = {**how, "model": MarkovModel(), **other}
    before = copy.deepcopy(again["model"].state_dict())
    with pytest.raises(ValueError, match=rf"fit\.pt is of another training \(.*{said}.*\); remove it, or ") as error:
        fit(**again, epochs=2, checkpoint=file, resume=True)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[name]) for name, v in again["model"].state_dict().items())


def test_a_checkpoint_without_held_out_resumed_with_it(tmp_path: Path) -> None:
    how: dict[str, Any] = {"x": waves(), "checkpoint": tmp_path / "fit.pt", "progress": False}
    fit(MarkovModel(), epochs=1, **how)
    with pytest.raises(ValueError, match=r"held_out: got none, expected \[2, 30\]"):
        fit(MarkovModel(), epochs=2, resume=True, held_out=waves(2), **how)


@pytest.mark.parametrize("what", ["text", "empty", "cut", "tensor", "dict", "code"])
def test_what_is_no_checkpoint(tmp_path: Path, what: str) -> None:
    file = tmp_path / "fit.pt"
    fit(MarkovModel(), waves(), epochs=1, checkpoint=file, progress=False)
    if what in ("text", "empty", "cut"):
        file.write_bytes({"text": b"hello\n", "empty": b"", "cut": file.read_bytes()[:1000]}[what])
    else:
        torch.save({"tensor": torch.zeros(2), "dict": {"model": {}}, "code": MarkovModel()}[what], file)
    with pytest.raises(
        ValueError, match=r"fit\.pt is no checkpoint of fit, or a damaged one.*; remove it, or "
    ) as error:
        fit(MarkovModel(), waves(), epochs=2, checkpoint=file, resume=True, progress=False)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("where", ["missing/fit.pt", "folder", "/proc/fit.pt", "file/fit.pt"])
def test_a_checkpoint_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    """Said before anything is trained; nothing is left behind."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    m = MarkovModel()
    before, files = copy.deepcopy(m.state_dict()), sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*: .*; give a file in a folder that ") as error:
        fit(m, waves(), epochs=1, checkpoint=tmp_path / where, progress=False)
    assert "\n" not in str(error.value) and str(tmp_path / where) in str(error.value)
    assert sorted(tmp_path.rglob("*")) == files
    assert all(torch.equal(v, before[name]) for name, v in m.state_dict().items())


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fit.pt"
    fit(MarkovModel(), waves(), epochs=1, checkpoint=file, progress=False)
    before = file.read_bytes()

    def full(found: object, to: Path) -> None:
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(MarkovModel(), waves(), epochs=2, checkpoint=file, resume=True, progress=False)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_other_models() -> None:
    with pytest.raises(TypeError, match=r"one of rnnkit.sequence's, got Linear"):
        fit(torch.nn.Linear(1, 1), waves())  # type: ignore[arg-type]
