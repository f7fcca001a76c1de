"""Eleven cells of different shapes, as a user would write their steps: the measure of tracer, program and kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class StepSpec:
    """What rnnkit.custom.check takes of a cell."""

    name: str
    step: Callable[..., Any]
    gates: int
    states: tuple[str, ...]
    units: tuple[str, ...] = ()
    weights: tuple[tuple[str, int], ...] = ()
    steps: tuple[tuple[str, str, bool], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    met: dict[tuple[int, torch.dtype], Any] = field(default_factory=dict, compare=False)


CELLS: dict[str, StepSpec] = {}


def spec_of(step: Callable[..., Any], gates: int, states: tuple[str, ...], **declared: Any) -> StepSpec:
    """With w_hh first among the weights where the step takes a or gh."""
    weights = tuple(declared.pop("weights", ()))
    if {"a", "gh"} & set(inspect.signature(step).parameters):
        weights = (("w_hh", gates), *weights)
    return StepSpec(step.__name__, step, gates, states, weights=weights, **declared)


def cell(gates: int, states: tuple[str, ...], **declared: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(step: Callable[..., Any]) -> Callable[..., Any]:
        CELLS[step.__name__] = spec_of(step, gates, states, **declared)
        return step

    return add


@cell(4, ("h", "c"))
def lstm(a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = a.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@cell(3, ("h",))
def gru(gx: Tensor, gh: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz, hn = gh.chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return ((1 - z) * n + z * h,)


@cell(4, ("h", "c"), units=("p_i", "p_f", "p_o"))
def peephole(a: Tensor, h: Tensor, c: Tensor, p_i: Tensor, p_f: Tensor, p_o: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = a.chunk(4, -1)
    i, f = torch.sigmoid(i + p_i * c), torch.sigmoid(f + p_f * c)
    c = f * c + i * torch.tanh(g)
    return torch.sigmoid(o + p_o * c) * torch.tanh(c), c


@cell(4, ("h", "c"), steps=(("keep_h", "unit", False), ("keep_c", "unit", False)))
def zoneout(a: Tensor, h: Tensor, c: Tensor, keep_h: Tensor, keep_c: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = a.chunk(4, -1)
    new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    new_h = torch.sigmoid(o) * torch.tanh(new_c)
    return torch.where(keep_h != 0, h, new_h), torch.where(keep_c != 0, c, new_c)


@cell(3, ("h", "c"))
def cifg(a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    f, g, o = a.chunk(3, -1)
    f = torch.sigmoid(f)
    c = f * c + (1 - f) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@cell(4, ("h", "c"), units=("g_i", "g_f", "g_g", "g_o", "w_c", "b_c"))
def layernorm_lstm(
    gx: Tensor, gh: Tensor, h: Tensor, c: Tensor,
    g_i: Tensor, g_f: Tensor, g_g: Tensor, g_o: Tensor, w_c: Tensor, b_c: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The product of h normalised over all 4H, and c over H."""
    hi, hf, hg, ho = F.layer_norm(gh, gh.shape[-1:]).chunk(4, -1)
    xi, xf, xg, xo = gx.chunk(4, -1)
    i, f, o = torch.sigmoid(xi + g_i * hi), torch.sigmoid(xf + g_f * hf), torch.sigmoid(xo + g_o * ho)
    c = f * c + i * torch.tanh(xg + g_g * hg)
    return o * torch.tanh(F.layer_norm(c, c.shape[-1:], w_c, b_c)), c


@cell(3, ("h",), weights=(("w_rz", 2), ("w_n", 1)))
def gru_before(gx: Tensor, h: Tensor, w_rz: Tensor, w_n: Tensor) -> tuple[Tensor, ...]:
    """The reset gate before the product: a value is multiplied by a second weight."""
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz = F.linear(h, w_rz).chunk(2, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + F.linear(r * h, w_n))
    return ((1 - z) * n + z * h,)


@cell(4, ("h", "c", "n", "m"))
def slstm(a: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """Exponential gates, held in range by a running maximum."""
    i, f, z, o = a.chunk(4, -1)
    log_f = F.logsigmoid(f) + m
    m = torch.maximum(log_f, i)
    i, f = torch.exp(i - m), torch.exp(log_f - m)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


@cell(3, ("h",), steps=(("att", "row", True),))
def augru(gx: Tensor, gh: Tensor, h: Tensor, att: Tensor) -> tuple[Tensor, ...]:
    """An attention [B, 1] on the update gate."""
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz, hn = gh.chunk(3, -1)
    z = att * torch.sigmoid(xz + hz)
    n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return ((1 - z) * h + z * n,)


@cell(1, ("h",), units=("u",))
def indrnn(gx: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """No product at all."""
    return (torch.relu(gx + u * h),)


@cell(4, ("h", "c"), steps=(("drop", "unit", False),), weights=(("w", 4),))
def gal_lstm(gx: Tensor, h: Tensor, c: Tensor, drop: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """A mask on the state that enters the product."""
    i, f, g, o = (gx + F.linear(h * drop, w)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def inputs_of(spec: StepSpec, hidden: int, rows: int, seed: int) -> dict[str, Tensor]:
    """Of one step, in float64, by name."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    given = {"gx": draw(rows, spec.gates * hidden)}
    given |= {name: draw(rows, hidden) for name in spec.states}
    if spec.name == "slstm":
        given["n"] = given["n"].abs() + 1
    given |= {name: draw(hidden) for name in spec.units}
    given |= {name: draw(blocks * hidden, hidden) / hidden**0.5 for name, blocks in spec.weights}
    if "w_hh" in given:
        given["b_hh"] = draw(spec.gates * hidden)
    for name, kind, grad in spec.steps:
        x = draw(rows, 1 if kind == "row" else hidden)
        given[name] = x if grad else (x > 0).double()
    return given


def step_of(spec: StepSpec, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The step itself, by torch."""
    named: dict[str, Any] = {**given, **spec.options}
    if "w_hh" in given:
        named["gh"] = F.linear(given[spec.states[0]], given["w_hh"], given["b_hh"])
        named["a"] = given["gx"] + named["gh"]
    return tuple(spec.step(**{name: named[name] for name in inspect.signature(spec.step).parameters}))


def distance(spec: StepSpec, program: Any, given: dict[str, Tensor], seed: int = 0) -> tuple[float, str]:
    """How far a program is from autograd of its step, and where: relative to the largest number of each tensor, where
    the step's own numbers are finite."""
    from rnnkit.custom import evaluate

    constant = {name for name, _, grad in spec.steps if not grad}
    given = {name: x.clone().requires_grad_(name not in constant) for name, x in given.items()}
    wanted = [name for name in given if name not in constant]
    out = step_of(spec, given)
    random = torch.Generator().manual_seed(seed)
    d_new = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in out]
    total = torch.stack([(x * d).sum() for x, d in zip(out, d_new)]).sum()
    found: tuple[Tensor | None, ...] = (None,) * len(wanted)
    if total.requires_grad:
        found = torch.autograd.grad(total, [given[name] for name in wanted], allow_unused=True)
    with torch.no_grad():
        kept = evaluate.forward(program, given)
        have = evaluate.backward(program, given, kept, d_new)
        pairs = [(f"state {name}", x, y) for name, x, y in zip(spec.states, kept.new, out)]
        pairs += [
            (f"gradient of {name}", have[name], torch.zeros_like(have[name]) if y is None else y)
            for name, y in zip(wanted, found)
        ]
        worst = (0.0, "")
        for where, x, y in pairs:
            finite = torch.isfinite(y)
            scale = y[finite].abs().max().clamp(min=1.0) if finite.any() else 1.0
            error = ((x - y).abs() / scale)[finite]
            if error.numel():
                worst = max(worst, (error.nan_to_num(float("inf")).max().item(), where))
    return worst
