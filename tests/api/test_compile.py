"""torch.compile of layers, cells and models: full graphs, eager's numbers, few compilations, T never unrolled.

A layer is one opaque operator, so what Inductor makes of the rest is its own business: most tests stop at
`aot_eager`, which runs everything that Dynamo and AOTAutograd do, and one goes through Inductor.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import some
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.fx.experimental import _config as shapes

import rnnkit
from rnnkit.backends import BY_NAME

I, H = 3, 5
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: rnnkit.RNN(I, H),
    "RNN-relu": lambda: rnnkit.RNN(I, H, nonlinearity="relu", bias=False),
    "LSTM": lambda: rnnkit.LSTM(I, H),
    "LSTM-deep": lambda: rnnkit.LSTM(I, H, 2, bidirectional=True, batch_first=True),
    "LSTM-projection": lambda: rnnkit.LSTM(I, H, proj_size=2),
    "GRU": lambda: rnnkit.GRU(I, H),
    "GRU-before": lambda: rnnkit.GRU(I, H, reset_after=False, recompute=True),
}
CELLS: dict[str, Callable[[], nn.Module]] = {
    "RNNCell": lambda: rnnkit.RNNCell(I, H),
    "LSTMCell": lambda: rnnkit.LSTMCell(I, H),
    "GRUCell": lambda: rnnkit.GRUCell(I, H),
    "GRUCell-before": lambda: rnnkit.GRUCell(I, H, reset_after=False),
}


def compilations(function: Callable[..., Any]) -> int:
    """How many compiled forms of it Dynamo holds."""
    return len(_debug_get_cache_entry_list(function))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for part in value for v in flat(part)]


def close(a: Any, b: Any) -> None:
    for u, v in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(u, v)


def gradients(outputs: Any, *inputs: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(v.square().sum() for v in flat(outputs) if v.requires_grad), inputs)


def both_ways(eager: Callable[..., Any], compiled: Any, module: nn.Module, x: Tensor, **how: Any) -> None:
    """Same results and same gradients, of the input and of every weight."""
    x = x.requires_grad_()
    expected, got = eager(x, **how), compiled(x, **how)
    close(got, expected)
    leaves = (x, *module.parameters())
    close(gradients(got, *leaves), gradients(expected, *leaves))
    with torch.no_grad():
        close(compiled(x, **how), eager(x, **how))


@pytest.mark.parametrize("make", [*LAYERS.values(), *CELLS.values()], ids=[*LAYERS, *CELLS])
def test_full_graph(make: Callable[[], nn.Module]) -> None:
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, I) if isinstance(module, nn.RNNCellBase) else torch.randn(4, 6, I)
    both_ways(module, compiled, module, x)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_full_graph_with_lengths_resets_and_all_states(make: Callable[[], nn.Module]) -> None:
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6, I)
    rows = 4 if module.batch_first else 6
    state = module(x)[1]
    how = {
        "lengths": torch.arange(rows) % 4,
        "reset": torch.rand(4, 6) < 0.3,
        "reset_state": tuple(map(torch.randn_like, state)) if isinstance(state, tuple) else torch.randn_like(state),
        "return_all_states": True,
    }
    both_ways(module, compiled, module, x, **how)


class Tagger(nn.Module):
    """A model around layers: embedding, two layers, a cell, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, I)
        self.lstm = rnnkit.LSTM(I, H, bidirectional=True, batch_first=True)
        self.gru = rnnkit.GRU(2 * H, H, batch_first=True)
        self.cell = rnnkit.GRUCell(H, H)
        self.head = nn.Linear(H, 7)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(torch.tanh(self.embed(tokens)), lengths=lengths)
        _, h = self.gru(y, lengths=lengths)
        return self.head(self.cell(h[0], h[0].relu()))


def test_a_model_through_inductor() -> None:
    model = Tagger()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for steps in (6, 9):
        tokens, lengths = torch.randint(0, 11, (3, steps)), torch.tensor([steps, 1, 4])
        expected, got = model(tokens, lengths), compiled(tokens, lengths)
        close(got, expected)
        leaves = tuple(model.parameters())
        close(gradients(got, *leaves), gradients(expected, *leaves))


def test_training_through_compile_follows_eager() -> None:
    losses = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        model = Tagger()
        run, optimizer = wrap(model), torch.optim.Adam(model.parameters(), 0.01)
        for step in range(5):
            tokens, lengths = torch.randint(0, 11, (3, 6 + step % 2)), torch.tensor([6, 1, 4])
            loss = run(tokens, lengths).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    close(losses[:5], losses[5:])


@pytest.mark.parametrize("train", [False, True], ids=["no_grad", "train"])
@pytest.mark.parametrize("make", some(LAYERS.values(), 3), ids=LAYERS)
def test_at_most_two_compilations(make: Callable[[], nn.Module], train: bool) -> None:
    """Lengths of changing values, resets, and a changing T."""
    module = make()

    def run(x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        return module(x, lengths=lengths, reset=reset)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(train):
        for steps in (6, 9, 31):
            shape = (4, steps) if module.batch_first else (steps, 4)
            for lengths in ([steps, 0, 3, 2], [1, 1, steps, 4]):
                how = (torch.randn(*shape, I), torch.tensor(lengths), torch.rand(shape) < 0.3)
                close(compiled(*how), run(*how))
    assert compilations(run) == 2  # one for the first T, one for any other


def test_a_single_step_has_a_graph_of_its_own() -> None:
    """torch.compile makes every size of 1 a constant, whatever is compiled; every other T shares a graph."""
    module = rnnkit.GRU(I, H)

    def run(x: Tensor, lengths: Tensor) -> Any:
        return module(x, lengths=lengths)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for steps, expected in ((4, 1), (6, 2), (9, 2), (1, 3), (3, 3), (1, 3)):
        how = (torch.randn(steps, 4, I), torch.tensor([steps, 1, 0, 1]))
        close(compiled(*how), run(*how))
        assert compilations(run) == expected


@pytest.mark.parametrize("train", [False, True], ids=["no_grad", "train"])
@pytest.mark.parametrize("order", some([(4, 6, 9, 1), (1, 4, 6, 9), (4, 1, 6, 9)], 3), ids=str)
def test_graphs_of_four_lengths_with_a_single_step_among_them(order: tuple[int, ...], train: bool) -> None:
    """torch.compile settles at the graph's inputs what a size is, before a layer sees them: the first is a constant,
    the second makes it a symbol of 2 or more, and 1 is a constant of its own. So by itself three graphs, but two where
    the size is marked or 1 came first; by torch's setting for backed sizes 1 is like any other."""
    module = rnnkit.GRU(I, H)

    def run(x: Tensor, lengths: Tensor) -> Any:
        return module(x, lengths=lengths)

    def graphs(mark: bool, oblivious: bool) -> int:
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(train), shapes.patch(backed_size_oblivious=oblivious):
            for steps in order:
                how = (torch.randn(steps, 4, I), torch.tensor([steps, 1, 0, 1]))
                if mark:
                    torch._dynamo.mark_dynamic(how[0], 0)
                close(compiled(*how), run(*how))
        return compilations(run)

    assert graphs(mark=False, oblivious=False) == (2 if order[0] == 1 else 3)
    assert graphs(mark=True, oblivious=False) == 2
    assert graphs(mark=False, oblivious=True) == 2
    assert graphs(mark=True, oblivious=True) == 1


def test_one_compilation_where_T_is_said_to_be_dynamic() -> None:
    module = rnnkit.GRU(I, H)

    def run(x: Tensor, lengths: Tensor) -> Any:
        return module(x, lengths=lengths)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (6, 9, 2):
        how = (torch.randn(steps, 4, I), torch.tensor([steps, 2, 1, 0]))
        close(compiled(*how), run(*how))
    assert compilations(run) == 1


@pytest.mark.parametrize("make, count", [("RNN", 1), ("LSTM", 1), ("GRU", 1), ("LSTM-deep", 4), ("LSTMCell", 1)])
def test_one_operator_for_each_layer_and_direction(make: str, count: int) -> None:
    module = {**LAYERS, **CELLS}[make]()
    found: dict[int, list[str]] = {}

    def gather(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        found[steps] = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph.forward

    for steps in (3, 30):
        torch._dynamo.reset()
        x = torch.randn(4, I) if "Cell" in make else torch.randn(steps, steps, I)
        torch.compile(module, fullgraph=True, backend=gather)(x)
    assert found[3] == found[30]
    assert sum("layer_forward" in name for name in found[3]) == count


def test_lengths_are_clamped_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a backend sees them: a kernel that loops to lengths[b] must not leave its memory."""
    module = rnnkit.GRU(I, H, bidirectional=True, backend="reference")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, h_0 = torch.randn(4, 2, I, requires_grad=True), torch.randn(2, 2, H, requires_grad=True)
    expected = module(x, h_0, lengths=torch.tensor([4, 0]))
    seen: list[list[int]] = []
    genuine = BY_NAME["reference"].forward

    def spy(cell: str, t: Any, *rest: Any, **how: Any) -> Any:
        seen.append(t.lengths.tolist())
        return genuine(cell, t, *rest, **how)

    monkeypatch.setattr(BY_NAME["reference"], "forward", spy)
    got = compiled(x, h_0, lengths=torch.tensor([99, -3]))
    assert seen == [[4, 0]] * 2
    close(got, expected)
    leaves = (x, h_0, *module.parameters())
    close(gradients(got, *leaves), gradients(expected, *leaves))


def backends_in(graph: torch.fx.GraphModule) -> list[str]:
    return [node.args[1] for node in graph.graph.nodes if "layer_forward" in str(node.target)]


class Watch:
    """A compiler that notes which backend each layer's operator was given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.seen += backends_in(graph)
        return graph.forward


def test_use_backend_around_compiled_code() -> None:
    module, x = rnnkit.GRU(I, H), torch.randn(4, 2, I)
    watch = Watch()
    compiled = torch.compile(module, fullgraph=True, backend=watch)
    with rnnkit.use_backend("reference"):
        close(compiled(x), module(x))
    assert watch.seen == ["reference"]
    with rnnkit.use_backend("torch"):  # the same code under another choice is compiled again
        close(compiled(x), module(x))
    assert watch.seen == ["reference", "torch"]
    with rnnkit.use_backend("reference"):
        compiled(x)
    assert watch.seen == ["reference", "torch"]
    with rnnkit.use_backend("cuda"), pytest.raises(Exception, match="backend 'cuda' cannot run"):
        compiled(x)


def test_use_backend_inside_compiled_code() -> None:
    module, x = rnnkit.LSTM(I, H), torch.randn(4, 2, I)
    watch = Watch()

    @torch.compile(fullgraph=True, backend=watch)
    def run(v: Tensor) -> Any:
        with rnnkit.use_backend("reference"):
            first = module(v)[0]
            with rnnkit.use_backend("torch"):
                second = module(v)[0]
            third = module(v)[0]
        return first, second, third, module(v)[0]

    close(run(x), (module(x)[0],) * 4)
    assert watch.seen[:3] == ["reference", "torch", "reference"] and len(watch.seen) == 4
    assert watch.seen[3] == rnnkit.explain(module, x).to_dict()["layers"][0]["backend"]


def test_use_backend_decorates_what_is_compiled() -> None:
    module, x = rnnkit.LSTM(I, H), torch.randn(4, 2, I)
    watch = Watch()

    @torch.compile(fullgraph=True, backend=watch)
    @rnnkit.use_backend("reference")
    def whole(v: Tensor) -> Any:
        return module(v)[0]

    close(whole(x), module(x)[0])
    assert watch.seen == ["reference"]


def test_use_backend_inside_compiled_code_comes_first() -> None:
    """In a process where no choice was ever made outside of compiled code; what is compiled later, and an eager choice
    around it, work as ever."""
    code = """if True:
        import rnnkit, torch
        layer, other, x = rnnkit.GRU(3, 4), rnnkit.LSTM(3, 4), torch.randn(2, 1, 3)
        def run(v):
            with rnnkit.use_backend("reference"):
                return layer(v)[0]
        compiled = [torch.compile(f, fullgraph=True, backend="eager") for f in (run, other, run)]
        given = [compiled[0](x), compiled[1](x)[0], compiled[2](x + 1)]
        wanted = [run(x), other(x)[0], run(x + 1)]
        for got, want in zip(given, wanted):
            torch.testing.assert_close(got, want)
        with rnnkit.use_backend("cuda"):
            try:
                compiled[1](x)
            except Exception as error:
                assert "backend 'cuda' cannot run" in str(error)
            else:
                raise SystemExit("the choice around it was not seen")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_layers_own_backend_is_kept() -> None:
    watch = Watch()
    torch.compile(rnnkit.GRU(I, H, backend="reference"), fullgraph=True, backend=watch)(torch.randn(4, 2, I))
    assert watch.seen == ["reference"]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_under_patch_torch(name: str) -> None:
    with rnnkit.patch_torch():
        module = getattr(nn, name)(I, H)
        assert isinstance(module, getattr(rnnkit, name))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, I) if "Cell" in name else torch.randn(4, 6, I)
        both_ways(module, compiled, module, x)


def test_converted_models() -> None:
    model = nn.Sequential(nn.Linear(I, I), nn.GRU(I, H))
    x = torch.randn(4, 2, I)
    expected = model(x)
    rnnkit.convert(model)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_parametrized_weights() -> None:
    module = rnnkit.GRU(I, H)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    both_ways(module, torch.compile(module, fullgraph=True, backend="aot_eager"), module, torch.randn(4, 2, I))


def test_weights_are_read_at_every_call() -> None:
    module, x = rnnkit.LSTM(I, H), torch.randn(4, 2, I)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x)
    other = rnnkit.LSTM(I, H)
    module.load_state_dict(other.state_dict())
    close(compiled(x), other(x))
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    close(compiled(x), module(x))


def test_autocast() -> None:
    for kind in (rnnkit.LSTM, rnnkit.GRU):
        torch._dynamo.reset()
        module, x = kind(I, H), torch.randn(4, 2, I)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            close(compiled(x), module(x))


def test_a_loop_over_a_cell() -> None:
    cell, xs = rnnkit.LSTMCell(I, H), torch.randn(5, 2, I)

    def unroll(v: Tensor) -> Tensor:
        state = None
        for x in v:
            state = cell(x, state)
        return state[0]

    both_ways(unroll, torch.compile(unroll, fullgraph=True, backend="aot_eager"), cell, xs)


def test_dropout_between_layers() -> None:
    module = rnnkit.LSTM(I, 64, num_layers=2, dropout=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, I)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    module.eval()
    close(compiled(x), copy.deepcopy(module)(x))


def test_mistakes_still_speak() -> None:
    compiled = torch.compile(rnnkit.GRU(I, H), backend="aot_eager")
    with pytest.raises(Exception, match=r"input\.size"):
        compiled(torch.randn(4, 2, I + 1))
    with pytest.raises(Exception, match=r"lengths must be \[B\] = \[2\]"):
        compiled(torch.randn(4, 2, I), lengths=torch.tensor([1, 2, 3]))
