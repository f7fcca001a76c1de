"""Every backend on a device against float64: outputs, states and every gradient, of every cell, dtype and extra.

It stands here and not among the tests, since it has to run where there is a GPU and maybe neither pytest nor
hypothesis; it needs torch alone. The budget is the project's (gate.py): at most twice the error that torch.nn makes
at that dtype on that device, and a rounding band. What torch.nn does not know by itself it is helped to: every piece
between two resets becomes a row of its own. Where it has no such problem (a GRU that resets before the product, all
cell states), the reference serves, called step by step, so that its state is rounded at each step. The truth is the
same way in float64 on the CPU, where the tests have it. New memory is filled with NaN, and so is the padding.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit
from rnnkit import ops
from rnnkit.backends import BACKENDS, NAMES, record

from .gate import band, error
from .problems import KINDS, Given, Problem, Values, build, draw
from .sides import first_line

# Three ways to run it. Each takes leaves and weights and gives y [T, B, D·N], h_n, c_n [L·D, B, ·], and all states.

Way = Callable[[Problem, Given, Values, Values], Values]


def named(backend: str) -> Way:
    """rnnkit's layer by a backend, with NaN in the padding."""

    def run(problem: Problem, given: Given, leaves: Values, weights: Values) -> Values:
        variant, x = problem.variant, leaves["x"]
        layer = build(problem, rnnkit, backend=backend, recompute=variant.recompute, device=x.device, dtype=x.dtype)
        lengths = None if given.lengths is None else given.lengths.to(x.device)
        resets = None if given.resets is None else given.resets.to(x.device)
        if lengths is not None:
            beyond = torch.arange(x.shape[0], device=x.device)[:, None, None] >= lengths[:, None]
            x = torch.where(beyond, torch.nan, x)
        extras = dict(lengths=lengths, reset=resets, reset_state=_states(leaves, "r"))
        extras["return_all_states"] = variant.all_states
        y, *states = torch.func.functional_call(layer, weights, (x, _states(leaves, "0")), extras)
        results = {"y": y}
        for suffix, state in zip(("n", "all"), states, strict=False):
            parts = state if isinstance(state, tuple) else (state,)
            results.update({f"{name}_{suffix}": v for name, v in zip("hc", parts, strict=False)})
        return results

    return run


def _states(leaves: Values, suffix: str) -> Any:
    parts = [v for name, v in leaves.items() if name.endswith(f"_{suffix}")]
    return None if not parts else parts[0] if len(parts) == 1 else tuple(parts)


def by_pieces(problem: Problem, given: Given, leaves: Values, weights: Values) -> Values:
    """torch.nn's layer; with lengths or resets every piece between two resets is a row of its own, all packed."""
    x, variant = leaves["x"], problem.variant
    layer = build(problem, nn, device=x.device, dtype=x.dtype)

    def call(*arguments: Any) -> tuple[Any, list[Tensor]]:
        y, last = torch.func.functional_call(layer, weights, arguments)
        return y, list(last) if isinstance(last, tuple) else [last]

    if given.lengths is None and given.resets is None:
        y, last = call(x, _states(leaves, "0"))
        return {"y": y, **{f"{name}_n": v for name, v in zip("hc", last, strict=False)}}
    resets = torch.zeros(x.shape[:2]) if given.resets is None else given.resets
    pieces = []  # row, first step, the step after its last
    for b, valid in enumerate(given.valid):
        cuts = [0, *(t for t in range(1, valid) if resets[t, b]), valid]
        pieces += [(b, begin, end) for begin, end in itertools.pairwise(cuts) if end]
    where = [(t - begin, k, t, b) for k, (b, begin, end) in enumerate(pieces) for t in range(begin, end)]
    i, k, t, b = torch.tensor(where, device=x.device).T
    sizes = torch.tensor([end - begin for _, begin, end in pieces])
    rows = torch.tensor([row for row, _, _ in pieces], device=x.device)
    padded = x.new_zeros(int(sizes.max()), len(pieces), x.shape[2]).index_put((i, k), x[t, b])
    # The pieces that begin with h_0, and those that end with h_n: [L·D, pieces].
    begins = [begin == 0 and not resets[0, row] for row, begin, _ in pieces]
    last_ones = [end == given.valid[row] for row, _, end in pieces]
    forward, backward = (begins, last_ones), (last_ones, [begin == 0 for _, begin, _ in pieces])
    order = ([forward, backward] if variant.both else [forward]) * variant.layers
    from_0, to_n = (torch.tensor([pair[which] for pair in order], device=x.device) for which in (0, 1))
    starts, befores = [], []
    for name, size in zip(KINDS[problem.kind].states, (problem.output_size, variant.size[3]), strict=False):
        none = x.new_zeros(len(order), x.shape[1], size)
        befores.append(leaves.get(f"{name}_0", none))
        starts.append(torch.where(from_0[..., None], befores[-1][:, rows], leaves.get(f"{name}_r", none)[:, rows]))
    packed = pack_padded_sequence(padded, sizes, enforce_sorted=False)
    out, last = call(packed, tuple(starts) if len(starts) > 1 else starts[0])
    y = pad_packed_sequence(out)[0][i, k]
    results = {"y": y.new_zeros(*x.shape[:2], y.shape[1]).index_put((t, b), y)}
    at, ending = to_n.nonzero().T
    for name, before, found in zip("hc", befores, last, strict=False):
        results[f"{name}_n"] = before.index_put((at, rows[ending]), found[at, ending])  # a row without steps keeps h_0
    return results


def by_steps(problem: Problem, given: Given, leaves: Values, weights: Values) -> Values:
    """The reference called for one step after the other, lengths and resets by `where`."""
    x, variant, kind = leaves["x"], problem.variant, KINDS[problem.kind]
    steps, rows = x.shape[:2]
    sizes = (problem.output_size, variant.size[3])[: len(kind.states)]
    valid = torch.tensor(given.valid, device=x.device)[:, None]
    resets = None if given.resets is None else given.resets.to(x.device)
    finals: list[Any] = []
    histories: list[Any] = []
    for n in range(variant.layers):
        outputs = []
        for d in range(2 if variant.both else 1):
            at = len(finals)
            zeros = [x.new_zeros(rows, size) for size in sizes]
            again = [leaves[f"{s}_r"][at] for s in kind.states] if variant.reset_state else zeros
            state = [leaves[f"{s}_0"][at] for s in kind.states] if variant.hx else zeros
            suffix = f"_l{n}" + "_reverse" * d
            w = [v for name, v in weights.items() if name.endswith(suffix)]
            history: list[Any] = [None] * steps
            for t in reversed(range(steps)) if d else range(steps):
                border = t + d  # a reset lies between this step and the one before it, whichever comes first
                if resets is not None and border < steps:
                    cut = resets[border][:, None] & (border < valid)
                    state = [torch.where(cut, r, s) for r, s in zip(again, state, strict=True)]
                c = state[1] if len(state) > 1 else None
                _, h, c, _ = ops.layer(kind.cell, x[t : t + 1], state[0], c, w, backend="reference")
                new = [h] if c is None else [h, c]
                state = [torch.where(t < valid, v, s) for v, s in zip(new, state, strict=True)]
                history[t] = [torch.where(t < valid, v, 0) for v in new]
            finals.append(state)
            histories.append([torch.stack(column) for column in zip(*history, strict=True)])
            outputs.append(histories[-1][0])
        x = torch.cat(outputs, -1)
    results = {"y": x}
    for suffix, every in (("n", finals), ("all", histories if variant.all_states else [])):
        for name, column in zip(kind.states, zip(*every, strict=True), strict=False):
            results[f"{name}_{suffix}"] = torch.stack(column)
    return results


def numbers(way: Way, problem: Problem, given: Given, dtype: torch.dtype, device: str) -> Values:
    """What a way gives, on the CPU: the results, those without gradients too, and the gradient of everything."""
    leaves, weights = given.to(dtype, device)
    with torch.no_grad():
        alone = way(problem, given, leaves, weights)
    results = way(problem, given, leaves, weights)
    g = torch.Generator().manual_seed(1)
    every = {**leaves, **weights}
    drawn = [torch.randn(v.shape, generator=g).to(torch.bfloat16).to(device, dtype) for v in results.values()]
    found = torch.autograd.grad(
        list(results.values()), list(every.values()), drawn, allow_unused=True, materialize_grads=True
    )
    named = {**results, **{f"{name} without gradients": v for name, v in alone.items()}}
    named |= {f"gradient of {name}": v for name, v in zip(every, found, strict=True)}
    return {name: v.detach().cpu() for name, v in named.items()}


# The examination.


@dataclass
class Findings:
    """What came of it. A share is an error over what is allowed."""

    wrong: list[str] = field(default_factory=list)
    culprits: set[str] = field(default_factory=set)
    """The backends that something is wrong with."""
    ran: dict[tuple[str, torch.dtype], int] = field(default_factory=dict)
    """How many problems a backend has run."""
    worst: dict[tuple[str, torch.dtype], tuple[float, str]] = field(default_factory=dict)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    """backend -> reason -> problems that it cannot run for it"""
    ended: bool = False
    """Whether the device failed before the end."""
    left: int = 0
    """Problems for which there was no time."""

    def blame(self, backend: str, what: str) -> None:
        """Put a failure down."""
        self.culprits.add(backend)
        self.wrong.append(f"{backend}: {what}")

    def lines(self) -> list[str]:
        """For a person: a line for each backend and dtype, then what was left out."""
        said = []
        for (backend, dtype), count in self.ran.items():
            share, where = self.worst.get((backend, dtype), (0.0, "nothing"))
            said.append(
                f"{backend:<10} {str(dtype)[6:]:<9} {count:>4} problems, at most {share:.0%} of the budget: {where}"
            )
        for backend, reasons in self.skipped.items():
            said += [f"{backend:<10} left out of {count:>4} problems: {reason}" for reason, count in reasons.items()]
        return said


def examine(
    findings: Findings,
    device: str,
    every: Sequence[Problem],
    backends: Sequence[str] = NAMES,
    tell: Callable[[int, str], None] | None = None,
    seconds: float = float("inf"),
) -> None:
    """Run the problems on every backend that can, and on `auto`, and put down what is found.

    `tell` hears how many are done, and which. Begins no problem after so many seconds. Ends early where torch itself
    fails: a kernel that wrote where it must not leaves a device that nothing runs on.
    """
    begin = time.monotonic()
    with _strict():
        for done, problem in enumerate(every, 1):
            if time.monotonic() - begin > seconds:
                findings.left = len(every) - done + 1
                return
            try:
                _examine(findings, device, problem, backends)
            except RuntimeError as error:
                findings.ended = True
                findings.wrong.append(f"torch fails, and the examination ends, in {problem}: {first_line(error)}")
                return
            if tell is not None:
                tell(done, str(problem))


def _examine(findings: Findings, device: str, problem: Problem, backends: Sequence[str]) -> None:
    drawn = [draw(problem, seed) for seed in range(problem.samples)]
    way = by_pieces if problem.known else by_steps
    truth = _pooled([numbers(way, problem, given, torch.float64, "cpu") for given in drawn])
    yardstick = _pooled([numbers(way, problem, given, problem.dtype, device) for given in drawn])
    leaves, weights = drawn[0].to(problem.dtype, device)
    with record() as met:
        named("reference")(problem, drawn[0], leaves, weights)
    for backend in BACKENDS:
        reasons = dict.fromkeys(reason for facts, _, _ in met for reason in backend.unsupported(facts))
        if reasons and backend.name in backends:
            counts = findings.skipped.setdefault(backend.name, {})
            for reason in reasons:
                counts[reason] = counts.get(reason, 0) + 1
            backends = [name for name in backends if name != backend.name]
    for name in backends:
        key = (name, problem.dtype)
        findings.ran[key] = findings.ran.get(key, 0) + 1
        try:
            with record() as choices:
                got = _pooled([numbers(named(name), problem, given, problem.dtype, device) for given in drawn])
        except Exception as raised:  # compilers of kernels have errors of their own
            findings.blame(name, f"raised {first_line(raised)}, in {problem}")
            continue
        others = {chosen for _, _, chosen in choices} - {name}
        if others and name != "auto":
            findings.blame(name, f"was named, and {', '.join(sorted(others))} ran, in {problem}")
        if got.keys() != truth.keys():
            findings.blame(name, f"gives {', '.join(got)}, expected {', '.join(truth)}, in {problem}")
            continue
        for what, v in got.items():
            if v.dtype != problem.dtype:
                findings.blame(name, f"{what} is {v.dtype}, expected {problem.dtype}, in {problem}")
            off = error(v, truth[what])
            allowed = 2 * error(yardstick[what], truth[what]) + band(truth[what], problem.dtype)
            if not off <= allowed:
                findings.blame(name, f"{what} is off by {off:.3g}, allowed {allowed:.3g}, in {problem}")
            share = off / allowed if allowed else float(off > 0)
            if share > findings.worst.get(key, (-1.0, ""))[0]:
                findings.worst[key] = (share, f"{what}, {problem}")


def _pooled(samples: list[Values]) -> Values:
    """Several runs of a problem as one."""
    if len(samples) == 1:
        return samples[0]
    return {name: torch.cat([sample[name].flatten() for sample in samples]) for name in samples[0]}


FILL = "fill_uninitialized_memory"  # a property that type checkers do not see


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """float32 that is float32, not TF32; NaN in the memory that nobody wrote; no advice on speed."""
    matmul, cudnn, filling = torch.backends.cuda.matmul, torch.backends.cudnn, torch.utils.deterministic
    before, mode = (matmul.allow_tf32, cudnn.allow_tf32), torch.get_deterministic_debug_mode()
    fill = getattr(filling, FILL)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        setattr(filling, FILL, True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        setattr(filling, FILL, fill)
        torch.set_deterministic_debug_mode(mode)
