"""`explain`: which backend runs each recurrent layer of a model on a given input, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .backends import BACKENDS, BY_NAME, LayerSpec, basis, preference, record, recorded
from .nn.base import Recurrent

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


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: `str()` is a table, `to_dict()` the same for a program."""

    choices: tuple[Choice, ...]

    def to_dict(self) -> dict[str, Any]:
        """{"layers": [{"name", "layer", "problem", "asked", "backend", "reasons", ...}, ...], "note"}, as in `Choice`.

        `reasons` is {backend: [...]} of those that were not chosen.
        """
        return {"layers": [choice.to_dict() for choice in self.choices], "note": NOTE}

    def __str__(self) -> str:
        if not self.choices:
            return "no layer of rnnkit ran; rnnkit.convert(model) makes torch.nn's recurrent layers ours"
        lines = []
        for choice in self.choices:
            p = choice.problem
            where = f"layer {choice.layer}, {'reverse' if p.reverse else 'forward'}"
            size = f"T={p.steps} B={p.batch} I={p.input_size} H={p.hidden_size}"
            size += f" P={p.proj_size}" if p.proj_size else ""
            kind = f"{p.cell} {size} {str(p.dtype).removeprefix('torch.')} on {p.device}"
            lines.append(f"{choice.name or '(the module)'}, {where}: {kind}")
            if choice.asked == "auto":
                measured = choice.measured and f"in the order measured at {choice.measured}"
                lines += [f"    {line}" for line in (choice.rule, measured) if line] or [f"    {UNMEASURED}"]
            for backend in preference(p):
                if backend.name == choice.backend:
                    how = "chosen" if choice.asked == "auto" else f"chosen, as backend={choice.asked!r} asks"
                    how += f"; {choice.detail}" if choice.detail else ""
                else:
                    how = "; ".join(choice.reasons[backend.name])
                lines.append(f"  {'→' if backend.name == choice.backend else ' '} {backend.name:<10} {how}")
        return "\n".join([*lines, NOTE])


def explain(module: nn.Module, input: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run each recurrent layer inside `module`, called as module(input, ...).

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
    met: list[tuple[str, int]] = []
    hooks = []
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng(devices=_devices(module)), record() as problems:
        for name, child in module.named_modules():
            if isinstance(child, Recurrent):

                def enter(_: nn.Module, __: Any, name: str = name) -> None:
                    running.append(name)

                def leave(_: nn.Module, __: Any, ___: Any) -> None:
                    met.append((running.pop(), len(problems)))

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
    choices = []
    start = 0
    for name, end in met:
        some = problems[start:end]
        directions = 1 + any(problem.reverse for problem, _, _ in some)
        # On a GPU the reverse direction may have come first.
        order = sorted(range(len(some)), key=lambda k: (k // directions, some[k][0].reverse))
        for k in order:
            problem, asked, backend = some[k]
            layer = k // directions
            row = recorded(problem)
            measured, rule = None if row is None else str(row), basis(problem).rule
            reasons, detail = _reasons(problem, asked, backend), BY_NAME[backend].detail(problem)
            choices.append(Choice(name, layer, problem, asked, backend, reasons, measured, rule, detail))
        start = end
    return Explanation(tuple(choices))


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
