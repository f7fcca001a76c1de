"""Both directions of a layer at once, where there is no GPU: streams and events that keep the order of what they were
given as vector clocks, and a backend that notes on which stream it runs. What happened before what is then a fact.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import Fused, put
from torch.utils.checkpoint import checkpoint

import rnnkit
from rnnkit import backends, functional, ops
from rnnkit.layer import streams
from rnnkit.layer.autograd import LayerFunction

Clock = dict[int, int]
"""How far each stream had come, by its number."""


class Stream:
    made = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.priority = device, priority
        Stream.made += 1
        self.stream_id, self.clock = Stream.made, {}  # type: ignore[var-annotated]

    def work(self) -> Clock:
        """Something is launched on it; the moment of that."""
        self.clock[self.stream_id] = self.clock.get(self.stream_id, 0) + 1
        return dict(self.clock)

    def wait_event(self, event: Event) -> None:
        for stream, moment in event.clock.items():
            self.clock[stream] = max(moment, self.clock.get(stream, 0))


class Event:
    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


def before(a: Clock, b: Clock) -> bool:
    """Whether a is over when b begins."""
    return all(moment <= b.get(stream, 0) for stream, moment in a.items())


class Noting(Fused):
    """The reference, which notes what it does: (forward or backward, direction, moment)."""

    concurrent_directions = True

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, str, Clock]] = []
        self.refuse = ""

    def _note(self, what: str, reverse: bool) -> None:
        where = "reverse" if reverse else "forward"
        if where == self.refuse:
            raise RuntimeError("out of memory")
        self.noted.append((what, where, torch.cuda.current_stream().work()))

    def forward(self, cell: str, t: Any, o: Any, **how: Any) -> Any:
        self._note("forward", o.reverse)
        return super().forward(cell, t, o, **how)

    def backward(self, cell: str, t: Any, o: Any, *rest: Any) -> Any:
        self._note("backward", o.reverse)
        return super().backward(cell, t, o, *rest)

    def moments(self, what: str) -> tuple[Clock, Clock]:
        """Of the last layer's two directions: forward, reverse."""
        last = {where: moment for did, where, moment in self.noted if did == what}
        return last["forward"], last["reverse"]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """A make-believe GPU's current stream; autograd runs a node on the stream of its forward, as the real one does."""
    current = [Stream("gpu")]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    for name, stand_in in dict(
        Stream=Stream, Event=Event, stream=on, current_stream=lambda _=None: current[-1]
    ).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(streams, "on_gpu", lambda v: True)
    monkeypatch.setattr(streams, "_thread", streams._Thread())
    monkeypatch.setattr(streams, "_every", {})
    gradients = LayerFunction._gradients

    def backward(ctx: Any, *grads: Any) -> Any:
        with contextlib.nullcontext() if ctx.side is None else on(ctx.side.stream):
            return gradients(ctx, *grads)

    monkeypatch.setattr(LayerFunction, "_gradients", staticmethod(backward))
    yield current[0]
    assert len(current) == 1


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch, main: Stream) -> Noting:
    backend = Noting()
    put(monkeypatch, backend)
    return backend


def layer(**how: Any) -> rnnkit.LSTM:
    torch.manual_seed(0)
    return rnnkit.LSTM(3, 5, bidirectional=True, backend="triton", **how)


def x() -> torch.Tensor:
    return torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))


def test_the_directions_do_not_wait_for_one_another(main: Stream, noting: Noting) -> None:
    given = main.work()
    layer()(x())
    forward, reverse = noting.moments("forward")
    assert before(given, reverse) and before(given, forward)
    assert not before(forward, reverse) and not before(reverse, forward)
    assert forward.keys() < reverse.keys() | {main.stream_id}, "the forward one on the stream that is current"
    assert before(reverse, main.work()), "what comes after waits for both"


def test_every_layer_waits_for_the_one_below(main: Stream, noting: Noting) -> None:
    layer(num_layers=3)(x())
    assert [where for _, where, _ in noting.noted] == ["reverse", "forward"] * 3
    moments = [moment for _, _, moment in noting.noted]
    for below, above in zip((moments[:2], moments[2:4]), (moments[2:4], moments[4:])):
        assert all(before(a, b) for a in below for b in above)
    assert len(streams._thread.sides) == 1, "kept"
    (side,) = streams._thread.sides.values()
    assert side.stream.priority == -1 and side.main is main  # type: ignore[attr-defined,comparison-overlap]


def test_the_backward_is_joined_before_autograd_lets_go(main: Stream, noting: Noting) -> None:
    """What the reverse direction's backward reads is freed when its node is done; from then on `main` waits."""
    y, _ = layer()(x())
    given = main.work()
    y.sum().backward()
    forward, reverse = noting.moments("backward")
    assert [where for what, where, _ in noting.noted if what == "backward"] == ["forward", "reverse"]
    assert not before(forward, reverse) and not before(reverse, forward) and before(given, forward)
    assert before(reverse, main.work())


@pytest.mark.parametrize(
    "how", [{}, {"num_layers": 2, "dropout": 0.5}, {"proj_size": 2}, {"batch_first": True}], ids=str
)
def test_the_numbers_are_the_same(how: dict[str, Any], noting: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers() -> list[torch.Tensor]:
        module, leaf = layer(**how), x().requires_grad_()
        h_0 = torch.randn(2 * module.num_layers, leaf.shape[not module.batch_first], module.proj_size or 5)
        c_0 = torch.randn(2 * module.num_layers, leaf.shape[not module.batch_first], 5)
        lengths = torch.tensor([2, 1, 0, 2])[: h_0.shape[1]]
        y, states, every = module(leaf, (h_0, c_0), lengths=lengths, return_all_states=True)
        (y.sin().sum() + states[0].sum()).backward()
        return [y, *states, *every, leaf.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]

    at_once = numbers()
    assert [where for _, where, _ in noting.noted][:2] == ["reverse", "forward"]
    monkeypatch.setattr(noting, "concurrent_directions", False)
    noting.noted.clear()
    one_by_one = numbers()
    assert [where for _, where, _ in noting.noted][:2] == ["forward", "reverse"]
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one))


def test_a_leaf_s_gradient_is_summed_where_it_is_used(main: Stream, noting: Noting) -> None:
    """Autograd's node for a leaf belongs to the stream on which the leaf was used first."""
    leaf = x().requires_grad_()
    y, _ = layer()(leaf)
    for direction, _ in y.grad_fn.next_functions:  # of the concatenation
        assert type(direction.next_functions[0][0]).__name__ == "ViewBackward0"


def nobody(*_: Any, **__: Any) -> Any:
    raise AssertionError("a CPU has no streams")


def test_nothing_of_it_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "side_stream_of", nobody)
    monkeypatch.setattr(functional, "directions_overlap", nobody)
    backend = Noting()
    monkeypatch.setattr(Noting, "_note", lambda self, what, reverse: self.noted.append((what, reverse, {})))
    put(monkeypatch, backend)
    y, _ = layer()(x())
    y.sum().backward()
    assert [(what, reverse) for what, reverse, _ in backend.noted if what == "forward"] == [
        ("forward", False),
        ("forward", True),
    ]


def test_where_it_is_not_done(main: Stream, noting: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "side_stream_of", nobody)
    rnnkit.LSTM(3, 5, backend="triton")(x())  # one direction
    for backend in ("reference", "torch"):
        rnnkit.LSTM(3, 5, bidirectional=True, backend=backend)(x())
    module = layer()
    checkpoint(module, x().requires_grad_(), use_reentrant=False)
    torch.func.vmap(lambda v: module(v)[0])(x()[None])
    with ops.override_layer(lambda cell, t, o: backends.REFERENCE.forward(cell, t, o, train=False).outputs):
        module(x())
    with pytest.raises(AssertionError, match="no streams"):
        module(x())
    for wrong in ({"backend": "nobody"}, {"recompute": []}):
        with pytest.raises((ValueError, TypeError)):
            rnnkit.functional.lstm(x(), None, module._flat_weights, bidirectional=True, **wrong)


def test_autocast_and_inference(main: Stream, noting: Noting) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        layer()(x())
    with torch.inference_mode():
        layer()(x())
    assert [where for _, where, _ in noting.noted] == ["reverse", "forward"] * 2


def test_a_direction_that_fails_is_waited_for(main: Stream, noting: Noting) -> None:
    """What it reads may be freed by whoever catches the error."""
    noting.refuse = "forward"
    with pytest.raises(RuntimeError, match="out of memory"):
        layer()(x())
    assert before(noting.noted[0][2], main.work())
    noting.refuse = "reverse"
    with pytest.raises(RuntimeError, match="out of memory"):
        layer()(x())
    assert streams.current_side_stream() is None


def test_a_side_for_each_stream_and_thread(main: Stream, noting: Noting) -> None:
    module = layer()
    module(x())
    other = Stream("gpu")
    with torch.cuda.stream(other):  # type: ignore[arg-type]
        module(x())
    _, reverse = noting.moments("forward")
    assert not before(noting.noted[0][2], reverse) and before(reverse, other.work())
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(streams.side_stream_of(x())))
    thread.start()
    thread.join()
    sides = [*streams._thread.sides.values(), *found]
    assert len(sides) == 3 == len({id(side.stream) for side in sides})


def test_explain_keeps_the_order_of_directions(main: Stream, noting: Noting) -> None:
    found = rnnkit.explain(layer(num_layers=2), x())
    assert [where for _, where, _ in noting.noted] == ["reverse", "forward"] * 2
    order = [(choice.layer, choice.problem.reverse) for choice in found.choices]
    assert order == [(0, False), (0, True), (1, False), (1, True)]


def test_a_stream_is_of_one_side(main: Stream, noting: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hands out its streams in turn. What a side made may be taken again only behind its own main's work: one
    stream for two sides would give it to work that waits for another main."""
    pool = itertools.cycle([101, 102])

    def of_the_pool(device: Any = None, priority: int = 0) -> Stream:
        stream = Stream(device, priority)
        stream.stream_id = next(pool)
        return stream

    module, mains = layer(), [main, Stream("gpu"), Stream("gpu")]
    monkeypatch.setattr(torch.cuda, "Stream", of_the_pool)
    for current in mains:
        with torch.cuda.stream(current):  # type: ignore[arg-type]
            module(x())
    held = [side.stream.stream_id for side in streams._thread.sides.values() if side is not None]
    assert held == [101, 102], "no two sides of one stream"
    forward, reverse = noting.moments("forward")
    assert [where for _, where, _ in noting.noted[-2:]] == ["forward", "reverse"] and before(forward, reverse)
    assert reverse.keys() == {mains[2].stream_id}, "one after the other, where no stream is left"
    made = Stream.made
    with torch.cuda.stream(mains[2]):  # type: ignore[arg-type]
        module(x())
    assert Stream.made == made, "nobody looks again"


def test_a_side_s_own_stream_as_a_user_s(main: Stream, noting: Noting) -> None:
    module = layer()
    module(x())
    (side,) = streams._thread.sides.values()
    with torch.cuda.stream(side.stream):  # type: ignore[union-attr]
        module(x())
    assert [where for _, where, _ in noting.noted[-2:]] == ["forward", "reverse"]


def test_a_thread_that_has_ended_leaves_its_side(main: Stream, noting: Noting) -> None:
    """To another thread with the same main: behind the same work."""
    found: list[Any] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: found.append(streams.side_stream_of(x())))
        thread.start()
        thread.join()
    assert len({id(side) for side in found}) == 1
    assert streams.side_stream_of(x()) is found[0]
    other = Stream("gpu")
    with torch.cuda.stream(other):  # type: ignore[arg-type]
        assert streams.side_stream_of(x()) is not found[0]
