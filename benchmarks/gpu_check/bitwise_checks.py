"""Calls of a layer that must give the bits of a plain one: among other rows, on another stream, in a CUDA graph,
compiled, under autocast.

A kernel may be right and a call of it wrong: a graph that reads what was there when it was captured, a row that looks
at its neighbours, an operator that the compiler thinks without effect. Nothing here has a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..speed.implementations import first_line
from ..speed.timing import aside, graph
from .parity_cases import Given, Problem, Values, draw
from .reference_runs import Ready, results_of, upstream

COMPILER = "inductor"
OTHER = 99  # the seed of inputs that a graph was not captured with
KEPT = 5  # every so manieth row is looked at, the rows between are NaN
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing(got: Values, wanted: Values) -> list[str]:
    """The names whose tensors are not the same bit for bit."""
    return [name for name in wanted if name not in got or not _same(got[name], wanted[name])]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(v.detach().contiguous().view(BITS[v.itemsize]) for v in (a, b)))


class Call:
    """A layer on a device, its leaves, and gradients for its results. Every call reads the same memory."""

    def __init__(self, backend: str, problem: Problem, given: Given, device: str, dtype: torch.dtype) -> None:
        self.ready = Ready(backend, problem, given, device, dtype)
        self.run: Callable[..., Any] = self.ready.layer
        self.leaves, weights = given.to(dtype, device)
        self.weights: Values = dict(self.ready.layer.named_parameters())
        self._copy(self.weights, weights)
        self.arriving = upstream(self.forward())

    def forward(self) -> Values:
        """The results without gradients."""
        with torch.no_grad():
            return self._results()

    def both(self) -> Values:
        """The results and every gradient."""
        results, every = self._results(), {**self.leaves, **self.weights}
        found = torch.autograd.grad(
            list(results.values()), list(every.values()), self.arriving, allow_unused=True, materialize_grads=True
        )
        gradients = {f"gradient of {name}": v for name, v in zip(every, found, strict=True)}
        return {**{name: v.detach() for name, v in results.items()}, **gradients}

    def fill(self, given: Given) -> None:
        """Other values, in the same memory."""
        self._copy(self.leaves, given.leaves)
        self._copy(self.weights, given.weights)
        for mine, other in ((self.ready.lengths, given.lengths), (self.ready.extras["reset"], given.resets)):
            if mine is not None and other is not None:
                mine.copy_(other)

    def put(self, leaves: Values) -> None:
        """Other leaves, in the same memory."""
        self._copy(self.leaves, leaves)

    def _results(self) -> Values:
        arguments, extras = self.ready.arguments(self.leaves)
        return results_of(self.run(*arguments, **extras))

    @torch.no_grad()
    def _copy(self, mine: Mapping[str, Tensor], other: Values) -> None:
        for name, v in mine.items():
            v.copy_(other[name])


def complaints(backend: str, problem: Problem, given: Given, device: str) -> Iterator[str]:
    """What each kind of call gives that a plain one does not."""
    for how, check in CHECKS.items():
        if problem.stepwise and how in OUTSIDE:
            continue
        try:
            for what in check(Call(backend, problem, given, device, problem.dtype), given):
                yield f"{how}: {what} has other bits than in a plain call"
        except Exception as raised:  # compilers have errors of their own
            yield f"{how}: raised {first_line(raised)}"


def in_a_graph(call: Call, given: Given) -> list[str]:
    """Captured forward, then forward and backward; replayed with other inputs, lengths and resets."""
    found = []
    for work in (call.forward, call.both):
        call.fill(given)
        kept = _Kept(work)
        replay = graph(kept)
        call.fill(draw(call.ready.problem, OTHER))
        replay()
        found += differing(kept.results, work())
    return found


def on_another_stream(call: Call, given: Given) -> list[str]:
    """Behind work of that stream which the host does not wait for: what is launched elsewhere reads what was there."""
    halves = {name: v.detach() / 2 for name, v in call.leaves.items()}
    call.fill(Given(halves, given.weights, given.lengths, given.resets))
    wanted = call.both()
    call.fill(given)

    def work() -> Values:
        call.put(halves)
        return call.both()

    return differing(aside(work, call.leaves["x"].device), wanted)


class _Kept:
    """Work that keeps what it gave last: after a capture the tensors that a replay writes to."""

    def __init__(self, work: Callable[[], Values]) -> None:
        self.work = work
        self.results: Values = {}

    def __call__(self) -> None:
        self.results = self.work()


def compiled(call: Call, given: Given) -> list[str]:
    """By torch.compile, whole: the operator is the same, so are the bits."""
    wanted = (call.forward(), call.both())
    torch.compiler.reset()
    call.run = torch.compile(call.run, fullgraph=True, backend=COMPILER)
    return [what for work, v in zip((call.forward, call.both), wanted, strict=True) for what in differing(work(), v)]


def under_autocast(call: Call, given: Given) -> list[str]:
    """A float32 layer, whose numbers the narrow dtype holds, gives what a layer of that dtype gives."""
    problem, device = call.ready.problem, call.leaves["x"].device.type
    if device == "cpu" and not problem.kind.startswith("rnn_"):  # there torch lets the state's dtype decide
        return []
    wide = Call(call.ready.backend, problem, given, device, torch.float32)
    plain = call.both()
    with torch.autocast(device, problem.dtype):
        wide.arriving = call.arriving
        got = wide.both()
    for name, v in plain.items():  # gradients come in the dtype of what they are gradients of
        if name.startswith("gradient"):
            plain[name] = v.float()
    return differing(got, plain)


def among_others(call: Call, given: Given) -> list[str]:
    """Rows keep their results and gradients where those beside them turn into NaN."""
    keep = torch.arange(call.leaves["x"].shape[1]) % KEPT == 0
    rows = {name: v[:, keep] for name, v in call.both().items() if "_l0" not in name}
    spoilt = {name: torch.where(keep[:, None], v, torch.nan) for name, v in given.leaves.items()}
    call.fill(Given(spoilt, given.weights, given.lengths, given.resets))
    return differing({name: v[:, keep] for name, v in call.both().items() if name in rows}, rows)


CHECKS: dict[str, Callable[[Call, Given], list[str]]] = {
    "among other rows": among_others,
    "on another stream": on_another_stream,
    "in a CUDA graph": in_a_graph,
    "under autocast": under_autocast,
    "compiled": compiled,
}
OUTSIDE = ("under autocast", "compiled")  # what happens around the kernels, whatever their regime
