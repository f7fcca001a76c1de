"""`ops.override_layer`: while it lasts every layer and step is computed by a function, in every thread's turn."""

from __future__ import annotations

import threading

import pytest
import torch

import rnnkit
from rnnkit import ops
from rnnkit.backends import REFERENCE

CALLS = {
    "layer": lambda: rnnkit.LSTM(3, 4)(torch.ones(2, 1, 3))[0],
    "step": lambda: rnnkit.LSTMCell(3, 4)(torch.ones(1, 3))[0],
    "ops.layer": lambda: ops.layer("rnn_tanh", torch.ones(2, 1, 3), None, None, [torch.ones(4, 3), torch.ones(4, 4)])[
        0
    ],
}


def scaled(factor: float):
    """The reference, its output times a factor."""

    def run(cell, t, o):
        outputs = REFERENCE.forward(cell, t, o, train=False).outputs
        return outputs._replace(y=factor * outputs.y, h_n=factor * outputs.h_n)

    return run


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_overridden_and_then_no_more(call: str, grad: bool) -> None:
    def value() -> torch.Tensor:
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            return CALLS[call]().detach()

    right = value()  # also: a way that is remembered is not taken
    with ops.override_layer(scaled(2)):
        torch.testing.assert_close(value(), 2 * right)
        with ops.override_layer(scaled(3)):
            torch.testing.assert_close(value(), 3 * right)
        torch.testing.assert_close(value(), 2 * right)
    assert torch.equal(value(), right)


def test_another_thread_waits_and_an_error_ends_it() -> None:
    entered = threading.Event()

    def other() -> None:
        with ops.override_layer(scaled(2)):
            entered.set()

    thread = threading.Thread(target=other)
    right = CALLS["ops.layer"]()
    with pytest.raises(RuntimeError, match="stop"), ops.override_layer(scaled(3)):
        thread.start()
        assert not entered.wait(0.05)
        raise RuntimeError("stop")
    thread.join()
    assert entered.is_set() and torch.equal(CALLS["ops.layer"](), right)


def test_its_first_name_stays() -> None:
    assert ops.computed_by is ops.override_layer
