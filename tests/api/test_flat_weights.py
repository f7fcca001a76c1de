"""Programs that read and write `layer._flat_weights`: what torch.nn's layer of the same program computes, or better.

What is written is used by the calls that follow, until that weight is next set, loaded or moved.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkit

LAYERS = ("RNN", "LSTM", "GRU")
T, B, I, H = 5, 2, 3, 4
layers = pytest.mark.parametrize("name", LAYERS)


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """torch.nn's layer and ours with the same weights."""
    theirs, ours = (getattr(place, name)(I, H, *args, **kwargs) for place in (nn, rnnkit))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def x_of() -> Tensor:
    return torch.linspace(-1, 1, T * B * I).view(T, B, I)


def halved(layer: Any, name: str = "weight_hh_l0") -> Tensor:
    return getattr(layer, name) * 0.5


def item(layer: Any) -> None:
    layer._flat_weights[1] = halved(layer)


def held_list(layer: Any) -> None:
    weights = layer._flat_weights
    assert layer._flat_weights is weights
    weights[1] = halved(layer)


def two_lists(layer: Any) -> None:
    one, other = layer._flat_weights, layer._flat_weights
    one[1] = halved(layer)
    other[0] = halved(layer, "weight_ih_l0")


def sliced(layer: Any) -> None:
    layer._flat_weights[:2] = [halved(layer, "weight_ih_l0"), halved(layer)]


def whole(layer: Any) -> None:
    layer._flat_weights = [w * 0.5 for w in layer._flat_weights]


def whole_then_item(layer: Any) -> None:
    weights = list(layer._flat_weights)
    layer._flat_weights = weights
    weights[1] = halved(layer)


def as_tuple(layer: Any) -> None:
    layer._flat_weights = tuple(w * 0.5 for w in layer._flat_weights)


def popped(layer: Any) -> None:
    weight = layer._flat_weights.pop(1)
    layer._flat_weights.insert(1, weight * 0.5)


def cleared(layer: Any) -> None:
    made = [halved(layer, name) for name in layer._flat_weights_names]
    layer._flat_weights.clear()
    layer._flat_weights.extend(made[:2])
    for weight in made[2:]:
        layer._flat_weights.append(weight)


def deleted(layer: Any) -> None:
    """What WeightDrop does: the layer is left with the raw weight under another name."""
    raw = layer.weight_hh_l0
    del layer.weight_hh_l0
    layer.register_parameter("weight_hh_l0_raw", raw)
    layer._flat_weights[1] = raw * 0.5


WRITES = (item, held_list, two_lists, sliced, whole, whole_then_item, as_tuple, popped, cleared, deleted)


def gradients(layer: nn.Module, output: Tensor) -> dict[str, Tensor | None]:
    layer.zero_grad()
    output.sin().sum().backward()
    return {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("write", WRITES)
@layers
def test_what_is_written_is_used(name: str, write: Callable[[Any], None]) -> None:
    theirs, ours = pair(name)
    before = ours(x_of())[0]
    for layer in (theirs, ours):
        write(layer)
    expected, output = theirs(x_of())[0], ours(x_of())[0]
    assert not torch.allclose(output, before)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ours(x_of())[0], expected)  # the next call too
    torch.testing.assert_close(gradients(ours, output), gradients(theirs, expected))


@pytest.mark.parametrize("kind", ["packed", "lengths", "unbatched", "stacked"])
@layers
def test_by_every_way_of_calling(name: str, kind: str) -> None:
    theirs, ours = pair(name, 2, bidirectional=True) if kind == "stacked" else pair(name)
    for layer in (theirs, ours):
        layer._flat_weights[1] = halved(layer)
    x = x_of()
    packed = pack_padded_sequence(x, [T, 3])
    if kind == "packed":
        torch.testing.assert_close(ours(packed)[0].data, theirs(packed)[0].data)
    elif kind == "lengths":
        expected = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0])[0]
        torch.testing.assert_close(ours(x, lengths=torch.tensor([T, 3]))[0], expected)
    else:
        x = x[:, 0] if kind == "unbatched" else x
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def set_parameter(layer: Any) -> None:
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)


def registered(layer: Any) -> None:
    layer.register_parameter("weight_hh_l0", nn.Parameter(layer.weight_hh_l0.detach() * 2))


def loaded(layer: Any) -> None:
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})


def assigned(layer: Any) -> None:
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}, assign=True)


def moved(layer: Any) -> None:
    layer.double().float()


def pruned(layer: Any) -> None:
    prune.random_unstructured(layer, "weight_hh_l0", 0.0)


def called_functionally(layer: Any) -> None:
    weights = {name: p.detach() * 2 for name, p in layer.named_parameters()}
    torch.func.functional_call(layer, weights, (x_of(),))


def computed_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)


def set_data(layer: Any) -> None:
    layer.weight_hh_l0.data = layer.weight_hh_l0.data * 2


def flattened(layer: Any) -> None:
    layer.flatten_parameters()


def put_in_mode(layer: Any) -> None:
    layer.eval().train().requires_grad_(True)


AFTER = (
    set_parameter,
    registered,
    loaded,
    assigned,
    moved,
    pruned,
    called_functionally,
    computed_in_place,
    set_data,
    flattened,
    put_in_mode,
)


ONE = (set_parameter, registered, pruned)  # where one weight is set, torch forgets all writes: see the next test


@pytest.mark.parametrize(
    ("write", "after"), [(w, a) for w in (item, whole) for a in AFTER if w is item or a not in ONE]
)
@layers
def test_until_that_weight_is_set_loaded_or_moved(name: str, after: Any, write: Any) -> None:
    theirs, ours = pair(name)
    for layer in (theirs, ours):
        write(layer)
        torch.manual_seed(0)
        after(layer)
    torch.testing.assert_close(ours(x_of())[0], theirs(x_of())[0])


class Unchanged(nn.Module):
    """A parametrization whose weight may be set."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    right_inverse = forward


@pytest.mark.parametrize("computed", [False, True])
@layers
def test_what_is_written_after_the_weight_was_set_is_used(name: str, computed: bool) -> None:
    """By the list that was there before. torch.nn forgets this write too."""
    layer = getattr(rnnkit, name)(I, H)
    expected = copy.deepcopy(layer)
    if computed:
        nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", Unchanged())
    held, value = layer._flat_weights, torch.randn_like(layer.weight_hh_l0)
    layer.weight_hh_l0 = value if computed else nn.Parameter(value)
    held[1] = value * 0.5
    with torch.no_grad():
        expected.weight_hh_l0.copy_(held[1])
    assert torch.equal(layer(x_of())[0], expected(x_of())[0])


@layers
def test_another_weight_that_is_set_forgets_nothing(name: str) -> None:
    """torch.nn forgets every write then, without a word."""
    layer = getattr(rnnkit, name)(I, H)
    expected = copy.deepcopy(layer)
    layer._flat_weights[1] = layer.weight_hh_l0.detach() * 0.5
    for target in (layer, expected):
        torch.manual_seed(0)
        target.bias_ih_l0 = nn.Parameter(torch.randn_like(target.bias_ih_l0))
    with torch.no_grad():
        expected.weight_hh_l0.mul_(0.5)
    assert torch.equal(layer(x_of())[0], expected(x_of())[0])


@layers
def test_without_a_write_weights_are_read_at_every_call(name: str) -> None:
    """Also where the list has been read, and is still held."""
    theirs, ours = pair(name)
    held = ours._flat_weights
    for after in (set_parameter, loaded, assigned, moved, called_functionally, computed_in_place, set_data, pruned):
        for layer in (theirs, ours):
            torch.manual_seed(0)
            after(layer)
        torch.testing.assert_close(ours(x_of())[0], theirs(x_of())[0])
        assert all(getattr(ours, n) is w for n, w in zip(ours._flat_weights_names, ours._flat_weights, strict=True))
    assert len(held) == 4


@layers
def test_a_replica_has_weights_of_its_own(name: str) -> None:
    """As torch.nn.DataParallel makes them: a write goes with none."""
    layer = getattr(rnnkit, name)(I, H)
    expected = layer(x_of())[0]
    layer._flat_weights[1] = halved(layer)
    written = layer(x_of())[0]
    replica = layer._replicate_for_data_parallel()
    for key, parameter in layer.named_parameters():
        setattr(replica, key, parameter.detach().clone())
    assert torch.equal(replica(x_of())[0], expected)
    assert torch.equal(layer(x_of())[0], written)


@layers
def test_what_is_written_for_a_computed_weight_serves_one_call(name: str) -> None:
    layer = getattr(rnnkit, name)(I, H)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    plain = getattr(rnnkit, name)(I, H)
    state = {n: getattr(layer, n).detach() for n in layer._flat_weights_names}
    plain.load_state_dict({**state, "weight_hh_l0": state["weight_hh_l0"] * 0.5})
    expected = plain(x_of())[0]
    plain.load_state_dict(state)
    unwritten = plain(x_of())[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # written before each call, as programs do
            layer._flat_weights[1] = halved(layer)
            torch.testing.assert_close(layer(x_of())[0], expected)
    with pytest.warns(UserWarning, match="computes weight_hh_l0 at every call"):
        torch.testing.assert_close(layer(x_of())[0], unwritten)


def short(layer: Any) -> None:
    layer._flat_weights = layer._flat_weights[:2]


def long(layer: Any) -> None:
    layer._flat_weights.append(layer.weight_hh_l0)


def none(layer: Any) -> None:
    layer._flat_weights[1] = None


def not_a_tensor(layer: Any) -> None:
    layer._flat_weights[1] = [1.0]


@pytest.mark.parametrize("write", [short, long, none, not_a_tensor])
@layers
def test_what_cannot_be_used_raises(name: str, write: Callable[[Any], None]) -> None:
    theirs, ours = pair(name)
    for layer in (theirs, ours):
        write(layer)
    with pytest.raises(Exception) as expected:
        theirs(x_of())
    with pytest.raises(type(expected.value)):
        ours(x_of())
    ours.weight_hh_l0 = nn.Parameter(ours.weight_hh_l0.detach())


@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle", "save"])
@layers
def test_copies_begin_without(name: str, way: str) -> None:
    """As in torch, whose copies forget what was written at their first call."""
    theirs, ours = pair(name)
    outputs = []
    for layer in (theirs, ours):
        layer._flat_weights[1] = halved(layer).detach()
        if way == "copy":
            made = copy.copy(layer)
        elif way == "deepcopy":
            made = copy.deepcopy(layer)
        elif way == "pickle":
            made = pickle.loads(pickle.dumps(layer))
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            made = torch.load(file, weights_only=False)
        outputs.append((made(x_of())[0], layer(x_of())[0]))
    torch.testing.assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("direction", ["convert", "revert"])
@layers
def test_conversion_keeps_what_is_written(name: str, direction: str) -> None:
    theirs, ours = pair(name)
    layer = theirs if direction == "convert" else ours
    layer._flat_weights[1] = halved(layer).detach()
    expected = layer(x_of())[0]
    getattr(rnnkit, direction)(layer)
    torch.testing.assert_close(layer(x_of())[0], expected)
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach())
    other = rnnkit.convert(layer) if direction == "convert" else layer
    assert not torch.allclose(other(x_of())[0], expected)


def test_nobody_pays_for_a_list_that_nobody_asked_for() -> None:
    layer = rnnkit.LSTM(I, H)
    layer(x_of())
    layer.double().float()
    layer.flatten_parameters()
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach())
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    assert layer._weight_list is None
