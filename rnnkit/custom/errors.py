"""What can be wrong with a step: an error of its author, or only too much for a kernel."""

from __future__ import annotations

import inspect
from collections.abc import Sequence


class StepError(ValueError):
    """The step cannot run as a cell on any backend: it returns the wrong states, changes its arguments, draws random
    numbers."""


class NotTraced(Exception):
    """No kernel is made from this step; the reference runs it. The text names the operation and what to write instead,
    so that it can stand behind "the reference runs this cell: "."""


NO_GRAD = (
    "torch.no_grad() and its like inside the step: write .detach() on the value instead, as torch.tanh(x).detach()"
)


def undeclared(cell: str, argument: inspect.Parameter, states: Sequence[str]) -> str:
    """The words for a name in step's arguments that stands for nothing."""
    way = "rnnkit.per_unit(), rnnkit.weight(blocks), rnnkit.per_step() or rnnkit.option(default)"
    if argument.default is not argument.empty:
        way = f"rnnkit.option({argument.default!r})"
    return (
        f"{cell}.step names {argument.name!r}, which is neither a, gx, gh nor a state ({', '.join(states)}), "
        f"and is not declared: write {argument.name} = {way} in the class"
    )
