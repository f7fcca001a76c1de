"""`explain`: which backend runs each recurrent layer of a model on a given input, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .backends import BACKENDS, BY_NAME, LayerSpec, basis, preference, record, recorded
from .custom.facts import CustomChoice, Met, choice_of
from .custom.facts import record as record_custom
from .nn.base import Recurrent
from .nn.custom import Custom

UNMEASURED = "in the table's order: nothing is recorded of this cell on this device"
NOTE = (
    "vmap, torch.func, forward mode and derivatives beyond the first run the reference's formulas, whatever backend "
    "is named. A named backend must still be able to run the layer."
)


@dataclass(frozen=True)
class Choice:
    """One layer, in one direction: the backend that runs it and what speaks against each other one."""

    name: str
    layer: int
    problem: LayerSpec
    asked: str
    backend: str
    reasons: dict[str, list[str]]
    measured: str | None
    """The recorded shape whose times put the backends in order; None where a rule does, or nothing is recorded."""
    rule: str | None
    """What put them in order where no row of this very kind did; None where one did, or nothing is recorded."""
    detail: str | None
    """How the chosen backend runs it, where it has several ways."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, the dtype by its name."""
        problem = self.problem._asdict()
        problem["dtype"] = str(self.problem.dtype).removeprefix("torch.")
        return {
            "name": self.name,
            "layer": self.layer,
            "problem": problem,
            "asked": self.asked,
            "backend": self.backend,
            "reasons": self.reasons,
            "measured": self.measured,
            "rule": self.rule,
            "detail": self.detail,
        }

    def lines(self) -> list[str]:
        """For a person."""
        p = self.problem
        where = f"layer {self.layer}, {'reverse' if p.reverse else 'forward'}"
        size = f"T={p.steps} B={p.batch} I={p.input_size} H={p.hidden_size}"
        size += f" P={p.proj_size}" if p.proj_size else ""
        kind = f"{p.cell} {size} {str(p.dtype).removeprefix('torch.')} on {p.device}"
        found = [f"{self.name or '(the module)'}, {where}: {kind}"]
        if self.asked == "auto":
            measured = self.measured and f"in the order measured at {self.measured}"
            found += [f"    {line}" for line in (self.rule, measured) if line] or [f"    {UNMEASURED}"]
        for backend in preference(p):
            if backend.name == self.backend:
                how = "chosen" if self.asked == "auto" else f"chosen, as backend={self.asked!r} asks"
                how += f"; {self.detail}" if self.detail else ""
            else:
                how = "; ".join(self.reasons[backend.name])
            found.append(f"  {'→' if backend.name == self.backend else ' '} {backend.name:<10} {how}")
        return found


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: `str()` is a table, `to_dict()` the same for a program."""

    choices: tuple[Choice | CustomChoice, ...]

    def to_dict(self) -> dict[str, Any]:
        """{"layers": [{"name", "layer", "problem", "asked", "backend", "reasons", ...}, ...], "note"}, as in `Choice`.

        `reasons` is {backend: [...]} of those that were not chosen. A custom layer, as in `CustomChoice`, also has
        "program", "refused", "check_seconds" and "kernel_check_seconds".
        """
        return {"layers": [choice.to_dict() for choice in self.choices], "note": NOTE}

    def __str__(self) -> str:
        if not self.choices:
            return "no layer of rnnkit ran; rnnkit.convert(model) makes torch.nn's recurrent layers ours"
        lines = [line for choice in self.choices for line in choice.lines()]
        return "\n".join([*lines, NOTE])


def explain(module: nn.Module, input: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run each recurrent layer inside `module`, called as module(input, ...); of a custom
    layer also what became of its step.

    The module is run once, in the caller's grad mode; random state and buffers are put back afterwards.

    Args:
        module: a layer or cell of rnnkit, or a model that contains some.
        input, args, kwargs: what the module is called with.

    Returns:
        An object whose `str()` is a table and whose `to_dict()` is the same for a program. Nothing is printed.

    Raises:
        TypeError: `module` is no module.
        Exception: what the call itself raises.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"rnnkit.explain takes an nn.Module and its input, got {type(module).__name__}")
    running: list[str] = []
    met: list[tuple[str, list[Any]]] = []
    hooks = []
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng(devices=_devices(module)), record() as built_in, record_custom() as custom:
        for name, child in module.named_modules():
            if isinstance(child, Recurrent | Custom):

                def enter(_: nn.Module, __: Any, name: str = name) -> None:
                    running.append(name)

                def leave(child: nn.Module, _: Any, __: Any) -> None:
                    some: list[Any] = custom if isinstance(child, Custom) else built_in
                    met.append((running.pop(), some.copy()))
                    some.clear()

                hooks += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave)]
        try:
            module(input, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])
    return Explanation(tuple(choice for name, some in met for choice in _choices(name, some)))


def _choices(name: str, some: list[Any]) -> Iterator[Choice | CustomChoice]:
    """Of one call of a layer, what ran: (problem, asked, backend) each, or `Met` of a custom layer."""
    if some and isinstance(some[0], Met):
        directions = 1 + any(met.asked.o.reverse for met in some)
        for k, met in enumerate(some):
            yield choice_of(met, name, k // directions)
        return
    directions = 1 + any(problem.reverse for problem, _, _ in some)
    # On a GPU the reverse direction may have come first.
    for k in sorted(range(len(some)), key=lambda k: (k // directions, some[k][0].reverse)):
        problem, asked, backend = some[k]
        row = recorded(problem)
        measured, rule = None if row is None else str(row), basis(problem).rule
        reasons, detail = _reasons(problem, asked, backend), BY_NAME[backend].detail(problem)
        yield Choice(name, k // directions, problem, asked, backend, reasons, measured, rule, detail)


def _reasons(problem: LayerSpec, asked: str, chosen: str) -> dict[str, list[str]]:
    """What speaks against each backend that was not chosen."""
    reasons = {}
    for backend in BACKENDS:
        if backend.name != chosen:
            why = backend.unsupported(problem)
            after = f"can run it; auto asks {chosen} first" if asked == "auto" else f"can run it; {asked} was asked for"
            reasons[backend.name] = why or [backend.auto_exclusion_reason(problem) or after]
    return reasons


def _devices(module: nn.Module) -> list[torch.device]:
    return list({p.device for p in module.parameters() if p.device.type == "cuda"})
