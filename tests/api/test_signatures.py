"""The six classes show their parameters to whoever asks: `inspect.signature`, `skip_init`, documentation, editors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import rnnkit

I, H = 3, 4
HEAD = "input_size hidden_size num_layers"
TAIL = "bias batch_first dropout bidirectional proj_size device dtype"
POSITIONAL = {  # as torch.nn takes them: its layers hand what comes after num_layers to RNNBase
    "RNN": f"{HEAD} nonlinearity {TAIL}",
    "LSTM": f"{HEAD} {TAIL}",
    "GRU": f"{HEAD} {TAIL}",
    "RNNCell": "input_size hidden_size bias nonlinearity device dtype",
    "LSTMCell": "input_size hidden_size bias device dtype",
    "GRUCell": "input_size hidden_size bias device dtype",
}
KEYWORDS = {
    "RNN": "backend recompute heads",
    "LSTM": "backend recompute heads",
    "GRU": "reset_after backend recompute heads",
    "RNNCell": "backend",
    "LSTMCell": "backend",
    "GRUCell": "reset_after backend",
}
VALUES: dict[str, Any] = {
    "input_size": I,
    "hidden_size": H,
    "num_layers": 2,
    "nonlinearity": "relu",
    "bias": False,
    "batch_first": True,
    "dropout": 0.5,
    "bidirectional": True,
    "proj_size": 0,
    "device": "cpu",
    "dtype": torch.float64,
}
names = pytest.mark.parametrize("name", POSITIONAL)


@names
def test_the_signature_is_real(name: str) -> None:
    cls = getattr(rnnkit, name)
    shown = list(inspect.signature(cls).parameters.values())
    assert shown == list(inspect.signature(cls.__init__).parameters.values())[1:]
    kinds = inspect.Parameter
    assert [p.name for p in shown if p.kind is kinds.POSITIONAL_OR_KEYWORD] == POSITIONAL[name].split()
    assert [p.name for p in shown if p.kind is kinds.KEYWORD_ONLY] == KEYWORDS[name].split()
    assert len(shown) == len(POSITIONAL[name].split()) + len(KEYWORDS[name].split())
    assert all(p.annotation is not kinds.empty for p in shown)


@names
def test_defaults_are_torchs(name: str) -> None:
    """A layer that is given every default is the layer that is given none."""
    shown = inspect.signature(getattr(rnnkit, name)).parameters
    defaults = {key: shown[key].default for key in POSITIONAL[name].split()[2:]}
    if name in ("RNN", "GRU"):
        assert defaults.pop("proj_size") == 0  # which torch refuses by name
    with_defaults, without = getattr(nn, name)(I, H, **defaults), getattr(nn, name)(I, H)
    assert repr(with_defaults) == repr(without)
    assert {k: v.dtype for k, v in with_defaults.state_dict().items()} == {
        k: v.dtype for k, v in without.state_dict().items()
    }


@names
def test_every_number_of_positional_arguments(name: str) -> None:
    values = [VALUES[key] for key in POSITIONAL[name].split()]
    for count in range(2, len(values) + 1):
        ours, theirs = (getattr(place, name)(*values[:count]) for place in (rnnkit, nn))
        inspect.signature(getattr(rnnkit, name)).bind(*values[:count])
        assert repr(ours) == repr(theirs)
        assert ours.weight_ih_l0.dtype == theirs.weight_ih_l0.dtype if "Cell" not in name else True


@names
def test_every_argument_by_name(name: str) -> None:
    given = {key: VALUES[key] for key in POSITIONAL[name].split()}
    if name in ("RNN", "GRU"):
        del given["proj_size"]
    ours, theirs = (getattr(place, name)(**given) for place in (rnnkit, nn))
    assert repr(ours) == repr(theirs)
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", ["LSTM", "RNN"])
def test_an_argument_of_another_layer_is_refused_by_the_class(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'reset_after'$"):
        getattr(rnnkit, name)(I, H, reset_after=False)


@names
def test_skip_init(name: str) -> None:
    cls = getattr(rnnkit, name)
    before = torch.get_rng_state()
    made = nn.utils.skip_init(cls, I, H, backend="reference", dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    assert made.backend == "reference"
    assert {p.device.type for p in made.parameters()} == {"cpu"}
    made.load_state_dict(getattr(nn, name)(I, H).state_dict())
    made(torch.zeros(2, 5, I, dtype=torch.float64)[slice(None) if "Cell" not in name else 0])
    assert next(nn.utils.skip_init(cls, I, H, device="meta").parameters()).is_meta


@names
def test_a_subclass_may_pass_on_what_it_is_given(name: str) -> None:
    class Sub(getattr(rnnkit, name)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert repr(Sub(I, hidden_size=H, bias=False))[3:] == repr(getattr(nn, name)(I, H, bias=False))[len(name) :]
    with pytest.raises(TypeError, match="hidden_size"):
        Sub(I)
