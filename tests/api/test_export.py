"""Programs that leave Python: torch.export, torch.jit.trace and script, torch.onnx with both exporters.

Plain problems must give the graph that torch's own layers give, and lengths or resets must stay correct.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import some
from torch import Tensor, nn
from torch.export import Dim

import rnnkit

I, H, B = 3, 4, 3
KINDS = ["RNN", "LSTM", "GRU"]
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning:torch.*")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Model(nn.Module):
    """A layer of two levels and directions, and a head."""

    def __init__(self, kind: str, **how: Any) -> None:
        super().__init__()
        self.layer = getattr(rnnkit, kind)(I, H, 2, bidirectional=True, **how)
        self.head = nn.Linear(2 * H, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
        return self.head(self.layer(x, lengths=lengths, reset=reset)[0])


class Plain(nn.Module):
    """The same without lengths and resets, so that TorchScript can read its forward; works with torch's layers too."""

    def __init__(self, place: Any, kind: str) -> None:
        super().__init__()
        self.layer = getattr(place, kind)(I, H, 2, bidirectional=True)
        self.head = nn.Linear(2 * H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


def problem(steps: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(steps, B, I), torch.tensor([steps, 0, 2]), torch.rand(steps, B) < 0.3


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for part in value for v in flat(part)]


def exported(model: nn.Module, strict: bool) -> torch.export.ExportedProgram:
    steps = Dim("steps", min=2)
    return torch.export.export(model, problem(6), dynamic_shapes=({0: steps}, None, {0: steps}), strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_with_dynamic_T(kind: str, strict: bool) -> None:
    model = Model(kind)
    program = exported(model, strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("rnnkit.layer_forward.default") == 4  # one for each layer and direction, whatever T is
    module = program.module()
    for steps in (6, 11, 2):
        how = problem(steps)
        torch.testing.assert_close(module(*how), model(*how))
    x, _, reset = problem(6)
    torch.testing.assert_close(module(x, torch.tensor([99, -1, 3]), reset), model(x, torch.tensor([6, 0, 3]), reset))


class Whole(nn.Module):
    """Everything that a call can be given, as inputs of a program."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(rnnkit, kind)(I, H, 2, bidirectional=True)
        self.pair = kind == "LSTM"

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor, state: Tensor) -> Any:
        again = (state, 2 * state) if self.pair else state
        return self.layer(x, again, lengths=lengths, reset=reset, reset_state=again, return_all_states=True)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_export_with_every_input_and_dynamic_T_and_B(kind: str) -> None:
    model = Whole(kind)

    def inputs(steps: int, rows: int) -> tuple[Tensor, ...]:
        lengths = torch.randint(0, steps + 1, (rows,))
        return torch.randn(steps, rows, I), lengths, torch.rand(steps, rows) < 0.3, torch.randn(4, rows, H)

    t, b = Dim("t", min=2), Dim("b", min=2, max=1024)
    program = torch.export.export(model, inputs(6, 3), dynamic_shapes=({0: t, 1: b}, {0: b}, {0: t, 1: b}, {1: b}))
    for sizes in ((6, 3), (2, 5), (11, 2)):
        how = inputs(*sizes)
        torch.testing.assert_close(program.module()(*how), model(*how))


@pytest.mark.parametrize("kind", KINDS)
def test_training_an_exported_program(kind: str) -> None:
    model = Model(kind)
    module = exported(copy.deepcopy(model), False).module()
    names = dict(model.named_parameters())
    assert dict(module.named_parameters()).keys() == names.keys()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, module)]
    for steps in (6, 9, 4):
        how = problem(steps)
        for m, optimizer in zip((model, module), optimizers, strict=True):
            optimizer.zero_grad()
            m(*how).square().sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.grad, names[name].grad)
        for optimizer in optimizers:
            optimizer.step()


LOAD = """
import sys, torch, rnnkit
program, case = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
module = program.module()
got = module(*case["inputs"])
torch.testing.assert_close(got, case["output"])
got.square().sum().backward()
for name, p in module.named_parameters():
    torch.testing.assert_close(p.grad, case["gradients"][name])
print("equal")
"""


def test_a_saved_program_runs_in_another_process(tmp_path: Path) -> None:
    model = Model("LSTM")
    torch.export.save(exported(model, False), tmp_path / "model.pt2")
    how = problem(9)  # another T than the one it was exported with
    output = model(*how)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"inputs": how, "output": output.detach(), "gradients": gradients}, tmp_path / "case.pt")
    arguments = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "case.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(rnnkit.__file__).parents[1])
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_export_of_cells(kind: str) -> None:
    cell = getattr(rnnkit, kind)(I, H)
    x = torch.randn(B, I)
    module = torch.export.export(cell, (x,), dynamic_shapes=({0: Dim("rows", min=2)},)).module()
    x = torch.randn(7, I)
    for a, b in zip(flat(module(x)), flat(cell(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_program_without_lengths_and_with_states() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnkit.GRU(I, H, reset_after=False, batch_first=True)

        def forward(self, x: Tensor, h: Tensor) -> Any:
            return self.layer(x, h, return_all_states=True)

    model = Step()
    program = torch.export.export(model, (torch.randn(B, 5, I), torch.randn(1, B, H)))
    how = (torch.randn(B, 5, I), torch.randn(1, B, H))
    for a, b in zip(program.module()(*how), model(*how), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_trace_is_torchs(kind: str) -> None:
    ours, theirs = Plain(rnnkit, kind), Plain(nn, kind)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, B, I)
    traces = [torch.jit.trace(m, x) for m in (ours, theirs)]
    operators = [sorted(node.kind() for node in t.inlined_graph.nodes()) for t in traces]
    assert operators[0] == operators[1]
    other = torch.randn(6, 2, I)
    torch.testing.assert_close(traces[0](other), theirs(other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_with_lengths_and_resets(kind: str) -> None:
    """T is as it was traced; lengths and resets are inputs, not constants."""
    model = Model(kind)
    traced = torch.jit.trace(model, problem(6))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x, _, reset = problem(6)
    for lengths in ([6, 6, 6], [0, 3, 1]):
        how = (x.requires_grad_(), torch.tensor(lengths), reset)
        torch.testing.assert_close(loaded(*how), model(*how))
        found, expected = (torch.autograd.grad(m(*how).square().sum(), x)[0] for m in (loaded, model))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loaded(x, torch.tensor([9, -1, 3]), reset), model(x, torch.tensor([6, 0, 3]), reset))


@pytest.mark.parametrize("kind", KINDS)
def test_script_save_and_load(kind: str) -> None:
    model = Plain(rnnkit, kind)
    x = torch.randn(6, B, I)
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), tuple(model.parameters()))
    with pytest.warns(UserWarning, match=rf"replaces rnnkit\.{kind} by torch\.nn\.{kind}.*rnnkit\.convert\(model\)"):
        scripted = torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    for m in (scripted, torch.jit.load(buffer)):
        torch.testing.assert_close(m(x), expected)
        found = torch.autograd.grad(m(x).square().sum(), tuple(m.parameters()))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
    # What the warning says holds: the eager model has torch's layer now, and convert puts ours back.
    assert type(model.layer) is getattr(nn, kind)
    rnnkit.convert(model)
    assert type(model.layer) is getattr(rnnkit, kind)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_script_of_cells(kind: str) -> None:
    model = nn.Sequential(getattr(rnnkit, kind)(I, H))
    x = torch.randn(B, I)
    expected = model(x)
    with pytest.warns(UserWarning, match=f"rnnkit.{kind}"):
        scripted = torch.jit.script(model)
    for a, b in zip(flat(scripted(x)), flat(expected), strict=True):
        torch.testing.assert_close(a, b)


def test_script_shares_parameters_with_the_eager_model() -> None:
    model = Plain(rnnkit, "GRU")
    before = dict(model.named_parameters())
    with pytest.warns(UserWarning, match="rnnkit.GRU"):
        torch.jit.script(model)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_script_of_what_torch_does_not_know_raises() -> None:
    for layer in (rnnkit.GRU(I, H, reset_after=False), rnnkit.GRUCell(I, H, reset_after=False)):
        with pytest.raises(NotImplementedError, match=r"reset_after=False.*torch\.jit\.trace or torch\.export"):
            torch.jit.script(nn.Sequential(layer))


def onnx_model(module: nn.Module, inputs: tuple[Tensor, ...], dynamo: bool) -> Any:
    onnx = pytest.importorskip("onnx", reason="pip install rnnkit[onnx] to run the tests of ONNX export")
    if dynamo:
        pytest.importorskip("onnxscript", reason="pip install rnnkit[onnx] to run the tests of ONNX export")
        return torch.onnx.export(module, inputs, dynamo=True, verbose=False).model_proto
    buffer = io.BytesIO()
    torch.onnx.export(module, inputs, buffer, dynamo=False)
    return onnx.load_from_string(buffer.getvalue())


def run_onnx(model: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install rnnkit[onnx] to run exported graphs")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    fed = {slot.name: v.detach().numpy() for slot, v in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(v) for v in session.run(None, fed)]


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", some(["LSTM", "RNN", "GRU", "GRUCell", "RNNCell", "LSTMCell"], 3))
def test_plain_onnx_graphs_are_torchs(kind: str, dynamo: bool) -> None:
    how = {} if "Cell" in kind else {"num_layers": 2, "bidirectional": kind != "RNN"}
    ours, theirs = getattr(rnnkit, kind)(I, H, **how).eval(), getattr(nn, kind)(I, H, **how).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(B, I) if "Cell" in kind else torch.randn(5, B, I)
    graphs = [onnx_model(m, (x,), dynamo) for m in (ours, theirs)]
    assert operators(graphs[0]) == operators(graphs[1])
    if kind in ("LSTM", "GRU"):
        assert operators(graphs[0]).count(kind) == 2
    for a, b in zip(run_onnx(graphs[0], (x,)), flat(ours(x)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_of_a_model(dynamo: bool) -> None:
    ours, theirs = Plain(rnnkit, "GRU").eval(), Plain(nn, "GRU").eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, B, I)
    graphs = [onnx_model(m, (x,), dynamo) for m in (ours, theirs)]
    assert operators(graphs[0]) == operators(graphs[1])
    torch.testing.assert_close(run_onnx(graphs[0], (x,))[0], ours(x))


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU-before"])
def test_onnx_with_lengths_and_resets(kind: str, dynamo: bool) -> None:
    """Torch has no such layer, so the graph is a chain of small operators; its values are eager's, for other inputs."""
    name, _, before = kind.partition("-")
    model = Model(name, **({"reset_after": False} if before else {})).eval()
    graph = onnx_model(model, problem(4), dynamo)
    x, _, reset = problem(4)
    for lengths in ([4, 4, 4], [0, 3, 1]):
        how = (x, torch.tensor(lengths), reset)
        torch.testing.assert_close(run_onnx(graph, how)[0], model(*how))


def test_onnx_of_a_bare_layer_with_lengths_by_name() -> None:
    model = rnnkit.GRU(I, H).eval()
    x, lengths, _ = problem(4)
    pytest.importorskip("onnx", reason="pip install rnnkit[onnx] to run the tests of ONNX export")
    buffer = io.BytesIO()
    torch.onnx.export(model, (x,), buffer, kwargs={"lengths": lengths, "return_all_states": True}, dynamo=False)
    import onnx

    graph = onnx.load_from_string(buffer.getvalue())
    how = (x, torch.tensor([1, 4, 0]))
    for a, b in zip(run_onnx(graph, how), model(x, lengths=how[1], return_all_states=True), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_left_behind() -> None:
    """After tracing, exporting and scripting in this process a layer runs on its backend as before."""
    layer, x = rnnkit.GRU(I, H), torch.randn(5, B, I)
    before = rnnkit.explain(layer, x).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(layer, x)
        torch.jit.script(nn.Sequential(layer))
        torch.export.export(layer, (x,))
    assert rnnkit.explain(layer, x).to_dict() == before
