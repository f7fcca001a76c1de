"""A cell's step tried by itself: at which points, and what torch's autograd says there. The measure of its program."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rnnkit.custom.errors import StepError, undeclared
from rnnkit.custom.graph import ROW
from rnnkit.custom.trace import results


class Spec(Protocol):
    """A cell's declaration, as it is read off a class."""

    @property
    def name(self) -> str: ...
    @property
    def step(self) -> Callable[..., Any]: ...
    @property
    def gates(self) -> int: ...
    @property
    def states(self) -> tuple[str, ...]: ...
    @property
    def units(self) -> tuple[str, ...]: ...
    @property
    def weights(self) -> tuple[tuple[str, int], ...]:
        """Names and blocks; ("w_hh", gates) first where the step takes a or gh."""

    @property
    def steps(self) -> tuple[tuple[str, str, bool], ...]:
        """Names, UNIT or ROW, whether a gradient may be wanted."""

    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def met(self) -> dict[tuple[int, torch.dtype], Any]: ...


_EDGES = (0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 1e-3, -1e-3, 2.0)
_EXTREMES = (80.0, -80.0, 20.0, -20.0, 1e-30, -1e-30, 0.0, 1.0)
FAR = 1 << 20
"""Numbers in a weight above which its gradient is not formed: that of a product is the same whatever H is."""


AT_EDGES = 2
"""Which of `points` is at edges."""


_TILE = 509


def tiled(normal: Callable[..., Tensor], rows: int, columns: int) -> Tensor:
    """A weight of about 1/√columns, of copies of a block of at most 509 x 509: drawing all of it would take longest. Of
    a prime size, so that blocks of H rows differ, whatever H is but that."""
    near = normal(min(rows, _TILE), min(columns, _TILE)) / columns**0.5
    down, across = -(-rows // near.shape[0]), -(-columns // near.shape[1])
    return near if down == across == 1 else near.repeat(down, across)[:rows, :columns].contiguous()


def points(spec: Spec, hidden: int, dtype: torch.dtype = torch.float64) -> Iterator[dict[str, Tensor]]:
    """Inputs of one step to try a cell at, by name: near, at the edges (with equals), far out. The same ones always,
    and torch's generator is left alone."""
    random = torch.Generator().manual_seed(1729)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def of(values: tuple[float, ...]) -> Callable[..., Tensor]:
        def draw(*shape: int) -> Tensor:
            which = torch.randint(len(values), shape, generator=random)
            return torch.tensor(values, dtype=torch.float64)[which]

        return draw

    weights = {name: tiled(normal, blocks * hidden, hidden).to(dtype) for name, blocks in spec.weights}

    kinds: tuple[tuple[int, Callable[..., Tensor]], ...] = (
        (5, normal),
        (3, lambda *shape: normal(*shape) * 4),
        (7, of(_EDGES)),
        (5, of(_EXTREMES)),
    )
    for rows, draw in kinds:
        given = {"gx": draw(rows, spec.gates * hidden)}
        given |= {name: draw(rows, hidden) for name in spec.states}
        given |= {name: draw(hidden) for name in spec.units}
        for name, kind, grad in spec.steps:
            x = draw(rows, 1 if kind == ROW else hidden)
            given[name] = x if grad else torch.where(x > 0, x.abs().clamp(max=2.0).round(), 0.0)
        if draw is not kinds[0][1] and draw is not kinds[1][1]:
            for name in spec.states:  # ties: a gate that equals a state, two states that are equal
                tied = torch.rand((rows, hidden), generator=random) < 0.25
                given[name] = torch.where(tied, given["gx"][:, :hidden], given[name])
        if spec.weights and spec.weights[0][0] == "w_hh":
            given["b_hh"] = draw(spec.gates * hidden)
        yield {name: x.to(dtype) for name, x in given.items()} | weights


class _Wide(TorchFunctionMode):
    """A step of float32 run in float64: what names float32 means float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "float":
            return args[0].double()
        if name == "rms_norm" and len(args) < 4 and kwargs.get("eps") is None:
            kwargs["eps"] = torch.finfo(torch.float32).eps
        if name in ("zeros", "ones", "full", "tensor", "scalar_tensor") and kwargs.get("dtype") is None:
            kwargs["dtype"] = _default(args, kwargs)
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in kwargs.items()}
        return func(*args, **kwargs)


def _default(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    value = args[-1] if args else kwargs.get("fill_value", 0.0)
    return torch.bool if isinstance(value, bool) else torch.float64


def run_step(spec: Spec, given: Mapping[str, Tensor], wide: bool = False) -> tuple[Tensor, ...]:
    """The user's own step, once. `wide`: one of float32 on points of float64."""
    named: dict[str, Any] = {**given, **spec.options}
    if "b_hh" in given:
        named["gh"] = torch.nn.functional.linear(given[spec.states[0]], given["w_hh"], given["b_hh"])
        named["a"] = given["gx"] + named["gh"]
    parameters = inspect.signature(spec.step).parameters
    for argument in parameters.values():
        if argument.name not in named:
            raise StepError(undeclared(spec.name, argument, spec.states))
    taken = {name: named[name] for name in parameters}
    before = {name: x._version for name, x in taken.items() if isinstance(x, Tensor)}
    with _Wide() if wide else contextlib.nullcontext():
        out = spec.step(**taken)
    for name, version in before.items():
        if taken[name]._version != version:
            raise StepError(f"step changes its argument {name} in place: write a new value, as {name} = {name} + ...")
    rows, hidden = given[spec.states[0]].shape
    return results(out, spec.states, rows, hidden)


class Tried(NamedTuple):
    new: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]
    """Of what they were asked for; None is zero."""


def try_step(
    spec: Spec, given: Mapping[str, Tensor], names: Sequence[str], d_new: Sequence[Tensor], wide: bool
) -> Tried:
    """The states after the step, and the gradients of `names` by autograd, given those of the states."""
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in given.items()}
    new = run_step(spec, leaves, wide)
    # One number, and not grad_outputs, at which torch imports sympy, for a second
    total = torch.stack([(x * d).sum() for x, d in zip(new, d_new, strict=True)]).sum()
    found: Sequence[Tensor | None] = [None] * len(names)
    if total.requires_grad:
        found = torch.autograd.grad(total, [leaves[name] for name in names], allow_unused=True)
    return Tried(tuple(x.detach() for x in new), dict(zip(names, found, strict=True)))


def nearby(given: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    """The same points a little further out, or in: by each number's own share, so that zeros and equals stay."""
    return {name: x * (1 + by * (0.5 + 0.5 * torch.cos(1e3 * x.abs()) ** 2)) for name, x in given.items()}
