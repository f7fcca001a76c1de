"""Programs around `layer._flat_weights` as people write them: weight dropout, low rank, quantized reference modules.

Each is made of torch.nn and, under `patch_torch`, of ours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import rnnkit

LAYERS = ("RNN", "LSTM", "GRU")
T, B, I, H = 5, 2, 3, 4
layers = pytest.mark.parametrize("name", LAYERS)


def x_of() -> Tensor:
    return torch.linspace(-1, 1, T * B * I).view(T, B, I)


class Written:
    """Each makes a layer of `place`, torch.nn or rnnkit."""

    @staticmethod
    def subclass(place: Any, name: str) -> nn.Module:
        class Halved(getattr(place, name)):  # type: ignore[misc]
            def forward(self, x: Tensor, hx: Any = None) -> Any:
                self._flat_weights = [getattr(self, n) * 0.5 for n in self._flat_weights_names]
                return super().forward(x, hx)

        return Halved(I, H)

    @staticmethod
    def put_back(place: Any, name: str) -> nn.Module:
        class Dropped(getattr(place, name)):  # type: ignore[misc]
            def forward(self, x: Tensor, hx: Any = None) -> Any:
                flat = self._flat_weights
                names = zip(self._flat_weights_names, flat, strict=True)
                self._flat_weights = [F.dropout(w, 0.5) if "weight_hh" in n else w for n, w in names]
                try:
                    return super().forward(x, hx)
                finally:
                    self._flat_weights = flat

        return Dropped(I, H)

    @staticmethod
    def wrapper(place: Any, name: str) -> nn.Module:
        class WeightDrop(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = getattr(place, name)(I, H)

            def forward(self, x: Tensor) -> Any:
                self.layer._flat_weights[1] = F.dropout(self.layer.weight_hh_l0, 0.5, self.training)
                return self.layer(x)

        return WeightDrop()

    @staticmethod
    def low_rank(place: Any, name: str) -> nn.Module:
        """What fills the list stands in `_init_flat_weights`, which torch calls when a reference is not the weight."""

        class LowRank(getattr(place, name)):  # type: ignore[misc]
            def _init_flat_weights(self) -> None:
                super()._init_flat_weights()
                if hasattr(self, "a"):
                    self._flat_weights = list(self._flat_weights)
                    self._flat_weights[1] = self.weight_hh_l0 + self.a @ self.b
                    self._flat_weight_refs = [lambda: None] * len(self._flat_weights)

        made = LowRank(I, H)
        made.a = nn.Parameter(torch.ones(made.weight_hh_l0.shape[0], 1))
        made.b = nn.Parameter(torch.ones(1, H))
        made._init_flat_weights()
        return made

    @staticmethod
    def low_rank_mixed_in(place: Any, name: str) -> nn.Module:
        """The same by a class between torch's layer and its base."""

        class LowRank(nn.RNNBase):
            def _init_flat_weights(self) -> None:
                if hasattr(self, "a"):
                    weights = [getattr(self, n) for n in self._flat_weights_names]
                    self._flat_weights = [weights[0], weights[1] + self.a @ self.b, *weights[2:]]
                    self._flat_weight_refs = [lambda: None] * len(weights)
                else:
                    super()._init_flat_weights()

        made = type("Mixed", (getattr(place, name), LowRank), {})(I, H)
        made.a = nn.Parameter(torch.ones(made.weight_hh_l0.shape[0], 1))
        made.b = nn.Parameter(torch.ones(1, H))
        made._init_flat_weights()
        return made

    @staticmethod
    def copied_forward(place: Any, name: str) -> nn.Module:
        """A forward that goes to torch's operator with the list itself."""
        operator = {"RNN": torch._VF.rnn_tanh, "LSTM": torch._VF.lstm, "GRU": torch._VF.gru}[name]

        class Own(getattr(place, name)):  # type: ignore[misc]
            def forward(self, x: Tensor, hx: Any = None) -> Any:
                self._update_flat_weights()
                h = x.new_zeros(1, x.shape[1], H)
                self.check_forward_args(x, (h, h) if name == "LSTM" else h, None)
                state = (h, h) if name == "LSTM" else h
                return operator(x, state, self._flat_weights, self.bias, 1, 0.0, self.training, False, self.batch_first)

        return Own(I, H)


PROGRAMS = ("subclass", "put_back", "wrapper", "low_rank", "low_rank_mixed_in", "copied_forward")


@pytest.fixture
def patched() -> Iterator[None]:
    with rnnkit.patch_torch():
        yield


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("program", PROGRAMS)
@layers
def test_programs_train_as_with_torch(name: str, program: str, norm: bool) -> None:
    """Three steps of training; `norm` gives another weight a parametrization, which torch answers by forgetting."""
    runs = []
    for patch in (False, True):
        with rnnkit.patch_torch() if patch else warnings.catch_warnings():
            torch.manual_seed(0)
            model = getattr(Written, program)(nn, name)
        layer = model.layer if hasattr(model, "layer") else model
        assert isinstance(layer, rnnkit.nn.base.RecurrentLayer) == patch
        if norm:
            parametrizations.weight_norm(layer, "weight_ih_l0")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = []
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = model(x_of())[0].square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        model.double()
        losses.append(model.eval()(x_of().double())[0].square().sum().detach().float())
        runs.append(torch.stack(losses))
    if not (norm and program in ("subclass", "put_back", "wrapper")):  # there torch uses nothing of what is written
        torch.testing.assert_close(runs[1], runs[0])
    assert runs[1].isfinite().all()


@pytest.mark.parametrize("program", ["low_rank", "low_rank_mixed_in"])
@layers
def test_copies_of_a_program_that_fills_the_list_itself(name: str, program: str, patched: None) -> None:
    model = getattr(Written, program)(nn, name)
    expected = model(x_of())[0]
    plain = getattr(rnnkit, name)(I, H)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k not in "ab"})
    assert not torch.allclose(plain(x_of())[0], expected)
    torch.testing.assert_close(copy.deepcopy(model)(x_of())[0], expected)
    replica = model._replicate_for_data_parallel()
    for key, parameter in model.named_parameters():
        setattr(replica, key, parameter.detach().clone())
    torch.testing.assert_close(replica(x_of())[0], expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_torchs_quantized_reference_module(name: str, patch: bool) -> None:
    import torch.ao.nn.quantized.reference as quantized

    with rnnkit.patch_torch() if patch else warnings.catch_warnings():
        torch.manual_seed(0)
        number = {"qscheme": torch.per_tensor_affine, "dtype": torch.quint8, "scale": 0.05, "zero_point": 128}
        numbers = {"is_decomposed": False, "weight_ih_l0": number, "weight_hh_l0": number}
        source = getattr(nn, name)(I, H)
        made = getattr(quantized, name).from_float(source, numbers)
        assert isinstance(source, getattr(rnnkit, name)) == patch
        x = x_of()
        expected = getattr(rnnkit.functional, name.lower())(x, None, made.get_flat_weights())[0]
        torch.testing.assert_close(made(x)[0], expected)
        torch.testing.assert_close(made.double().float()(pack_sequence([x[:, 0]]))[0].data, expected[:, 0])

        class Subclass(getattr(nn, name)):  # type: ignore[misc]
            get_flat_weights = getattr(quantized, name).get_flat_weights
            _init_weight_qparams_dict = getattr(quantized, name)._init_weight_qparams_dict

            def forward(self, x: Tensor, hx: Any = None) -> Any:
                self._flat_weights = self.get_flat_weights()
                return super().forward(x, hx)

        subclass = Subclass(I, H)
        subclass._init_weight_qparams_dict(numbers, None)
        subclass.load_state_dict(made.state_dict())
        torch.testing.assert_close(subclass(x)[0], expected)


@pytest.mark.parametrize("program", ["subclass", "wrapper"])
@layers
def test_compiled(name: str, program: str, patched: None) -> None:
    model = getattr(Written, program)(nn, name).eval()
    with torch.no_grad():
        if program == "wrapper":
            model.train()
        torch.manual_seed(0)
        expected = model(x_of())[0]
        torch._dynamo.reset()
        torch.manual_seed(0)
        output = torch.compile(model, backend="eager", fullgraph=True)(x_of())[0]
    torch.testing.assert_close(output, expected)
