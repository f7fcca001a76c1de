"""What a step reads besides its arguments is seen where it changes, or refused by name."""

from __future__ import annotations

import builtins
import functools
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from custom_cells import StepSpec, spec_of
from torch import Tensor, autocast, inference_mode, is_grad_enabled

from rnnkit.custom import check
from rnnkit.custom import fingerprint as fp
from rnnkit.custom.check import program_of
from rnnkit.custom.errors import NotTraced
from rnnkit.custom.fingerprint import fingerprint, of_value

HIDDEN = 8


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program of another test."""
    monkeypatch.setattr(check, "_cache", {})


def _reason(spec: StepSpec) -> str:
    checked = program_of(spec, HIDDEN)
    assert checked.program is None and checked.reason is not None
    return checked.reason


SCALE = 2.0
TABLE = [1.0, 2.0]


def helper(x: Tensor) -> Tensor:
    return x * SCALE


def uses_global(a: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return (torch.tanh(helper(a)),)


def test_a_global_that_changes_gives_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(uses_global, 1, ("h",))
    first = program_of(spec, HIDDEN)
    assert program_of(spec, HIDDEN) is first
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    second = program_of(spec, HIDDEN)
    assert first.program is not None and second.program is not None
    assert first.program.forward.nodes != second.program.forward.nodes


def test_a_closure_that_changes_gives_another_program() -> None:
    scale = 2.0

    def step(a: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (torch.tanh(torch.stack([x * scale for x in (a,)])[0]) * scale,)

    key = fingerprint(step)
    assert fingerprint(step) == key
    scale = 3.0
    assert fingerprint(step) != key


class Settings:
    scale = 1.0


def test_attributes_and_defaults_are_read() -> None:
    settings = Settings()

    def step(a: Tensor, h: Tensor, k: float = 2.0) -> tuple[Tensor, ...]:
        return (a * settings.scale * Settings.scale,)

    key = fingerprint(step)
    settings.scale = 2.0
    other = fingerprint(step)
    assert other != key
    step.__defaults__ = (3.0,)
    assert fingerprint(step) != other


def test_options_of_every_kind() -> None:
    for value in (
        1.5,
        "tanh",
        None,
        True,
        torch.tanh,
        F.silu,
        torch.nn.GELU(),
        (1, 2),
        functools.partial(F.elu, alpha=2.0),
    ):
        assert of_value(value, "activation") == of_value(value, "activation")
    assert of_value(torch.nn.LeakyReLU(0.1), "f") != of_value(torch.nn.LeakyReLU(0.2), "f")
    assert of_value(0.0, "k") != of_value(-0.0, "k")
    assert of_value(1, "k") != of_value(True, "k")


def test_what_could_change_unseen_is_refused_by_name() -> None:
    tensor, module, table = torch.ones(1), torch.nn.Linear(2, 2), {"scale": 2.0}
    counter = 0

    def counts(a: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        nonlocal counter
        counter += 1
        return (a * counter,)

    cases = {
        "TABLE": lambda a, h: (a * TABLE[0],),
        "table.get": lambda a, h: (a * table.get("scale"),),
        "tensor": lambda a, h: (a * tensor,),
        "module": lambda a, h: (module(a),),
        "counter": counts,
    }
    for name, step in cases.items():
        with pytest.raises(NotTraced, match=name.replace(".", r"\.")):
            fingerprint(step)
        assert name in _reason(StepSpec("cell", step, 1, ("h",), weights=(("w_hh", 1),)))


def test_a_step_that_is_another_each_time() -> None:
    """A number that torch itself changes, and one that is imported inside."""

    def step(a: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        torch.set_printoptions(precision=torch._tensor_str.PRINT_OPTS.precision + 1)
        return (a * torch._tensor_str.PRINT_OPTS.precision,)

    def imported(a: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        import random

        return (a * random.random(),)

    try:
        assert "something else each time" in _reason(spec_of(step, 1, ("h",)))
    finally:
        torch.set_printoptions(profile="default")
    assert "imports random" in _reason(spec_of(imported, 1, ("h",)))


def test_the_short_way_to_a_fingerprint_sees_what_the_long_one_sees() -> None:
    """A global, a closure, a function that is read, its code and its defaults: each changed after a look."""
    space: dict[str, Any] = {"torch": torch, "factor": 2.0}
    scale = 1.0
    exec("def helper(x, by=3.0):\n    return x * by\n", space)
    exec("def step(gx, h):\n    return torch.tanh(helper(gx) * factor)\n", space)
    step, helper = space["step"], space["helper"]

    def closed(gx: Tensor, h: Tensor) -> Tensor:
        return gx * scale

    first = fingerprint(step)
    assert fingerprint(step) == first
    space["factor"] = 4.0
    second = fingerprint(step)
    assert second != first
    helper.__defaults__ = (5.0,)
    third = fingerprint(step)
    assert third != second
    helper.__code__ = (lambda x, by: x + by).__code__
    fourth = fingerprint(step)
    assert fourth != third
    space["helper"] = torch.sigmoid
    assert fingerprint(step) != fourth
    before = fingerprint(closed)
    scale = 2.0
    assert fingerprint(closed) != before


def test_a_wrapper_has_a_fingerprint_of_its_own() -> None:
    """`functools.wraps` copies what hangs on the function."""
    key = fingerprint(uses_global)

    @functools.wraps(uses_global)
    def other(a: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(a)

    assert fingerprint(other) != key


class _Config:
    scale = 1.0


def _scale_of(config: type[_Config]) -> float:
    return config.scale


def _scaled(x: Tensor) -> Tensor:
    return x * _scaled.scale  # type: ignore[attr-defined]


_scaled.scale = 1.0  # type: ignore[attr-defined]


def test_what_helpers_and_other_names_reach_is_seen() -> None:
    """A class that is handed on, one under another name, an attribute of a function: another number, another key."""

    def handed(a: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(a * _scale_of(_Config))

    def named(a: Tensor, h: Tensor) -> Tensor:
        config = _Config
        return torch.tanh(a * config.scale)

    def held(a: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(_scaled(a))

    before = [fingerprint(step) for step in (handed, named, held)]
    try:
        _Config.scale = _scaled.scale = 2.0  # type: ignore[attr-defined]
        after = [fingerprint(step) for step in (handed, named, held)]
    finally:
        _Config.scale = _scaled.scale = 1.0  # type: ignore[attr-defined]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_a_number_that_changes_while_a_program_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread would change it: the program that is kept is that of what stands there after it."""
    make, spec, made = check._alone, spec_of(uses_global, 1, ("h",)), []

    def changing(*args: Any) -> check.Checked:
        made.append(make(*args))
        monkeypatch.setitem(globals(), "SCALE", 3.0)
        return made[-1]

    monkeypatch.setattr(check, "_alone", changing)
    found = program_of(spec, HIDDEN)
    assert len(made) == 2 and found is made[1] and program_of(spec, HIDDEN) is found
    monkeypatch.setattr(check, "_alone", make)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    first = program_of(spec, HIDDEN).program
    assert first is not None and found.program is not None and first.forward.nodes != found.program.forward.nodes
    check._cache.clear()
    spec.met.clear()

    def restless(*args: Any) -> check.Checked:
        monkeypatch.setitem(globals(), "SCALE", SCALE + 1.0)
        return make(*args)

    monkeypatch.setattr(check, "_alone", restless)
    assert "changed while" in _reason(spec)


def test_what_was_met_does_not_gather() -> None:
    spec = spec_of(uses_global, 1, ("h",))
    for hidden in range(2, 22):
        program_of(spec, hidden)
    assert 0 < len(spec.met) <= check._MET
    assert program_of(spec, 21) is program_of(spec, 21)


def test_a_step_that_reads_attributes_is_walked_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(lambda a, h: a * Settings.scale, 1, ("h",))
    found, walked, of = program_of(spec, HIDDEN), [], fp._of_function

    def counted(*args: Any) -> Any:
        walked.append(args)
        return of(*args)

    monkeypatch.setattr(fp, "_of_function", counted)
    assert program_of(spec, HIDDEN) is found and len(walked) == 1


def test_ways_around_a_name_are_refused() -> None:
    def reached(a: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(a * getattr(_Config, "scale"))  # noqa: B009

    def whole(a: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(a * globals()["_Config"].scale)

    def asked(a: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(a) if torch.is_grad_enabled() else a

    def counted(a: Tensor, h: Tensor) -> Tensor:
        return a if a.shape[0] > 17 else torch.tanh(a)

    for step, word in (
        (reached, "getattr"),
        (whole, "globals"),
        (asked, "is_grad_enabled"),
        (counted, "number of rows"),
    ):
        assert word in _reason(spec_of(step, 1, ("h",)))


@functools.wraps(F.relu)
def _as_relu(x: Tensor) -> Tensor:
    return x * SCALE


def test_a_helper_that_bears_the_name_of_torchs_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = torch.enable_grad()(_as_relu)  # torch's own function, which holds the user's
    assert quiet.__module__ == _as_relu.__module__ == "torch.nn.functional"
    before = of_value(_as_relu, "f"), of_value(F.relu, "f")
    with pytest.raises(NotTraced, match="detach"):
        of_value(quiet, "f")
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    after = of_value(_as_relu, "f"), of_value(F.relu, "f")
    assert before[0] != after[0] and before[1] == after[1]


def test_what_is_not_fixed_is_refused_under_any_name() -> None:
    around, tools = builtins.globals, types.ModuleType("tools")
    tools.torch = torch  # type: ignore[attr-defined]
    words = {
        "asks torch for get_num_threads": lambda a, h: a * tools.torch.get_num_threads(),
        "builtins.globals": lambda a, h: a * builtins.globals()["SCALE"],
        "around": lambda a, h: a * around()["SCALE"],
        "__globals__": lambda a, h: a * helper.__globals__["SCALE"],
        "asks torch for is_grad_enabled": lambda a, h: a if is_grad_enabled() else torch.tanh(a),
        "^autocast inside the step: put torch.autocast around": lambda a, h: (autocast("cpu"), a)[1],
        "^torch.autocast inside the step: put": autocast("cpu", dtype=torch.bfloat16)(lambda a, h: a),
        "detach": lambda a, h: (inference_mode(), a)[1],
    }
    for word, step in words.items():
        with pytest.raises(NotTraced, match=word):
            fingerprint(step)


@torch.no_grad()
def _decorated(a: Tensor) -> Tensor:
    return torch.sigmoid(a)


def _in_no_grad(a: Tensor, h: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.sigmoid(a)
    return z * a


def _in_inference_mode(a: Tensor, h: Tensor) -> Tensor:
    with torch.inference_mode():
        z = torch.sigmoid(a)
    return z * a


def _with_grad_set(a: Tensor, h: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        z = torch.sigmoid(a)
    return z * a


def test_autocast_belongs_around_the_layer() -> None:
    def step(a: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (torch.tanh(a),)

    reason = _reason(spec_of(step, 1, ("h",)))
    assert reason == "torch.autocast inside the step: put torch.autocast around the call of the layer instead"


@pytest.mark.parametrize("step", [_in_no_grad, _in_inference_mode, _with_grad_set, lambda a, h: _decorated(a) * a])
def test_no_grad_in_a_step_is_told_to_detach(step: Any) -> None:
    reason = _reason(spec_of(step, 1, ("h",)))
    assert "torch.no_grad() and its like inside the step: write .detach() on the value instead" in reason
    assert "enabled" not in reason and "ctx_factory" not in reason
