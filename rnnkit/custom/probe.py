"""The user's step, called once by itself before a layer first runs it, for mistakes that would give wrong numbers.

What the step raises comes through as it is, with a note where it came from. States that are wrong, an argument changed
in place and random numbers drawn inside are errors, whatever backend runs: a loop over time would show them late, or
never.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from .check import points, run_step
from .declare import CellSpec
from .errors import StepError

_KEPT = 512
_passed: dict[tuple[CellSpec, int, torch.dtype], None] = {}


def probe(spec: CellSpec, hidden: int, dtype: torch.dtype) -> None:
    """Raise where the step cannot be a step. Once for each cell, H and dtype, on the CPU."""
    key = (spec, hidden, dtype)
    if key in _passed:
        return
    with ThreadPoolExecutor(1) as own:  # which no transform and no mode of the caller's reaches
        own.submit(_try, spec, hidden, dtype).result()
    if len(_passed) >= _KEPT:
        _passed.clear()
    _passed[key] = None


_TRIES = 3
"""Another thread may draw meanwhile."""


def _draws(spec: CellSpec, given: dict[str, torch.Tensor]) -> bool:
    """Whether torch's generator moves while the step runs."""
    before = torch.get_rng_state()
    run_step(spec, given)
    return not torch.equal(before, torch.get_rng_state())


@torch.no_grad()
def _try(spec: CellSpec, hidden: int, dtype: torch.dtype) -> None:
    given = next(points(spec, hidden, dtype))
    try:
        drew = all(_draws(spec, given) for _ in range(_TRIES))
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            rows = given["gx"].shape[0]
            error.add_note(f"{spec.name}.step was tried once, with B = {rows} and H = {hidden}")
        raise
    if drew:
        raise StepError(
            f"{spec.name}.step draws random numbers: its derivative would see others. Draw masks outside: declare "
            "mask = rnnkit.per_step(grad=False), and pass it at the call or return it from the cell's `draw`"
        )
