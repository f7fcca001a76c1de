"""A kernel that is wrong in one way alone, as no test of its own would show, is found before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from custom_layers import LSTM

from rnnkit.backends.cpu import extension
from rnnkit.backends.cpu import program as cpu
from rnnkit.custom import kernel_check
from rnnkit.custom.check import program_of
from rnnkit.custom.declare import spec_of
from rnnkit.custom.inputs import CellInputs, CellOptions

pytestmark = pytest.mark.skipif(extension.native is None, reason="the engine cannot run here")
WRONG: dict[str, Callable[[CellInputs, CellOptions], bool]] = {
    "never": lambda t, o: False,
    "forwards": lambda t, o: not o.reverse,
    "in reverse": lambda t, o: o.reverse,
    "with recompute": lambda t, o: o.recompute,
    "with biases": lambda t, o: t.b_ih is not None,
    "without biases": lambda t, o: t.b_ih is None and t.b_hh is None,
}


class Faulty:
    """The engine, off by a thousandth of W_hh's gradient, or of the last h, where `when` says so."""

    name = "cpu"

    def __init__(self, when: Callable[[CellInputs, CellOptions], bool], backward: bool) -> None:
        self.when, self.of_backward = when, backward

    def forward(self, plan: Any, t: CellInputs, o: CellOptions, train: bool) -> Any:
        outputs, saved = cpu.forward(plan, t, o, train)
        if self.when(t, o) and not self.of_backward:
            outputs = outputs._replace(last=(outputs.last[0] + 1e-3, *outputs.last[1:]))
        return outputs, saved

    def backward(self, plan: Any, t: CellInputs, o: CellOptions, *rest: Any) -> Any:
        grads = cpu.backward(plan, t, o, *rest)
        if self.when(t, o) and self.of_backward:
            grads[6] = grads[6] * 1.001  # type: ignore[operator]
        return grads


@pytest.mark.parametrize("of_backward", [False, True])
@pytest.mark.parametrize("when", WRONG)
def test_a_kernel_that_is_wrong_in_one_way_is_found(
    when: str, of_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_check, "_found", {})
    spec = spec_of(LSTM)
    program = program_of(spec, 5).program
    said = kernel_check.mismatch("cpu", Faulty(WRONG[when], of_backward), spec, program, "cpu", torch.float64)
    if when == "never":
        assert said is None
    else:
        what = "the gradient of w_hh" if of_backward else "the last h"
        assert said is not None and what in said
        ways = "in reverse, with recompute and without biases"
        assert (ways in said) == (when in ("in reverse", "with recompute", "without biases"))
    assert kernel_check.seconds("cpu", program, "cpu", torch.float64) > 0
    assert kernel_check.seconds("triton", program, "cpu", torch.float64) == 0
