"""Looking inside: gates that obey the cell's equations, gradients with a known rate, memory tasks with exact baselines,
and initialisations that do what their sources say."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkit
from rnnkit import diagnostics
from rnnkit.diagnostics import adding_problem, copy_task, gates, gradient_flow, initialise

T, B, I, H = 6, 3, 4, 5
places = pytest.mark.parametrize("place", [rnnkit, nn], ids=["rnnkit", "torch.nn"])


def data(*more: int) -> Tensor:
    return torch.randn(*(more or (T, B, I)), generator=torch.Generator().manual_seed(3))


# Gates.


@places
def test_an_lstms_gates_obey_its_equations(place: Any) -> None:
    layer = place.LSTM(I, H)
    y, (_h_n, c_n) = layer(data())
    found = gates(layer, data())
    assert list(found) == ["l0"] and list(found["l0"]) == ["i", "f", "g", "o", "c", "h"]
    i, f, g, o, c, h = found["l0"].values()
    before = torch.cat([torch.zeros(1, B, H), c[:-1]])
    assert torch.allclose(c, f * before + i * g, atol=1e-6) and torch.allclose(h, o * torch.tanh(c), atol=1e-6)
    assert torch.allclose(h, y.detach(), atol=1e-6) and torch.allclose(c[-1], c_n[0].detach(), atol=1e-6)
    assert type(layer) is place.LSTM and not h.requires_grad
    assert torch.equal(layer(data())[0], y), "the layer is as it was"


@places
def test_a_grus_gates_obey_its_equations(place: Any) -> None:
    layer = place.GRU(I, H, batch_first=True)
    hx = data(1, B, H)
    y = layer(data().transpose(0, 1), hx)[0].transpose(0, 1).detach()
    r, z, n, h = gates(layer, data().transpose(0, 1), hx)["l0"].values()
    before = torch.cat([hx, h[:-1]])
    assert torch.allclose(h, (1 - z) * n + z * before, atol=1e-6) and torch.allclose(h, y, atol=1e-6)
    assert bool(((r > 0) & (r < 1)).all())


def test_the_textbook_gru_and_projections() -> None:
    assert list(gates(rnnkit.GRU(I, H, reset_after=False), data())["l0"]) == ["r", "z", "n", "h"]
    found = gates(rnnkit.LSTM(I, H, proj_size=2), data())["l0"]
    assert found["h"].shape == (T, B, 2) and found["c"].shape == found["o"].shape == (T, B, H)


@places
def test_stacks_directions_and_models(place: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = place.GRU(I, H, 2, bidirectional=True)
            self.decoder = place.RNN(2 * H, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x)[0])[0]

    model = Model()
    found = gates(model, data())
    assert list(found) == [*(f"encoder.l{k}{d}" for k in (0, 1) for d in ("", "_reverse")), "decoder.l0"]
    second = torch.cat([found["encoder.l1"]["h"], found["encoder.l1_reverse"]["h"]], -1)
    assert torch.allclose(second, model.encoder(data())[0].detach(), atol=1e-6), "both in the order of time"
    assert list(found["decoder.l0"]) == ["h"] and type(model.encoder) is place.GRU


@places
def test_a_cell_in_a_loop(place: Any) -> None:
    cell = place.LSTMCell(I, H)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for x_t in x:
                state = self.cell(x_t, state)
            return state[0]

    found = gates(Loop(), data())
    assert list(found) == ["cell"] and found["cell"]["f"].shape == (T, B, H)
    assert list(gates(cell, data()[0])) == ["LSTMCell"]


def test_a_layer_that_runs_twice_and_options_of_a_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnnkit.GRU(H, H)

        def forward(self, x: Tensor, **how: Any) -> Tensor:
            return self.rnn(self.rnn(x, **how)[0])[0]

    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    found = gates(Twice(), data(T, B, H), lengths=torch.tensor([T, 2, 0]), reset=reset)
    assert list(found) == ["rnn.l0", "rnn.l0 (2)"]
    again = gates(Twice(), data(T, B, H))
    assert found.keys() == again.keys()


def test_the_named_backend_and_torchs_layers_come_back_after_an_error() -> None:
    layer = nn.LSTM(I, H)
    with pytest.raises(RuntimeError):
        gates(layer, data(T, B, I + 1))
    assert type(layer) is nn.LSTM
    ours = rnnkit.LSTM(I, H, backend="cpu") if not rnnkit.backends.BY_NAME["cpu"].available() else rnnkit.LSTM(I, H)
    before = ours(data())[0]
    gates(ours, data())
    assert torch.equal(ours(data())[0], before)


# Gradients.


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.3])
@places
def test_a_linear_rnns_gradient_has_the_rate_of_its_matrix(place: Any, scale: float) -> None:
    """relu in its linear part, W = scale I: ∂h_T/∂h_t is scale^(T - t), exactly."""
    layer = initialise.identity_(place.RNN(I, H, nonlinearity="relu"), scale)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(0.1)
    flow = gradient_flow(layer, data().abs())
    expected = [scale ** (T - t) * (B * H) ** 0.5 for t in range(1, T + 1)]
    assert flow.norms["l0"].tolist() == pytest.approx(expected, rel=1e-5)
    assert flow.decay["l0"] == pytest.approx(scale, rel=1e-5)
    assert layer.weight_hh_l0.grad is None


@places
def test_the_gradient_is_the_total_one(place: Any) -> None:
    """Against a loop of torch's cells, whose states keep their gradients."""
    layer, cell = place.GRU(I, H), nn.GRUCell(I, H)
    cell.load_state_dict({name.removesuffix("_l0"): v for name, v in layer.state_dict().items()})
    state, states = torch.zeros(B, H), []
    for x_t in data():
        state = cell(x_t, state)
        state.retain_grad()
        states.append(state)
    torch.stack(states).square().sum().backward()
    flow = gradient_flow(layer, data(), loss=lambda out: out[0].square().sum())
    expected = [float(s.grad.norm()) for s in states]  # type: ignore[union-attr]
    assert flow.norms["l0"].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_reset_stops_it_and_a_length_ends_it() -> None:
    reset = torch.zeros(T, 1, dtype=torch.bool)
    reset[3] = True
    norms = gradient_flow(rnnkit.LSTM(I, H), data(T, 1, I), reset=reset).norms["l0"]
    assert bool((norms[:3] == 0).all()) and bool((norms[3:] > 0).all())
    flow = gradient_flow(rnnkit.LSTM(I, H), data(T, 1, I), lengths=torch.tensor([2]))
    assert bool((flow.norms["l0"][:2] > 0).all()) and bool((flow.norms["l0"][2:] == 0).all())


def test_the_other_direction_of_time() -> None:
    layer = initialise.identity_(rnnkit.RNN(I, H, nonlinearity="relu", bidirectional=True), 0.5)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(0.1)
        layer.weight_ih_l0_reverse.fill_(0.1)
    flow = gradient_flow(layer, data().abs())
    assert flow.decay == pytest.approx({"l0": 0.5, "l0_reverse": 0.5}, rel=1e-5)
    assert flow.norms["l0"][0] < flow.norms["l0"][-1] and flow.norms["l0_reverse"][0] > flow.norms["l0_reverse"][-1]


def test_what_cannot_be_looked_at() -> None:
    for look in (gates, gradient_flow):
        with pytest.raises(ValueError, match="no recurrent layer or cell ran in this Linear"):
            look(nn.Linear(I, H), data())
    with pytest.raises(ValueError, match="must ask for one"):
        gradient_flow(rnnkit.GRU(I, H).requires_grad_(False), data())


# Pictures.


def test_pictures_name_their_axes() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install rnnkit[plots]")
    flow = gradient_flow(rnnkit.LSTM(I, H, 2), data()).plot()
    (axis,) = flow.axes
    assert axis.get_xlabel() == "step t" and axis.get_yscale() == "log" and len(axis.get_legend().get_texts()) == 2
    found = gates(rnnkit.LSTM(I, H, 2), data())
    fig = found.plot("l1", row=2, names="fc", labels=list("abcdef"))
    said = [axis.get_ylabel() for axis in fig.axes]
    assert "forget gate f\nunit" in said and "cell state c\nunit" in said
    with pytest.raises(ValueError, match="there is no layer 'l9'; there are l0, l1"):
        found.plot("l9")
    with pytest.raises(ValueError, match="l0 has no z; it has i, f, g, o, c, h"):
        found.plot(names="iz")
    rows, steps = found["l0"]["h"].shape[1::-1]
    for row in (rows, -1):
        with pytest.raises(ValueError, match=f"row must lie in 0 to {rows - 1}, the rows of the batch, got {row}"):
            found.plot(row=row)
    with pytest.raises(ValueError, match=f"labels must be {steps}, one for each step, got 1"):
        found.plot(labels=["a"])


def test_the_shapes_stand_where_help_looks() -> None:
    said = str(gates.__doc__)
    assert "[T, B, H]" in said and all(f"`{name}`" in said for name in "ifgochrzn")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install rnnkit\[plots\]"):
        gates(rnnkit.GRU(I, H), data()).plot()


# Memory tasks.


def test_the_adding_problem() -> None:
    task = adding_problem(20000, 11, generator=torch.Generator().manual_seed(0))
    numbers, marks = task.x.unbind(-1)
    assert bool((marks[:, :5].sum(1) == 1).all()) and bool((marks[:, 5:].sum(1) == 1).all())
    assert torch.allclose((numbers * marks).sum(1), task.target)
    error = float((task.target - 1).square().mean())
    assert error == pytest.approx(task.baseline(), abs=5 * 0.18 / 20000**0.5)


def test_the_copy_task() -> None:
    task = copy_task(50, 7, length=3, symbols=4, generator=torch.Generator().manual_seed(0))
    assert task.x.shape == task.target.shape == (50, 13)
    assert torch.equal(task.x[:, :3], task.target[:, -3:]) and bool((task.target[:, :-3] == 0).all())
    assert bool((task.x[:, 9] == 5).all()) and bool((task.x[:, 3:9] == 0).all()) and bool((task.x[:, 10:] == 0).all())
    assert sorted(task.x[:, :3].unique().tolist()) == [1, 2, 3, 4]
    knows_when = torch.full((13, 6), -1e9)
    knows_when[:-3, 0] = 0
    knows_when[-3:, 1:5] = 0
    loss = nn.functional.cross_entropy(knows_when.expand(50, -1, -1).reshape(-1, 6), task.target.flatten())
    assert float(loss) == pytest.approx(task.baseline(), rel=1e-6)
    assert task.baseline() == pytest.approx(3 * math.log(4) / 13)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: adding_problem(0, 5), "rows must be 1 or more, got 0"),
        (lambda: adding_problem(2, 1), "steps must be 2 or more, got 1"),
        (lambda: copy_task(2, 0), "pause must be 1 or more"),
        (lambda: copy_task(2, 5, symbols=1), "symbols must be 2 or more, got 1"),
    ],
)
def test_bad_tasks(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# Initialisation.


@places
def test_forget_bias(place: Any) -> None:
    layer = place.LSTM(I, H, 2, bidirectional=True)
    assert initialise.forget_bias_(layer, 2.0) is layer
    for name, b in layer.named_parameters():
        if name.startswith("bias"):
            forget = b[H : 2 * H].detach()
            assert bool((forget == (2.0 if name.startswith("bias_ih") else 0.0)).all())
            assert bool((b[:H] != 0).all())


def test_chrono() -> None:
    g = torch.Generator().manual_seed(0)
    lstm = initialise.chrono_(rnnkit.LSTM(I, 400), 100, generator=g)
    i, f = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().view(4, 400)[:2]
    assert torch.equal(i, -f)
    times = f.exp()  # 1 / (1 - sigmoid(b)) = 1 + e^b: the steps until it has forgotten
    assert float(times.min()) >= 1 and float(times.max()) <= 99 and float(times.mean()) == pytest.approx(50, abs=5)
    gru = initialise.chrono_(rnnkit.GRU(I, 400), 100)
    r, z = (gru.bias_ih_l0 + gru.bias_hh_l0).detach().view(3, 400)[:2]
    assert bool((r == 0).all()) and bool((z >= 0).all())


def test_orthogonal_identity_and_radius() -> None:
    layer = initialise.orthogonal_(rnnkit.GRU(I, H, 2), 0.5)
    for block in layer.weight_hh_l1.detach().split(H):
        assert torch.allclose(block @ block.T, 0.25 * torch.eye(H), atol=1e-6)
    initialise.orthogonal_(rnnkit.LSTM(I, H, proj_size=2))
    rnn = initialise.identity_(rnnkit.RNN(I, H), 0.9)
    assert torch.equal(rnn.weight_hh_l0.detach(), 0.9 * torch.eye(H)) and not rnn.bias_hh_l0.any()
    scaled = initialise.spectral_radius_(rnnkit.LSTM(I, H), 1.7)
    for block in scaled.weight_hh_l0.detach().split(H):
        assert float(torch.linalg.eigvals(block).abs().max()) == pytest.approx(1.7, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: initialise.forget_bias_(rnnkit.GRU(I, H)), TypeError, "takes LSTM layers, got GRU"),
        (lambda: initialise.forget_bias_(rnnkit.LSTM(I, H, bias=False)), ValueError, r"has none \(bias=False\)"),
        (lambda: initialise.chrono_(rnnkit.LSTM(I, H), 2), ValueError, "longest must be 3 steps or more, got 2"),
        (lambda: initialise.chrono_(nn.RNN(I, H), 9), TypeError, "takes LSTM or GRU layers, got RNN"),
        (lambda: initialise.identity_(rnnkit.LSTM(I, H)), TypeError, "takes a vanilla RNN, got LSTM"),
        (lambda: initialise.orthogonal_(nn.Linear(2, 2)), TypeError, "takes a recurrent layer, got Linear"),
        (lambda: initialise.spectral_radius_(nn.GRU(I, H), -1), ValueError, "radius must be 0 or more, got -1"),
        (lambda: initialise.spectral_radius_(nn.LSTM(I, H, proj_size=2), 1), ValueError, "no square blocks"),
    ],
)
def test_bad_initialisations(make: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_the_face_of_the_package() -> None:
    assert set(diagnostics.__all__) >= {"gates", "gradient_flow", "adding_problem", "copy_task", "initialise"}
