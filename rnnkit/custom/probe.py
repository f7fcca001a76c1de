"""The user's step, called once by itself before a layer first runs it, for mistakes that would give wrong numbers.

Of two rows of random numbers. What the step raises comes through as it is, with a note where it came from. A wrong
number of results or shape, an argument changed in place and random numbers drawn inside are errors here, in the user's
words: a loop over time would show them late, or never.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..autocast import no_autocast
from .declare import CellSpec
from .reference import step_of

ROWS = 2
_passed: set[tuple[CellSpec, int, str, torch.dtype]] = set()


def probe(spec: CellSpec, hidden: int, device: str, dtype: torch.dtype) -> None:
    """Raise where the step cannot be a step. Once for each cell, H, type of device and dtype."""
    key = (spec, hidden, device, dtype)
    if key in _passed:
        return
    # whoever calls may compile, transform or watch what is called
    with torch.no_grad(), torch.inference_mode(False), no_autocast(device):
        with _disable_current_modes(), torch._C._DisableFuncTorch(), torch._C.DisableTorchFunction():
            _try(spec, hidden, device, dtype)
    _passed.add(key)


def _try(spec: CellSpec, hidden: int, device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator("cpu").manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype, device="cpu").to(device)

    states = [some(ROWS, hidden) for _ in spec.states]
    now = [some(ROWS, hidden if kind == "unit" else 1) for _, kind, _ in spec.steps]
    weights = [some(blocks * hidden, hidden) / hidden for _, blocks in spec.weights]
    units = [some(hidden) for _ in spec.units]
    gx, b_hh = some(ROWS, spec.gates * hidden), some(spec.gates * hidden) if spec.recurrent else None
    names = ("gx", *spec.states, *(name for name, _, _ in spec.steps), *spec.units)
    given = dict(zip(names, (gx, *states, *now, *units), strict=True))
    before = {name: v._version for name, v in given.items()}
    random = _random_state(device)
    try:
        step_of(spec)(gx, states, now, weights, b_hh, units)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"raised by {spec.name}.step, tried once with B = {ROWS}, H = {hidden}")
        raise
    for name, v in given.items():
        if v._version != before[name]:
            raise ValueError(
                f"{spec.name}.step changes {name} in place, which the rest of the layer still reads: write "
                f"{name} = {name} + ... instead of {name} += ..., and use no operator that ends in _"
            )
    if not torch.equal(random, _random_state(device)):
        raise ValueError(
            f"{spec.name}.step draws random numbers: its derivative would see others. Draw masks outside: declare "
            "mask = rnnkit.per_step(grad=False), and pass it at the call or return it from the cell's `draw`"
        )


def _random_state(device: str) -> Tensor:
    """Of torch's generators."""
    cpu = torch.get_rng_state()
    return torch.cat([cpu, torch.cuda.get_rng_state()]) if device == "cuda" else cpu
