"""Masks that cells draw: what a seed repeats, what training and eval make of them, and the same on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cell_loop import BACKENDS
from torch import Tensor

import rnnkit
from rnnkit import variants

DRAWN: dict[str, Any] = {
    "ZoneoutLSTM": variants.ZoneoutLSTM(zoneout_h=0.3, zoneout_c=0.6),
    "ZoneoutGRU": variants.ZoneoutGRU(zoneout_h=0.3),
    "RecurrentDropoutLSTM": variants.RecurrentDropoutLSTM,
    "RecurrentDropoutGRU": variants.RecurrentDropoutGRU,
    "CandidateDropoutLSTM": variants.CandidateDropoutLSTM,
    "CandidateDropoutGRU": variants.CandidateDropoutGRU(per_sequence=True),
}
LIKE = torch.zeros((), dtype=torch.float64)


def masks(cell: Any, training: bool, steps: int = 50) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return cell.draw(training, steps, 4, 100, LIKE)


def test_zoneout_keeps_with_its_probability_and_expects_in_eval() -> None:
    drawn = masks(DRAWN["ZoneoutLSTM"], True)
    for name, p in (("keep_h", 0.3), ("keep_c", 0.6)):
        assert drawn[name].shape == (50, 4, 100) and drawn[name].dtype == torch.float64
        assert set(drawn[name].unique().tolist()) == {0.0, 1.0}
        assert abs(drawn[name].mean() - p) < 0.02
    still = masks(DRAWN["ZoneoutLSTM"], False)
    assert {name: v.unique().tolist() for name, v in still.items()} == {"keep_h": [0.3], "keep_c": [0.6]}


@pytest.mark.parametrize("name", ["RecurrentDropoutLSTM", "CandidateDropoutLSTM", "CandidateDropoutGRU"])
def test_dropout_scales_what_it_leaves_and_drops_nothing_in_eval(name: str) -> None:
    cell = rnnkit.Custom(DRAWN[name], 1, 1).cell
    (drawn,) = masks(cell, True).values()
    assert drawn.shape == (50 if name == "CandidateDropoutLSTM" else 1, 4, 100)
    torch.testing.assert_close(drawn.unique(), torch.tensor([0, 4 / 3], dtype=torch.float64))
    assert abs((drawn == 0).double().mean() - 0.25) < 0.06
    assert (next(iter(masks(cell, False).values())) == 1).all()


@pytest.mark.parametrize("name", ["RecurrentDropoutLSTM", "RecurrentDropoutGRU"])
def test_gals_input_mask_is_one_a_sequence(name: str) -> None:
    cell = getattr(variants, name)(dropout_x=0.4)
    x = torch.ones(7, 3, 50)
    torch.manual_seed(0)
    entered = cell.enter(x, True)
    assert (entered == entered[0]).all() and len({tuple(row.tolist()) for row in entered[0]}) == 3
    torch.testing.assert_close(entered.unique(), torch.tensor([0, 1 / 0.6]))
    assert cell.enter(x, False) is x


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_repeats_the_masks_on_every_backend(name: str, backend: str) -> None:
    """Also in two layers and both directions, each of which draws its own."""
    torch.manual_seed(0)
    layers = [
        rnnkit.Custom(DRAWN[name], 4, 6, num_layers=2, bidirectional=True, backend=b) for b in ("reference", backend)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(5, 3, 4)
    results = []
    for layer in layers:
        torch.manual_seed(5)
        results.append(layer(x)[0])
    torch.testing.assert_close(results[1], results[0])
    assert not torch.equal(layers[1](x)[0], results[1])
    layers[1].eval()
    assert torch.equal(layers[1](x)[0], layers[1](x)[0])


def test_layers_and_directions_draw_their_own() -> None:
    torch.manual_seed(0)
    layer = rnnkit.Custom(variants.ZoneoutGRU(zoneout_h=0.5), 4, 6, bidirectional=True)
    with torch.no_grad():
        for name, v in layer.named_parameters():
            if name.endswith("_reverse"):
                v.copy_(getattr(layer, name.removesuffix("_reverse")))
    there, back = layer(torch.randn(1, 3, 4))[0].chunk(2, -1)  # one step: the directions differ by their masks alone
    assert not torch.equal(there, back)
    layer.eval()
    there, back = layer(torch.randn(1, 3, 4))[0].chunk(2, -1)
    torch.testing.assert_close(there, back)


@pytest.mark.parametrize(
    ("cell", "none"),
    [
        (variants.ZoneoutLSTM(zoneout_h=0, zoneout_c=0), variants.LSTM),
        (variants.ZoneoutGRU(zoneout_h=0.0), variants.GRU),
        (variants.CandidateDropoutLSTM(dropout_n=0.0), variants.LSTM),
        (variants.CandidateDropoutGRU(dropout_n=0.0), variants.GRU),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_with_probability_0_it_is_the_plain_cell(cell: rnnkit.Cell, none: type[rnnkit.Cell]) -> None:
    torch.manual_seed(0)
    masked, plain = rnnkit.Custom(cell, 4, 6), rnnkit.Custom(none, 4, 6)
    masked.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(masked(x), plain(x))


@pytest.mark.parametrize("name", ["zoneout_h", "zoneout_c"])
@pytest.mark.parametrize("p", [-0.1, 1.1, True, "0.5", float("nan")])
def test_what_is_no_probability_is_refused(name: str, p: Any) -> None:
    with pytest.raises(ValueError, match=rf"ZoneoutLSTM\({name}=...\) must be a probability, from 0 to 1, got"):
        variants.ZoneoutLSTM(**{name: p})
