"""A profiler of torch sees every call of a layer or a cell as `rnnkit::…`, with the shapes of its tensors, forward and
backward, whatever way the call takes; and where nobody records, a call asks one question."""

from __future__ import annotations

import copy
import ctypes
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent

import rnnkit
from rnnkit import functional, ops
from rnnkit.backends import BACKENDS, BY_NAME
from rnnkit.backends.cpu import extension
from rnnkit.layer import profiler

T, B, I, H = 4, 2, 3, 5
LAYERS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "LSTM": (rnnkit.LSTM, "lstm"),
    "GRU": (rnnkit.GRU, "gru"),
    "RNN": (rnnkit.RNN, "rnn_tanh"),
}
CELLS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "LSTMCell": (rnnkit.LSTMCell, "lstm"),
    "GRUCell": (rnnkit.GRUCell, "gru"),
    "RNNCell": (rnnkit.RNNCell, "rnn_tanh"),
}
ABLE = [
    backend.name for backend in BACKENDS if backend.name in ("cpu", "torch", "reference") and not backend.available()
]


def first(outputs: Any) -> Tensor:
    while not isinstance(outputs, Tensor):
        outputs = outputs[0]
    return outputs


def rows(run: Callable[[], Any], profile: Callable[..., Any] = torch.profiler.profile) -> list[FunctionEvent]:
    """What a profiler has recorded of rnnkit."""
    with profile(record_shapes=True) as watching:
        run()
    events = watching.events() if hasattr(watching, "events") else watching.function_events
    return [event for event in events if event.name.startswith("rnnkit::")]


def train(module: nn.Module, *inputs: Any, **how: Any) -> None:
    first(module(*inputs, **how)).sum().backward()


@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("backend", ["auto", *ABLE])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str, backend: str, batch_first: bool) -> None:
    make, cell = LAYERS[name]
    module, x = make(I, H, backend=backend, batch_first=batch_first), torch.randn(T, B, I)
    for _ in range(2):  # the first call looks for a backend, later ones remember it
        with torch.no_grad():
            (row,) = rows(lambda: module(x))
        assert row.name == f"rnnkit::{cell}"
        assert [len(module.weight_hh_l0), H] in row.input_shapes
        assert [T, B, I] in row.input_shapes or (batch_first and [B, T, I] in row.input_shapes)
        forward, backward = rows(lambda: train(module, x))
        assert (forward.name, backward.name) == (f"rnnkit::{cell}", f"rnnkit::{cell}Backward")
        assert [len(module.weight_hh_l0), H] in forward.input_shapes
        assert [T, B, I] in forward.input_shapes or (batch_first and [B, T, I] in forward.input_shapes)
        assert any(len(shape) == 3 and shape[-1] == H for shape in backward.input_shapes)


@pytest.mark.parametrize("backend", ["auto", *ABLE])
@pytest.mark.parametrize("name", CELLS)
def test_a_cell(name: str, backend: str) -> None:
    make, cell = CELLS[name]
    module, x = make(I, H, backend=backend), torch.randn(B, I)
    for _ in range(2):
        with torch.no_grad():
            (row,) = rows(lambda: module(x))
        assert row.name == f"rnnkit::{cell}" and [len(module.weight_hh), H] in row.input_shapes
        assert [row.name for row in rows(lambda: train(module, x))] == [f"rnnkit::{cell}", f"rnnkit::{cell}Backward"]


WAYS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "lengths": lambda m: {"lengths": torch.tensor([T, 1])},
    "resets": lambda m: {"reset": torch.eye(T, B)},
    "states": lambda m: {"return_all_states": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_stack_has_a_row_for_each_call_that_runs_it(way: str, backend: str) -> None:
    """One where a backend runs all of it at once, else one for each layer and direction."""
    module = rnnkit.GRU(I, H, 2, bidirectional=True, recompute=way == "resets", backend=backend)
    x, how = torch.randn(T, B, I), WAYS[way](module)
    count = 1 if backend == "auto" and BY_NAME["cpu"].stacks else 4
    with torch.no_grad():
        found = rows(lambda: module(x, **how))
    assert [row.name for row in found] == ["rnnkit::gru"] * count
    found = rows(lambda: train(module, x, **how))
    assert sorted(row.name for row in found) == ["rnnkit::gru"] * count + ["rnnkit::gruBackward"] * count


def test_the_functions_and_the_operator_below_them() -> None:
    module, x = rnnkit.LSTM(I, H), torch.randn(T, B, I)
    weights = list(module.parameters())
    with torch.no_grad():
        assert [row.name for row in rows(lambda: functional.lstm(x, None, weights))] == ["rnnkit::lstm"]
        assert [row.name for row in rows(lambda: ops.layer("lstm", x, None, None, weights))] == ["rnnkit::lstm"]
        assert [row.name for row in rows(lambda: functional.lstm_cell(x[0], None, weights))] == ["rnnkit::lstm"]


@pytest.mark.parametrize("way", ["inference_mode", "autocast", "frozen", "bfloat16", "packed", "checkpoint", "twice"])
def test_other_ways_of_a_call(way: str) -> None:
    module, x = rnnkit.LSTM(I, H), torch.randn(T, B, I)
    names = ["rnnkit::lstm"]
    if way == "inference_mode":

        @torch.inference_mode()
        def run() -> None:
            module(x)

    elif way == "autocast":

        @torch.no_grad()
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                module(x)

    elif way == "frozen":
        module.requires_grad_(False)

        def run() -> None:
            module(x)

    elif way == "bfloat16":
        module.bfloat16()

        @torch.no_grad()
        def run() -> None:
            module(x.bfloat16())

    elif way == "packed":

        @torch.no_grad()
        def run() -> None:
            module(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T, 1])))

    elif way == "checkpoint":
        names = ["rnnkit::lstm"] * 2 + ["rnnkit::lstmBackward"]

        def run() -> None:
            torch.utils.checkpoint.checkpoint(lambda v: module(v)[0], x, use_reentrant=False).sum().backward()

    else:  # the backward of the backward is torch's own, of the reference's formulas
        names = ["rnnkit::lstm", "rnnkit::lstmBackward"]

        def run() -> None:
            y = module(x)[0].square().sum()
            (g,) = torch.autograd.grad(y, module.weight_hh_l0, create_graph=True)
            g.square().sum().backward()

    found = [row.name for row in rows(run)]
    assert [name for name in dict.fromkeys(found)] == list(dict.fromkeys(names))
    assert len(found) >= len(names)


def test_transforms() -> None:
    """The reference's formulas below one row."""
    module, x = rnnkit.GRU(I, H), torch.randn(T, B, I)
    values = dict(module.named_parameters())

    def run(v: Tensor) -> Tensor:
        return torch.func.functional_call(module, values, v)[0].sum()

    assert {row.name for row in rows(lambda: torch.func.vmap(run)(torch.stack([x, x])))} == {"rnnkit::gru"}
    assert {row.name for row in rows(lambda: torch.func.jvp(run, (x,), (x,)))} == {"rnnkit::gru"}
    assert {row.name for row in rows(lambda: torch.func.grad(run)(x))} == {"rnnkit::gru"}


def test_compiled_code_has_its_operators() -> None:
    module, x = rnnkit.LSTM(I, H), torch.randn(T, B, I)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    train(compiled, x)
    found = rows(lambda: train(compiled, x))
    names = [row.name for row in found]
    assert "rnnkit::layer_forward" in names and "rnnkit::layer_backward" in names
    assert [T, B, I] in found[names.index("rnnkit::layer_forward")].input_shapes


def test_profilers_built_on_torchs_record_functions(tmp_path: Path) -> None:
    module, x = rnnkit.GRU(I, H), torch.randn(T, B, I)
    cell = rnnkit.GRUCell(I, H)

    def kineto(**how: Any) -> Any:
        return torch.autograd.profiler.profile(**how)

    def legacy(**how: Any) -> Any:
        return torch.autograd.profiler.profile(use_kineto=False, **how)

    for make in (kineto, legacy):
        with torch.no_grad():
            assert [row.name for row in rows(lambda: (module(x), cell(x[0])), make)] == ["rnnkit::gru"] * 2
        names = [row.name for row in rows(lambda: train(module, x), make)]
        assert names[:1] == ["rnnkit::gru"] and "rnnkit::gruBackward" in names

    observer = torch.profiler.ExecutionTraceObserver()  # by at::addGlobalCallback, with no profiler
    observer.register_callback(str(tmp_path / "trace.json"))
    observer.start()
    with torch.no_grad():
        module(x)
    train(module, x)
    observer.stop()
    observer.unregister_callback()
    names = [node["name"] for node in json.loads((tmp_path / "trace.json").read_text())["nodes"]]
    assert names.count("rnnkit::gru") == 2 and names.count("rnnkit::gruBackward") == 1


def test_a_profiler_of_all_threads_sees_a_call_in_another() -> None:
    module, x = rnnkit.GRU(I, H), torch.randn(T, B, I)

    @torch.no_grad()
    def run() -> None:
        module(x)

    def beside() -> None:
        other = threading.Thread(target=run)
        other.start()
        other.join()

    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=everywhere) as watching:
        beside()
    assert [event.name for event in watching.events() if "rnnkit" in event.name] == ["rnnkit::gru"]


def test_a_row_is_an_operators_and_ends_where_the_call_ends() -> None:
    """Not a user's annotation; and a call that raises closes its row."""
    module, x = rnnkit.LSTM(I, H), torch.randn(T, B, I)

    @torch.no_grad()
    def run() -> None:
        module(x)
        with pytest.raises(RuntimeError):
            module(x[..., :2])
        torch.add(x, x)

    with torch.profiler.profile() as watching:
        run()
    events = watching.events()
    ours = [event for event in events if event.name == "rnnkit::lstm"]
    assert ours and not any(event.is_user_annotation for event in ours)
    (add,) = [event for event in events if event.name == "aten::add" and event.cpu_parent is None]
    assert all(event.time_range.end <= add.time_range.start for event in ours)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_watching_changes_nothing(name: str) -> None:
    make, _ = {**LAYERS, **CELLS}[name]
    torch.manual_seed(0)
    module, x = make(I, H), torch.randn((B, I) if name in CELLS else (T, B, I))
    twin = copy.deepcopy(module)
    with torch.profiler.profile():
        with torch.no_grad():
            seen = first(module(x))
        train(module, x)
    with torch.no_grad():
        assert torch.equal(first(twin(x)), seen)
    train(twin, x)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_checkpoint_may_be_watched_in_one_half_only() -> None:
    """What a call saves does not depend on who looks."""
    module, x = rnnkit.LSTM(I, H), torch.randn(T, B, I)
    for before, after in ((torch.profiler.profile, torch.enable_grad), (torch.enable_grad, torch.profiler.profile)):
        with before():
            y = torch.utils.checkpoint.checkpoint(lambda v: module(v)[0], x, use_reentrant=False)
        with after():
            y.sum().backward()


def test_nobody_records_and_a_call_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnkit.layer import autograd, stack

    asked: list[bool] = []

    def recording() -> bool:
        asked.append(profiler.recording())
        return asked[-1]

    monkeypatch.setattr(stack, "recording", recording)
    monkeypatch.setattr(autograd, "recording", recording)
    module, x = rnnkit.LSTM(I, H), torch.randn(T, B, I)
    with torch.no_grad():
        module(x)
        assert asked == [False]
    train(module, x)  # autograd's function has its row by its name
    assert asked == [False]


def test_the_question_is_torchs_own() -> None:
    """at::hasCallbacks, by the extension where it is built and by ctypes where not, which agree."""
    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    by_ctypes = ctypes.PyDLL(str(library))._ZN2at12hasCallbacksEv
    by_ctypes.restype = ctypes.c_bool
    assert profiler.recording is not torch._C._autograd._profiler_enabled
    assert profiler.recording() is by_ctypes() is False
    with torch.profiler.profile():
        assert profiler.recording() is by_ctypes() is True
    assert profiler.recording() is by_ctypes() is False


@pytest.mark.skipif(sys.platform != "linux", reason="by /proc/self/maps")
def test_a_library_that_is_not_loaded_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another copy of torch's would have flags, and observers, of its own."""
    copied = tmp_path / "lib" / "libtorch_cpu.so"
    copied.parent.mkdir()
    shutil.copy(torch._C.__file__, copied)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    assert profiler._any_callbacks() is torch._C._autograd._profiler_enabled
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not hasattr(extension.native, "recording"), reason="the extension is not built")
def test_the_extension_asks() -> None:
    assert profiler.recording is extension.native.recording
    with pytest.raises(ValueError, match="must not be 0"):
        extension.native.bind_recording(0)
    assert profiler.recording() is False
