"""convert, revert and patch_torch on other people's modules: what they hold, hook, share, train and save stays theirs.

`Stranger` at the end stands for a model that nobody wrote with this package in mind.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit

NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
TORCHS = {name: getattr(nn, name) for name in NAMES}
OURS = {name: getattr(rnnkit, name) for name in NAMES}
I, H = 3, 4


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    torch.manual_seed(0)
    allowed = torch._dynamo.config.allow_rnn
    yield
    assert {name: getattr(nn, name) for name in NAMES} == TORCHS
    assert torch._dynamo.config.allow_rnn is allowed


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for part in value for v in flat(part)]


def close(a: Any, b: Any) -> None:
    for u, v in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(u, v)


def sample(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((2, I) if "Cell" in name else (5, 2, I), dtype=dtype)


def saved(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS_TO_COPY: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_layer_there_and_back(name: str) -> None:
    module = TORCHS[name](I, H)
    before, x, parameters = module.state_dict(), sample(name), list(module.parameters())
    expected, looks = module(x), repr(module)
    assert rnnkit.convert(module) is module
    assert type(module) is OURS[name] and repr(module) == looks
    assert list(module.state_dict()) == list(before)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    close(module(x), expected)
    assert rnnkit.convert(module) is module and type(module) is OURS[name]  # twice is once
    assert rnnkit.revert(module) is module and type(module) is TORCHS[name]
    assert rnnkit.revert(module) is module
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    fresh = TORCHS[name](I, H)
    assert module.__dict__.keys() == fresh.__dict__.keys()
    close(module(x), expected)


def test_a_converted_layer_holds_no_weight_that_was_replaced() -> None:
    module = rnnkit.convert(nn.LSTM(I, H))
    old = weakref.ref(module.weight_hh_l0)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(4 * H, H))
    gc.collect()
    assert old() is None


def test_any_tree() -> None:
    shared = nn.LSTM(I, I)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(I, I), shared),
            "b": nn.ModuleList([shared, nn.ModuleDict({"deep": nn.GRU(I, H, 2, bidirectional=True)})]),
            "c": nn.RNNCell(I, H),
            "d": nn.Embedding(3, I),
        }
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rnnkit.convert(model, backend="reference")
    assert model["a"][1] is model["b"][0] is shared and type(shared) is rnnkit.LSTM
    assert type(model["b"][1]["deep"]) is rnnkit.GRU and type(model["c"]) is rnnkit.RNNCell
    assert type(model["d"]) is nn.Embedding and type(model["a"][0]) is nn.Linear
    assert shared.backend == model["c"].backend == "reference"
    assert list(model.state_dict()) == list(before)
    close(list(model.state_dict().values()), list(before.values()))
    rnnkit.revert(model)
    assert type(shared) is nn.LSTM and not hasattr(shared, "backend")


def test_mode_dtype_device_and_frozen_weights_stay() -> None:
    module = nn.GRU(I, H, 2, dropout=0.5, dtype=torch.float64).eval()
    module.weight_hh_l0.requires_grad_(False)
    x = sample("GRU", torch.float64)
    expected = module(x)
    rnnkit.convert(module)
    assert not module.training and module.weight_hh_l0.dtype == torch.float64
    assert [p.requires_grad for p in module.parameters()].count(False) == 1
    close(module(x), expected)
    module(x)[0].sum().backward()
    assert module.weight_hh_l0.grad is None and module.weight_ih_l0.grad is not None
    meta = rnnkit.convert(nn.LSTM(I, H, device="meta"))
    assert meta.weight_ih_l0.device.type == "meta" and meta(torch.zeros(5, 2, I, device="meta"))[0].shape == (5, 2, H)


def test_hooks_stay() -> None:
    module = nn.LSTM(I, H)
    seen: list[str] = []
    module.register_forward_pre_hook(lambda m, a: seen.append(f"before {type(m).__name__}"))
    handle = module.register_forward_hook(lambda m, a, y: seen.append("after"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    module.weight_hh_l0.register_hook(lambda g: seen.append("weight"))
    module.register_state_dict_post_hook(lambda m, d, p, _: seen.append("state"))
    rnnkit.convert(module)
    module(sample("LSTM").requires_grad_())[0].sum().backward()
    module.state_dict()
    assert seen[:2] == ["before LSTM", "after"] and sorted(seen[2:]) == ["backward", "state", "weight"]
    handle.remove()
    seen.clear()
    rnnkit.revert(module)(sample("LSTM"))
    assert seen == ["before LSTM"]


@pytest.mark.parametrize("way", WAYS_TO_COPY.values(), ids=WAYS_TO_COPY)
@pytest.mark.parametrize("name", NAMES)
def test_copies_of_a_converted_module(name: str, way: Callable[[Any], Any]) -> None:
    module = rnnkit.convert(nn.ModuleList([TORCHS[name](I, H)]), backend="reference")
    other = way(module)
    assert type(other[0]) is OURS[name] and other[0].backend == "reference"
    x = sample(name)
    close(other[0](x), module[0](x))
    with torch.no_grad():
        next(other[0].parameters()).zero_()
    assert not torch.equal(flat(other[0](x))[0], flat(module[0](x))[0])  # its weights are its own, and read
    plain = TORCHS[name](I, H)
    plain.load_state_dict(module[0].state_dict())
    close(rnnkit.revert(way(module))[0](x), plain(x))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "GRUCell"])
def test_parametrized_weights(name: str) -> None:
    module = TORCHS[name](I, H)
    weight = "weight_ih" if "Cell" in name else "weight_hh_l0"
    parametrizations.weight_norm(module, weight)
    x, cls, looks = sample(name), type(module), sorted(module.state_dict())
    expected = module(x)
    rnnkit.convert(module)
    assert isinstance(module, OURS[name]) and type(module).__name__ == cls.__name__
    assert sorted(module.state_dict()) == looks
    close(module(x), expected)
    with torch.no_grad():  # what it is computed from is read at every call
        getattr(module.parametrizations, weight).original0.mul_(2)
    doubled = module(x)
    assert not torch.equal(flat(doubled)[0], flat(expected)[0])
    rnnkit.revert(module)
    assert isinstance(module, TORCHS[name]) and not isinstance(module, OURS[name])
    close(module(x), doubled)
    nn.utils.parametrize.remove_parametrizations(module, weight)
    assert type(module) is TORCHS[name]


def test_removing_a_parametrization_of_a_converted_module() -> None:
    module = nn.GRU(I, H)
    parametrizations.orthogonal(module, "weight_hh_l0")
    rnnkit.convert(module)
    x = sample("GRU")
    expected = module(x)
    nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is rnnkit.GRU
    close(module(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_the_old_weight_norm() -> None:
    module = nn.GRU(I, H)
    nn.utils.weight_norm(module, "weight_hh_l0")
    x = sample("GRU")
    expected = module(x)
    rnnkit.convert(module)
    close(module(x), expected)
    with torch.no_grad():
        module.weight_hh_l0_g.mul_(2)
    doubled = module(x)
    assert not torch.equal(doubled[0], expected[0])
    nn.utils.remove_weight_norm(module, "weight_hh_l0")
    close(module(x), doubled)


class Residual(nn.LSTM):
    """A subclass of the kind that people write: an __init__ and a forward of its own."""

    def __init__(self, size: int, *, scale: float = 0.5) -> None:
        super().__init__(size, size)
        self.scale = scale

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        y, state = super().forward(x, hx)
        return x + self.scale * y, state


class Named(nn.GRUCell):
    """A subclass that only adds a method."""

    def twice(self, x: Tensor) -> Tensor:
        return self(x, self(x))


def test_subclasses_are_left_alone_and_named() -> None:
    model = nn.ModuleDict({"first": Residual(I), "second": nn.GRU(I, H)})
    with pytest.warns(UserWarning, match=r"first \(.*test_convert\.Residual\).*subclasses=True"):
        rnnkit.convert(model)
    assert type(model["first"]) is Residual and type(model["second"]) is rnnkit.GRU


def test_complex_weights_are_left_alone_and_named() -> None:
    model = nn.ModuleDict({"first": nn.LSTM(I, H, dtype=torch.cfloat), "second": nn.GRU(I, H)})
    with pytest.warns(UserWarning, match=r"left these layers torch's, since complex numbers are not supported: first$"):
        rnnkit.convert(model, subclasses=True)
    assert type(model["first"]) is nn.LSTM and type(model["second"]) is rnnkit.GRU


@pytest.mark.filterwarnings("error")
def test_subclasses_on_request() -> None:
    model = nn.ModuleDict({"a": Residual(I, scale=2.0), "b": Named(I, I)})
    x = sample("LSTM")
    expected = (model["a"](x), model["b"].twice(x[0]))
    rnnkit.convert(model, subclasses=True, backend="reference")
    a, b = model["a"], model["b"]
    for part, own, theirs, ours in ((a, Residual, nn.LSTM, rnnkit.LSTM), (b, Named, nn.GRUCell, rnnkit.GRUCell)):
        assert isinstance(part, own) and isinstance(part, theirs) and isinstance(part, ours)
        assert type(part).__name__ == own.__name__ and part.backend == "reference"
    close((a(x), b.twice(x[0])), expected)
    report = rnnkit.explain(model["a"], x).to_dict()["layers"]
    assert [choice["backend"] for choice in report] == ["reference"]  # its super() means ours
    for way in WAYS_TO_COPY.values():
        other = way(model)
        assert isinstance(other["a"], Residual) and isinstance(other["a"], rnnkit.LSTM) and other["a"].scale == 2.0
        assert other["a"].backend == "reference"
        close((other["a"](x), other["b"].twice(x[0])), expected)
    rnnkit.convert(model, subclasses=True)
    rnnkit.revert(model)
    assert type(a) is Residual and type(b) is Named
    close((a(x), b.twice(x[0])), expected)


def test_revert_raises_before_it_changes_anything() -> None:
    class Mine(rnnkit.LSTM):
        pass

    model = nn.ModuleDict({"a": rnnkit.LSTM(I, H), "b": rnnkit.GRU(I, H, reset_after=False), "c": Mine(I, H)})
    with pytest.raises(ValueError) as caught:
        rnnkit.revert(model)
    for fragment in ("changed nothing", "b: torch has no GRU with reset_after=False", "c: ", "Mine", "rnnkit.LSTM"):
        assert fragment in str(caught.value)
    assert type(model["a"]) is rnnkit.LSTM and model["b"].reset_after is False


def test_an_unknown_backend_changes_nothing() -> None:
    model = nn.Sequential(nn.GRU(I, H))
    with pytest.raises(ValueError, match="backend must be one of"):
        rnnkit.convert(model, backend="fastest")
    assert type(model[0]) is nn.GRU


def test_a_named_backend_reverted_and_converted_is_auto_again() -> None:
    module = rnnkit.convert(nn.GRU(I, H), backend="reference")
    assert rnnkit.convert(rnnkit.revert(module)).backend == "auto"


def test_our_layers_in_a_tree_keep_what_they_are() -> None:
    model = nn.ModuleList([rnnkit.GRU(I, H, reset_after=False, backend="reference"), nn.GRU(I, H)])
    rnnkit.convert(model)
    assert model[0].reset_after is False and model[0].backend == "reference" and model[1].backend == "auto"


@pytest.mark.parametrize("names", [("RNN",), ("LSTM", "GRU"), ("LSTMCell",)])
def test_revert_of_modules_that_were_born_ours(names: tuple[str, ...]) -> None:
    model = nn.ModuleList([OURS[name](I, H, backend="reference") for name in names])
    x = [sample(name) for name in names]
    expected = [m(v) for m, v in zip(model, x, strict=True)]
    rnnkit.revert(model)
    assert [type(m) for m in model] == [TORCHS[name] for name in names]
    close([m(v) for m, v in zip(model, x, strict=True)], expected)
    for m, name in zip(model, names, strict=True):
        assert m.__dict__.keys() == TORCHS[name](I, H).__dict__.keys()


class Stranger(nn.Module):
    """Embedding, packed two-layer bidirectional LSTM, attention over valid steps, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.encoder = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.query = nn.Linear(24, 1)
        self.head = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = tokens.ne(0).sum(1)
        packed = pack_padded_sequence(self.embed(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, (h, _) = self.encoder(packed)
        y, _ = pad_packed_sequence(y, batch_first=True, total_length=tokens.shape[1])
        score = self.query(y).squeeze(-1).masked_fill(tokens.eq(0), -torch.inf).softmax(-1)
        return self.head((score.unsqueeze(-1) * y).sum(1) + torch.cat([h[-2], h[-1]], -1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 50, (6, 9), generator=g)
    lengths = torch.randint(1, 10, (6, 1), generator=g)
    return tokens.masked_fill(torch.arange(9) >= lengths, 0), torch.randint(0, 5, (6,), generator=g)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)  # for dropout
        tokens, labels = batch(step)
        loss = nn.functional.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_strangers_model_in_mid_training(backend: str) -> None:
    model = Stranger()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, range(5))
    twin, twins = copy.deepcopy((model, optimizer))
    assert twins.param_groups[0]["params"][0] is next(twin.parameters())
    rnnkit.convert(model, backend=backend)
    assert type(model.encoder) is rnnkit.LSTM
    ours, theirs = train(model, optimizer, range(5, 15)), train(twin, twins, range(5, 15))
    assert ours == pytest.approx(theirs, rel=1e-4)  # ten steps of Adam on float32 gradients
    assert ours[-1] < 2 and len(set(ours)) == 10
    close(rnnkit.revert(model.eval())(batch(1)[0]), model(batch(1)[0]))


def test_patch_torch_as_a_context_manager() -> None:
    with rnnkit.patch_torch() as patch:
        assert patch is not None
        for place in (nn, nn.modules, nn.modules.rnn):
            assert {name: getattr(place, name) for name in NAMES} == OURS
        assert torch._dynamo.config.allow_rnn is True
        model = Stranger()
        assert type(model.encoder) is rnnkit.LSTM
        assert model(batch(0)[0]).shape == (6, 5)
        assert repr(nn.GRU(I, H)) == "GRU(3, 4)"
    assert nn.LSTM is TORCHS["LSTM"]
    assert type(model.encoder) is rnnkit.LSTM  # what was made inside stays
    assert type(rnnkit.revert(model).encoder) is nn.LSTM


def test_patch_torch_as_a_statement() -> None:
    patch = rnnkit.patch_torch()
    try:
        assert nn.GRU is rnnkit.GRU
    finally:
        patch.__exit__(None, None, None)


def test_patch_torch_nested_and_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), rnnkit.patch_torch():
        with rnnkit.patch_torch():
            assert nn.LSTM is rnnkit.LSTM
        assert nn.LSTM is rnnkit.LSTM and torch._dynamo.config.allow_rnn is True
        raise ZeroDivisionError
    assert nn.LSTM is TORCHS["LSTM"]


def test_patch_torch_and_allow_rnn_that_was_set() -> None:
    with torch._dynamo.config.patch(allow_rnn=True):
        with rnnkit.patch_torch():
            pass
        assert torch._dynamo.config.allow_rnn is True


@pytest.mark.parametrize("name", NAMES)
def test_pickles_across_the_patch(name: str) -> None:
    """A pickle names torch.nn.modules.rnn.LSTM; under the patch that is ours, so what is loaded is ours and works."""
    module, x = TORCHS[name](I, H), sample(name)
    expected, text = module(x), pickle.dumps(module)
    with rnnkit.patch_torch():
        loaded = pickle.loads(text)
        assert type(loaded) is OURS[name]
        close(loaded(x), expected)
        close(saved(loaded)(x), expected)
        close(copy.deepcopy(loaded)(x), expected)
        again = pickle.dumps(loaded)
    close(pickle.loads(again)(x), expected)
    assert type(pickle.loads(text)) is TORCHS[name]


def test_torchs_own_objects_work_under_the_patch() -> None:
    module, x = nn.LSTM(I, H), sample("LSTM")
    expected = module(x)
    with rnnkit.patch_torch():
        close(module(x), expected)
        assert type(rnnkit.convert(module)) is rnnkit.LSTM
        close(module(x), expected)
        rnnkit.revert(module)
    assert type(module) is TORCHS["LSTM"]
    close(module(x), expected)


def test_a_subclass_made_under_the_patch() -> None:
    with rnnkit.patch_torch():

        class Gate(nn.GRU):
            def forward(self, x: Tensor, hx: Tensor | None = None) -> Any:
                return super().forward(x.tanh(), hx)

        gate = Gate(I, H)
    assert isinstance(gate, rnnkit.GRU) and gate(sample("GRU"))[0].shape == (5, 2, H)


def test_patches_undone_in_any_order() -> None:
    first, second = rnnkit.patch_torch(), rnnkit.patch_torch()
    first.undo()
    first.undo()  # a second time it does nothing
    assert nn.LSTM is rnnkit.LSTM
    second.undo()
    assert nn.LSTM is TORCHS["LSTM"] and nn.modules.rnn.LSTM is TORCHS["LSTM"]


def test_a_converted_subclass_has_one_class() -> None:
    classes = {type(rnnkit.convert(Residual(I), subclasses=True)) for _ in range(2)}
    again = pickle.loads(pickle.dumps(rnnkit.convert(Residual(I), subclasses=True)))
    assert classes == {type(again)}


@pytest.mark.parametrize("first", ["parametrized", "converted"])
def test_a_parametrized_subclass(first: str) -> None:
    layer = Residual(I)
    x = torch.randn(5, 2, I)
    expected = layer(x)[0]
    steps = [
        lambda: nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0"),
        lambda: rnnkit.convert(layer, subclasses=True),
    ]
    for step in steps if first == "parametrized" else steps[::-1]:
        step()
    assert isinstance(layer, rnnkit.LSTM) and isinstance(layer, Residual)
    torch.testing.assert_close(layer(x)[0], expected)
    torch.testing.assert_close(copy.deepcopy(layer)(x)[0], expected)
    rnnkit.revert(layer)
    assert not isinstance(layer, rnnkit.LSTM) and isinstance(layer, Residual)
    rnnkit.convert(layer, subclasses=True)
    nn.utils.parametrize.remove_parametrizations(layer, "weight_hh_l0")
    torch.testing.assert_close(layer(x)[0], expected)
    rnnkit.revert(layer)
    assert type(layer) is Residual
    torch.testing.assert_close(layer(x)[0], expected)
