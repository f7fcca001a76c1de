"""The checks can fail: an error planted in the package turns them red.

A comparison that cannot fail proves nothing. So each error that a recurrent layer is likely to have is planted once,
one at a time, and the very comparison that the other tests use has to complain; without it, the same comparison is
silent. Where the comparison is a whole test of another file, that test is called here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_compile
import test_derivatives
import test_export
import test_textbook
import test_transforms
import torch
from sequences import EVERYTHING, F64, KINDS, PLACES, Case, check
from support import Config, by_lengths, by_reset, in_two, parity
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from rnnkit import masks, ops, use_backend
from rnnkit.backends import BY_NAME, REFERENCE, Result, scan_backend
from rnnkit.backends import torch as torch_backend
from rnnkit.layer import custom_ops
from rnnkit.reference import STEPS
from rnnkit.reference.step import Gradients, State, Step, Weights

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
GATED = ("lstm", "gru")
SIZE = (4, 3, 5, 6)


def checked(cell: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> list[str]:
    """The comparison that test_parity makes, on the backend in which errors are planted."""
    return parity(Config(cell, size=SIZE, dtype=dtype), ["reference"], **kwargs)


def lengths_checked(cell: str) -> list[str]:
    return parity(Config(cell, layout="packed_unsorted", size=SIZE), ["reference"], how=by_lengths)


def reset_checked(cell: str) -> list[str]:
    return checked(cell, how=by_reset, torch_how=in_two)


def mutate(monkeypatch: pytest.MonkeyPatch, cell: str, step: Any = None, vjp: Any = None) -> None:
    right_step, right_vjp = STEPS[cell]
    monkeypatch.setitem(STEPS, cell, (step or right_step, vjp or right_vjp))


@pytest.mark.parametrize("cell", CELLS)
def test_silent_without_an_error(cell: str) -> None:
    assert checked(cell) == [] and lengths_checked(cell) == [] and reset_checked(cell) == []


@pytest.mark.parametrize("cell", GATED)
def test_two_gates_swapped(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = STEPS[cell][0]

    def step(gx: Tensor, s: State, w: Weights) -> Step:
        def swapped(v: Tensor) -> Tensor:
            blocks = list(v.chunk(4 if cell == "lstm" else 3, -1))
            return torch.cat([blocks[1], blocks[0], *blocks[2:]], -1)

        return right(swapped(gx), s, w._replace(w_hh=swapped(w.w_hh.T).T))

    mutate(monkeypatch, cell, step=step)
    found = checked(cell)
    assert any("output is off" in text for text in found) and any("grad of weight_hh" in text for text in found)


@pytest.mark.parametrize("part", Gradients._fields)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("factor", [0.999, 0.0, -1.0])
def test_a_factor_in_a_derivative(cell: str, part: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth is enough; outputs stay right, gradients do not."""
    right = STEPS[cell][1]

    def vjp(*args: Any) -> Gradients:
        g = right(*args)
        value = getattr(g, part)
        return g if value is None else g._replace(**{part: factor * value})

    mutate(monkeypatch, cell, vjp=vjp)
    found = checked(cell)
    if part == "dc" and cell != "lstm":
        assert found == []  # there is none
    else:
        assert found and all("grad of" in text for text in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_small_error_in_each_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 units in the last place, in float64 too."""
    right = STEPS["lstm"][0]

    def step(gx: Tensor, s: State, w: Weights) -> Step:
        new = right(gx, s, w)
        return new._replace(h=new.h * (1 + 32 * torch.finfo(dtype).eps))

    mutate(monkeypatch, "lstm", step=step)
    assert any("output is off" in text for text in checked("lstm", dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_ignored(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "valid_mask", lambda lengths, steps, device: None)
    assert lengths_checked(cell)


@pytest.mark.parametrize("cell", CELLS)
def test_reset_ignored(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "reset_mask", lambda reset, valid, reverse: None)
    assert reset_checked(cell)


@pytest.mark.parametrize("cell", CELLS)
def test_reset_one_step_late(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = masks.reset_mask

    def late(reset: Tensor, valid: Tensor | None, reverse: bool) -> Tensor | None:
        return right(reset.roll(1, 0) if reset is not None else None, valid, reverse)

    monkeypatch.setattr(masks, "reset_mask", late)
    assert reset_checked(cell)


@pytest.mark.parametrize("cell", CELLS)
def test_state_before_the_step_misread(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight gradient taken with the state after each step and not the one before it."""
    monkeypatch.setattr(masks, "previous", lambda states, *rest: states)
    assert any("grad of weight_hh" in text for text in checked(cell))


def losing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products forget one gradient, where there is one."""
    right, at = scan_backend.weight_gradients, PLACES.index(place)

    def without(*args: Any) -> list[Tensor | None]:
        return [torch.zeros_like(g) if k == at and g is not None else g for k, g in enumerate(right(*args))]

    monkeypatch.setattr(scan_backend, "weight_gradients", without)


@pytest.mark.parametrize("lost", PLACES[: PLACES.index("w_hr")])
def test_a_gradient_lost(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of each argument is looked at, the initial states among them."""
    losing(lost, monkeypatch)
    found = checked("lstm")
    assert found and len({text.split(" is off")[0] for text in found}) == 1


@pytest.mark.parametrize("make", [torch.empty_like, lambda v: v.new_empty(v.shape), lambda v: torch.empty(v.shape)])
@pytest.mark.parametrize("cell", CELLS)
def test_memory_that_nobody_wrote(cell: str, make: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets the last row: the poison of conftest shows it, whatever lay there before."""
    right = REFERENCE.scan_forward

    def forgetful(*args: Any, **kwargs: Any) -> tuple:
        y, *rest = right(*args, **kwargs)
        fresh = make(y)
        fresh[:, :-1] = y[:, :-1]
        return fresh, *rest

    monkeypatch.setattr(REFERENCE, "scan_forward", forgetful)
    assert any("output is off by inf" in text for text in checked(cell))


# Problems that torch.nn does not have, held against the oracle of sequences.py.


def red(complaint: str) -> Any:
    """The comparison inside has to complain in these words."""
    return pytest.raises(AssertionError, match=complaint)


@pytest.mark.parametrize("kind", KINDS)
def test_silent_against_the_oracle(kind: str) -> None:
    check(Case(kind, **EVERYTHING), "reference", F64)


@pytest.mark.parametrize("part", ["dgx", "dgh", "dh"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_against_the_oracle(kind: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = KINDS[kind].cell
    right = STEPS[cell][1]

    def vjp(*args: Any) -> Gradients:
        g = right(*args)
        return g._replace(**{part: 0.999 * getattr(g, part)})

    mutate(monkeypatch, cell, vjp=vjp)
    with red("^d .*: off by"):
        check(Case(kind, **EVERYTHING), "reference", F64)


@pytest.mark.parametrize("part", ["r", "z", "n"])
def test_a_gate_of_the_gru_with_reset_before(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two forms of the GRU differ little; one that takes the other's place in one gate is seen."""
    right = STEPS["gru_reset_before"][0]

    def step(gx: Tensor, s: State, w: Weights) -> Step:
        blocks = list(w.w_hh.chunk(3))
        blocks["rzn".index(part)] = 0.999 * blocks["rzn".index(part)]
        return right(gx, s, w._replace(w_hh=torch.cat(blocks)))

    mutate(monkeypatch, "gru_reset_before", step=step)
    with red("^y: off by"):
        check(Case("gru_reset_before"), "reference", F64)


@pytest.mark.parametrize(
    "kind, lost", [*((kind, "h_r") for kind in KINDS), ("lstm", "c_r"), ("lstm_proj", "c_r"), ("lstm_proj", "w_hr")]
)
def test_a_gradient_lost_that_few_have(kind: str, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(lost, monkeypatch)
    with red("^d weight_hr_l0: off by" if lost == "w_hr" else f"^d {lost}: off by"):
        check(Case(kind, **EVERYTHING), "reference", F64)


def test_a_lost_projection_against_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config("lstm", proj=True, size=SIZE)
    assert parity(config, ["reference"]) == []
    losing("w_hr", monkeypatch)
    found = parity(config, ["reference"])
    assert found and all("grad of weight_hr_l0 is off" in text for text in found)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_where_the_reset_state_belongs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = masks.replace
    monkeypatch.setattr(masks, "replace", lambda state, where, by: right(state, where, None))
    with red("off by"):
        check(Case(kind, **EVERYTHING), "reference", F64)


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("cell", CELLS)
def test_an_error_in_the_reverse_direction_alone(cell: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads only the first half of the output, or the first weights, sees nothing of it."""
    config = Config(cell, bidirectional=True, size=SIZE)
    assert parity(config, ["reference"]) == []
    forward, backward = REFERENCE.scan_forward, REFERENCE.scan_backward

    def scan_forward(*args: Any, reverse: bool, **kwargs: Any) -> tuple:
        y, *rest = forward(*args, reverse=reverse, **kwargs)
        return (1.001 * y if reverse else y), *rest

    def scan_backward(*args: Any) -> Any:
        g = backward(*args)
        return g._replace(dgx=1.001 * g.dgx) if args[-1].reverse else g

    if way == "forward":
        monkeypatch.setattr(REFERENCE, "scan_forward", scan_forward)
    else:
        monkeypatch.setattr(REFERENCE, "scan_backward", scan_backward)
    found = parity(config, ["reference"])
    assert any("output is off" in text if way == "forward" else "_reverse is off" in text for text in found)
    assert not any("weight_ih_l0 is off" in text for text in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_on_the_wrong_side_backwards(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = masks.reset_mask
    monkeypatch.setattr(masks, "reset_mask", lambda reset, valid, reverse: right(reset, valid, False))
    check(Case(kind, resets=((2, 0), (3, 2))), "reference", F64)
    with red("^y: off by"):
        check(Case(kind, resets=((2, 0), (3, 2)), bidirectional=True), "reference", F64)


# The other backends: what is planted there is seen there. (The C++ engine: test_engine_misused.py.)


@pytest.mark.parametrize("error", ["output", "direction", "gradient"])
@pytest.mark.parametrize("cell", CELLS)
def test_torchs_operators_misused(cell: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(cell, size=SIZE)
    assert parity(config, ["torch"]) == []
    right, backward = torch_backend._call, BY_NAME["torch"].backward
    if error == "gradient":
        scaled = lambda *args: [None if g is None else 1.001 * g for g in backward(*args)]  # noqa: E731
        monkeypatch.setattr(BY_NAME["torch"], "backward", scaled)
    elif error == "direction":
        monkeypatch.setattr(torch_backend, "_call", lambda cell, t, reverse, train: right(cell, t, not reverse, train))
    else:

        def off(*args: Any) -> Any:
            outputs = right(*args)
            return outputs._replace(y=1.001 * outputs.y)

        monkeypatch.setattr(torch_backend, "_call", off)
    found = parity(config, ["torch"])
    assert any("grad of" in text if error == "gradient" else "output is off" in text for text in found)


# Beyond the first derivative in eager mode: here whole tests of other files have to fail.


def bent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, where a transform runs it and only there, a hundredth off; gradcheck allows a thousandth."""

    class Bent(type(REFERENCE)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Result:
            result = super().forward(*args, **kwargs)
            return result._replace(outputs=result.outputs._replace(y=1.01 * result.outputs.y))

    monkeypatch.setattr(ops, "REFERENCE", Bent())


TRANSFORMS: dict[str, Callable[[Any], None]] = {
    "vmap": test_transforms.test_vmap_over_inputs_and_states,
    "vmap of an ensemble": test_transforms.test_vmap_over_an_ensemble,
    "jvp and vjp": test_transforms.test_jacobians,
    "hessian": test_transforms.test_hessian,
    "grad": test_transforms.test_torch_func_grad_is_autograds,
}


@pytest.mark.parametrize("test", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU", "GRU-before"])
def test_under_a_transform(layer: str, test: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    make = test_transforms.LAYERS[layer]
    test(make)
    bent(monkeypatch)
    with red("not close"):
        test(make)


@pytest.mark.parametrize("cell", STEPS)
def test_forward_mode(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = (cell, "everything", False, "reference")
    test_derivatives.test_jvp_is_the_slope(*problem)
    bent(monkeypatch)
    with red("not close"):
        test_derivatives.test_jvp_is_the_slope(*problem)
    with pytest.raises(GradcheckError, match="forward"):
        test_derivatives.test_second_derivatives_and_forward_mode(*problem)


@pytest.mark.parametrize("part", ["dgx", "dgh", "dh"])
@pytest.mark.parametrize("cell", STEPS)
def test_second_derivatives(cell: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's backward that torch cannot differentiate in full: first derivatives stay right, second do not."""
    problem = (cell, "everything", False, "reference")
    right = STEPS[cell][1]

    def vjp(*args: Any) -> Gradients:
        g = right(*args)
        value = getattr(g, part)
        return g._replace(**{part: 0.9 * value + 0.1 * value.detach()})

    mutate(monkeypatch, cell, vjp=vjp)
    test_derivatives.test_first_derivatives(*problem)
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        test_derivatives.test_second_derivatives_and_forward_mode(*problem)


def behind_the_operator(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what runs inside the opaque operators, and only there, a thousandth too much."""
    forward, backward = custom_ops.run_forward, custom_ops.run_backward

    def run_forward(*args: Any, **kwargs: Any) -> Result:
        result = forward(*args, **kwargs)
        return result._replace(outputs=result.outputs._replace(y=1.001 * result.outputs.y))

    def run_backward(*args: Any) -> list[Tensor | None]:
        return [None if g is None else 1.001 * g for g in backward(*args)]

    if what == "forward":
        monkeypatch.setattr(custom_ops, "run_forward", run_forward)
    else:
        monkeypatch.setattr(custom_ops, "run_backward", run_backward)


COMPILED: dict[str, Callable[[str], None]] = {
    "compile": lambda kind: test_compile.test_full_graph(test_compile.LAYERS[kind]),
    "export": lambda kind: test_export.test_training_an_exported_program(kind),
}


@pytest.mark.parametrize("what", ["forward", "backward"])
@pytest.mark.parametrize("test", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_behind_the_operator(
    kind: str, test: Callable[[str], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    test(kind)
    behind_the_operator(what, monkeypatch)
    torch._dynamo.reset()
    with red("not close"):
        test(kind)


def test_textbook_gate_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((test_textbook.T, 4, 3), (4, 5), (5, 8), (5, 8), (5, 8))
    names = ("x", "h", "w_z", "w_r", "w")
    book = {name: torch.randn(shape, dtype=F64).requires_grad_() for name, shape in zip(names, shapes)}
    test_textbook.test_cell_reproduces_the_textbook(book)
    test_textbook.test_biases_keep_the_family()
    right = STEPS["gru_reset_before"][0]

    def step(gx: Tensor, s: State, w: Weights) -> Step:
        def turned(v: Tensor) -> Tensor:
            r, z, n = v.chunk(3, -1)
            return torch.cat([r, -z, n], -1)

        return right(turned(gx), s, w._replace(w_hh=turned(w.w_hh.T).T))

    mutate(monkeypatch, "gru_reset_before", step=step)
    with use_backend("reference"), red("not close"):
        test_textbook.test_cell_reproduces_the_textbook(book)
    with use_backend("reference"), red("not close"):
        test_textbook.test_biases_keep_the_family()
