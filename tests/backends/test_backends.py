"""The table of backends: its order and names, who is chosen and why, use_backend, explain, and life without extras.

Nothing here says how fast or how exact a backend is; only that a choice is made as promised, and said.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkit
from rnnkit.backends import BACKENDS, BY_NAME, NAMES, LayerSpec, preference, record, select_backend
from rnnkit.cells import CELLS

I, H = 3, 4
PLAIN: dict[str, Any] = dict(
    cell="gru",
    device="cpu",
    dtype=torch.float32,
    steps=5,
    batch=2,
    input_size=I,
    hidden_size=H,
    proj_size=0,
    bias=True,
    lengths=False,
    reset=False,
    reset_state=False,
    reverse=False,
    all_states=False,
    recompute=False,
    train=True,
)
EXTRAS: list[dict[str, Any]] = [
    {"lengths": True},
    {"reset": True},
    {"recompute": True},
    {"cell": "gru_reset_before"},
    {"cell": "lstm", "all_states": True},
]
x = torch.linspace(-1, 1, 5 * 2 * I).view(5, 2, I)


def chosen(module: nn.Module, *inputs: Any, **how: Any) -> list[str]:
    return [choice["backend"] for choice in rnnkit.explain(module, *inputs, **how).to_dict()["layers"]]


def test_names_and_order() -> None:
    assert [backend.name for backend in BACKENDS] == ["cuda", "triton", "cpu", "torch", "reference"]
    assert NAMES == ("auto", "cuda", "triton", "cpu", "torch", "reference")
    assert {name: backend.name for name, backend in BY_NAME.items()} == {name: name for name in NAMES[1:]}


@pytest.mark.parametrize("change", [{}, {"dtype": torch.float64}, {"device": "cuda"}, {"cell": "rnn_relu"}, *EXTRAS])
def test_auto_takes_the_first_without_a_reason(change: dict[str, Any]) -> None:
    problem = LayerSpec(**{**PLAIN, **change})
    order = preference(problem)
    assert sorted(b.name for b in order) == sorted(b.name for b in BACKENDS)
    taken = select_backend("auto", problem, cache=False)
    before = order[: order.index(taken)]
    assert not taken.unsupported(problem) and all(backend.unsupported(problem) for backend in before)


@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_runs_everything(cell: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for extra in ({}, {"lengths": True, "reset": True, "recompute": True}, {"steps": 0}, {"device": "mps"}):
            assert BY_NAME["reference"].unsupported(LayerSpec(**{**PLAIN, "cell": cell, "dtype": dtype, **extra})) == []


@pytest.mark.parametrize("change", EXTRAS)
def test_torch_says_what_it_does_not_know(change: dict[str, Any]) -> None:
    problem = LayerSpec(**{**PLAIN, **change})
    reasons = BY_NAME["torch"].unsupported(problem)
    assert len(reasons) == 1 and reasons[0] == f"torch.nn's layers do not know {problem.extras[0]}"
    assert BY_NAME["torch"].unsupported(LayerSpec(**PLAIN)) == []


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("change", [{}, {"device": "cuda"}, *EXTRAS])
def test_a_named_backend_runs_or_raises_with_its_reasons(name: str, change: dict[str, Any]) -> None:
    problem = LayerSpec(**{**PLAIN, **change})
    reasons = BY_NAME[name].unsupported(problem)
    if not reasons:
        assert select_backend(name, problem, cache=False).name == name
        return
    with pytest.raises(NotImplementedError) as caught:
        select_backend(name, problem, cache=False)
    for fragment in (f"backend {name!r}", problem.cell, problem.device, *reasons, "reference", "backend='auto'"):
        assert fragment in str(caught.value)


def test_use_backend_overrides_and_nests() -> None:
    layer = rnnkit.GRU(I, H, backend="torch")
    assert chosen(layer, x) == ["torch"]
    with rnnkit.use_backend("reference"):
        assert chosen(layer, x) == ["reference"]
        with rnnkit.use_backend("torch"):
            assert chosen(layer, x) == ["torch"]
        with pytest.raises(ZeroDivisionError), rnnkit.use_backend("torch"):
            raise ZeroDivisionError
        assert chosen(layer, x) == ["reference"]
        with rnnkit.use_backend("auto"):
            assert chosen(rnnkit.GRU(I, H, backend="reference"), x) == chosen(rnnkit.GRU(I, H), x)
    assert chosen(layer, x) == ["torch"]
    again = rnnkit.use_backend("reference")
    for _ in range(2):  # the same object, one block after another
        with again:
            assert chosen(layer, x) == ["reference"]
        assert chosen(layer, x) == ["torch"]


def test_use_backend_entered_twice() -> None:
    again = rnnkit.use_backend("reference")
    with again, rnnkit.use_backend("torch"), again:
        assert chosen(rnnkit.GRU(I, H), x) == ["reference"]
    assert chosen(rnnkit.GRU(I, H, backend="torch"), x) == ["torch"]
    assert chosen(rnnkit.GRU(I, H, backend="reference"), x) == ["reference"]


def test_use_backend_as_a_decorator() -> None:
    module, x = rnnkit.GRU(3, 4), torch.zeros(2, 1, 3)

    @rnnkit.use_backend("reference")
    def asked(deep: bool) -> list[str]:
        inner = asked(False) if deep else []
        return [*inner, rnnkit.explain(module, x).to_dict()["layers"][0]["asked"]]

    assert asked(True) == ["reference", "reference"]
    assert rnnkit.explain(module, x).to_dict()["layers"][0]["asked"] == "auto"


def test_use_backend_is_one_threads_own() -> None:
    layer, seen = rnnkit.GRU(I, H, backend="torch"), {}
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with rnnkit.use_backend("reference"):
            seen["other"] = chosen(layer, x)
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    seen["main"] = chosen(layer, x)
    leave.set()
    thread.join()
    assert seen == {"other": ["reference"], "main": ["torch"]}


def test_backward_stays_with_the_forwards_backend() -> None:
    layer = rnnkit.GRU(I, H)
    with rnnkit.use_backend("reference"):
        y, _ = layer(x)
    with rnnkit.use_backend("cuda"):
        y.sum().backward()
    assert layer.weight_ih_l0.grad is not None


def test_cells_functions_and_converted_models_obey() -> None:
    weights = [p.detach() for p in rnnkit.GRU(I, H).parameters()]
    calls = [
        lambda: rnnkit.GRUCell(I, H)(x[0]),
        lambda: rnnkit.functional.gru(x, None, weights),
        lambda: rnnkit.functional.gru_cell(x[0], None, weights),
        lambda: rnnkit.ops.layer("gru", x, None, None, weights),
        lambda: rnnkit.convert(nn.LSTM(I, H, 2))(x),
    ]
    for call in calls:
        for name in ("reference", "torch"):
            with record() as met, rnnkit.use_backend(name):
                call()
            assert met and {backend for _, _, backend in met} == {name}
        with rnnkit.use_backend("cuda"), pytest.raises(NotImplementedError, match="'cuda'"):
            call()


class Model(nn.Module):
    """A layer of two directions, a cell, dropout and a buffer that a forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(I)
        self.encoder = rnnkit.LSTM(I, H, 2, bidirectional=True, dropout=0.5)
        self.cell = rnnkit.GRUCell(2 * H, H, backend="reference")

    def forward(self, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        y, _ = self.encoder(self.norm(v.flatten(0, 1)).view_as(v), lengths=lengths)
        return self.cell(nn.functional.dropout(y[-1]))


def test_explain_a_model(capfd: pytest.CaptureFixture[str]) -> None:
    model = Model()
    found = rnnkit.explain(model, x, lengths=torch.tensor([5, 3]))
    report, table = found.to_dict(), str(found)
    assert capfd.readouterr() == ("", "")
    layers = report["layers"]
    assert [(c["name"], c["problem"]["reverse"]) for c in layers] == [
        *[("encoder", False), ("encoder", True)] * 2,
        ("cell", False),
    ]
    assert layers[2]["problem"]["input_size"] == 2 * H and layers[0]["problem"]["lengths"] is True
    assert layers[4]["asked"] == layers[4]["backend"] == "reference" and layers[0]["asked"] == "auto"
    for choice in layers:
        assert {choice["backend"], *choice["reasons"]} == set(NAMES[1:])
        assert all(reasons and all(reasons) for reasons in choice["reasons"].values())
    assert layers[0]["reasons"]["torch"] == ["torch.nn's layers do not know lengths"]
    assert json.loads(json.dumps(report)) == report
    for name in NAMES[1:]:
        assert table.count(f"{name} ") >= len(layers)
    for fragment in (
        "encoder, layer 0, reverse: lstm T=5 B=2 I=3 H=4",
        "as backend='reference' asks",
        "vmap",
        report["note"],
    ):
        assert fragment in table


def test_explain_a_layer_a_cell_and_nothing() -> None:
    assert "(the module), layer 0, forward: rnn_tanh" in str(rnnkit.explain(rnnkit.RNN(I, H), x))
    assert "P=2" in str(rnnkit.explain(rnnkit.LSTM(I, H, proj_size=2), x))
    assert chosen(rnnkit.LSTMCell(I, H), x[0], (torch.zeros(2, H), torch.zeros(2, H)))
    nothing = rnnkit.explain(nn.LSTM(I, H), x)
    assert nothing.to_dict()["layers"] == [] and "rnnkit.convert(model)" in str(nothing)


def test_explain_follows_the_grad_mode_and_the_arguments() -> None:
    layer = rnnkit.GRU(I, H)
    assert rnnkit.explain(layer, x).to_dict()["layers"][0]["problem"]["train"] is True
    with torch.no_grad():
        assert rnnkit.explain(layer, x).to_dict()["layers"][0]["problem"]["train"] is False
    wide = rnnkit.explain(layer.double(), x.double(), None, reset=torch.zeros(5, 2)).to_dict()["layers"][0]["problem"]
    assert wide["dtype"] == "float64" and wide["reset"] is True and wide["reset_state"] is False


def test_explain_puts_everything_back() -> None:
    model = Model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    rnnkit.explain(model, x)
    with pytest.raises(Exception, match="Dimension out of range"):
        rnnkit.explain(model, x[0, 0])
    assert torch.equal(torch.get_rng_state(), random)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    for name, v in model.state_dict().items():
        assert torch.equal(v, state[name])
    assert all(p.grad is None for p in model.parameters())
    with record() as outer:
        rnnkit.explain(model, x)
        assert outer == []
        rnnkit.GRU(I, H)(x)  # the outer record goes on
    assert [(problem.cell, asked) for problem, asked, _ in outer] == [("gru", "auto")]


def test_a_layer_used_twice_is_explained_twice() -> None:
    layer = rnnkit.GRU(I, I)
    assert len(rnnkit.explain(nn.Sequential(First(layer), First(layer)), x).to_dict()["layers"]) == 2


class First(nn.Module):
    """Only the output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, v: Tensor) -> Tensor:
        return self.layer(v)[0]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch that was built with oneDNN")
def test_backend_torch_obeys_the_flags_of_mkldnn() -> None:
    layer = rnnkit.LSTM(I, H, backend="torch")

    def operators() -> set[str]:
        with torch.profiler.profile() as profile, torch.no_grad():
            layer(x)
        return {event.key for event in profile.key_averages()}

    with torch.backends.mkldnn.flags(enabled=True):
        assert "aten::mkldnn_rnn_layer" in operators()
        y = layer(x)[0]
    with torch.backends.mkldnn.flags(enabled=False):
        assert "aten::mkldnn_rnn_layer" not in operators()
        torch.testing.assert_close(layer(x)[0], y)


BARE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch

def refuse(path):
    raise OSError(f"{path} is blocked")

torch.ops.load_library = refuse
import rnnkit
from rnnkit.backends import BY_NAME

assert "triton" not in sys.modules and "rnnkit.kernels" not in sys.modules
assert "matplotlib" not in sys.modules and "onnx" not in sys.modules
x = torch.randn(5, 2, 3)
for layer in (rnnkit.RNN(3, 4), rnnkit.LSTM(3, 4, 2, bidirectional=True), rnnkit.GRU(3, 4, reset_after=False)):
    layer(x, lengths=torch.tensor([5, 0]), reset=torch.zeros(5, 2))[0].sum().backward()
print(BY_NAME["cpu"].available())
try:
    rnnkit.RNN(3, 4, backend="cpu")(x)
except NotImplementedError as error:
    print(error)
"""


def test_a_fresh_process_without_triton_and_without_the_extension() -> None:
    root = Path(rnnkit.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    reason, _, error = done.stdout.partition("\n")
    assert reason.strip() != "None" and reason in error and "Those that can: " in error


def test_importing_compiles_and_prints_nothing() -> None:
    root = Path(rnnkit.__file__).parents[1]
    code = "import sys, rnnkit; assert 'torch._inductor' not in sys.modules; assert 'torch._dynamo' not in sys.modules"
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
