"""What `gpu-check` asks of the fused backends alone, where there is no GPU: that every kernel is met, that each fault
is named (other bits the second time, a stale graph, a wrong TF32), and that several processes find what one finds."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cuda import Fused, Restless, put, rerun

from rnnkit import ops
from rnnkit.backends import BY_NAME, LayerOutputs
from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.backends.triton import backend as triton
from rnnkit.backends.triton import configs as triton_configs
from rnnkit.benchmarks.gpu_check import bitwise_checks, parity, parity_cases, reference_runs, worker_pool
from rnnkit.benchmarks.gpu_check import main as gpu_check
from rnnkit.benchmarks.gpu_check.parity_cases import BF16, F16, F32, KINDS, ParityCase, Variant, kernels_of, select
from rnnkit.benchmarks.gpu_check.reference_runs import truncate_to_tf32
from rnnkit.benchmarks.speed.targets import FUSED

SMALL = Variant((4, 7, 2, 5), lengths=True, resets=True, reset_state=True)
TF32 = ParityCase("lstm", replace(SMALL, both=True), F32, tf32=True, fused=True)


def examined(*every: ParityCase, backend: Fused | None = None, patch: pytest.MonkeyPatch) -> parity.Findings:
    """What is found on the CPU, with this backend in the place of `triton`."""
    put(patch, backend or Fused())
    patch.setattr(bitwise_checks, "graph", rerun)
    patch.setattr(bitwise_checks, "COMPILER", "aot_eager")
    findings = parity.Findings()
    parity.examine(findings, "cpu", every, ("triton",))
    return findings


# What is asked.


@pytest.mark.parametrize("capability", [80, 86, 90, 100, triton_configs.AMD])
def test_every_persistent_kernel_is_met_with_everything_on(capability: int) -> None:
    def everything(p: ParityCase) -> bool:
        v = p.variant
        return (
            v.lengths and v.resets and v.reset_state and v.all_states and v.both and v.size[1] > 2 * triton_configs.ROWS
        )

    every = select(False, capability)
    met = {row for p in every if everything(p) for row in kernels_of(p, capability)}
    assert met == set(triton_configs.rows_of(capability))
    assert len(every) == len(set(every)) and set(select(True)) < set(every)


def test_what_goes_wrong_on_large_things_is_asked() -> None:
    every = select(False, 90)
    fused = [p for p in every if p.fused]
    for kind in KINDS:
        mine = [p for p in fused if p.kind == kind]
        assert {p.variant.size[3] for p in mine} >= {tile + by for tile in triton_configs.TILES for by in (-1, 1)}
        assert {p.precision for p in mine if p.stepwise} == {"bfloat16", "float32", "tf32"}
        assert {p.stepwise for p in mine if p.calls} == {False, True}
        assert {p.precision for p in mine if not p.stepwise} >= {"bfloat16", "float16", "float32", "tf32"}
    sizes = [p.variant.size for p in fused]
    assert {33, 100} <= {rows for _, rows, _, _ in sizes} and max(steps for steps, *_ in sizes) > 65_535
    far = [p for p in fused if p.variant.many]
    assert {p.stepwise for p in far} == {False, True}
    for p in far:
        steps, _, _, hidden = p.variant.size
        assert steps * p.variant.many * hidden > 2**31 and p.dtype == BF16 and 2**35 < p.memory < 2**36
        assert (p.variant.many - p.variant.size[1]) % triton_configs.ROWS == 0, "its rows keep their places in a tile"
    last = [max(every.index(p) for p in some) for some in (every[:18], [p for p in every if p.calls], fused)]
    assert last == sorted(last) and last[0] < 18, "the telling ones first"


def test_the_problems_of_fused_backends_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seventh, and all that are step by step: the reference passes where kernels will be asked."""
    every = [p for p in select(False, 90) if p.fused and not (p.long or p.variant.many or p.calls)]
    of_each = [[p for p in every if p.precision == one and not p.stepwise] for one in {p.precision for p in every}]
    every = [p for p in every if p.stepwise] + [p for some in of_each for p in some[::7]]
    findings = examined(*every, patch=monkeypatch)
    assert findings.wrong == findings.failing == [] and sum(findings.ran.values()) == len(every)
    assert {name for _, name in findings.ran} == {"bfloat16", "float16", "float32", "tf32"}


def test_a_problem_is_run_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, str]] = []
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision

    def look(t: Any) -> Any:
        seen.append((triton.regimes.only, triton.kind(F32)))
        return t

    for tf32, stepwise in itertools.product((False, True), repeat=2):
        seen.clear()
        case = replace(TF32, tf32=tf32, stepwise=stepwise)
        assert examined(case, backend=Fused(before=look), patch=monkeypatch).wrong == []
        assert set(seen) == {("step" if stepwise else None, "tf32" if tf32 else "ieee")}
    assert triton.regimes.only is None and rnn.fp32_precision == before


# What goes wrong.


@pytest.mark.parametrize(("what", "named"), [("after", "y"), ("gradients", "gradient of x")])
def test_other_bits_the_second_time(what: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(ParityCase("gru", SMALL, F32), backend=Restless(what), patch=monkeypatch)
    assert any(f"triton: {named} has other bits the second time, in gru" in line for line in found.wrong), found.wrong
    assert found.culprits == {("triton", "gru", "float32")}


def test_tf32_is_held_to_ten_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrowed(keep: int) -> Fused:
        def less(v: torch.Tensor) -> torch.Tensor:
            lost = 23 - keep
            return (v.detach().view(torch.int32) >> lost << lost).view(F32)

        return Fused(before=lambda t: t._replace(w_hh=less(t.w_hh)))

    every = [replace(TF32, kind=kind) for kind in KINDS]
    found = examined(*every, backend=narrowed(10), patch=monkeypatch)
    assert found.wrong == [] and 0.1 < found.worst["triton", "tf32"][0] <= 1
    for kind, case in zip(KINDS, every, strict=True):
        found = examined(case, backend=narrowed(7), patch=monkeypatch)
        assert any("is off by" in line and f"in {kind} in tf32" in line for line in found.wrong), "bfloat16's bits"
        exact = replace(case, tf32=False)
        found = examined(exact, backend=narrowed(10), patch=monkeypatch)
        assert any(f"in {kind} in float32" in line for line in found.wrong), "float32 is not TF32"


def test_what_tf32_costs_is_what_its_bits_cost() -> None:
    """One step from h_0 by hand: the baseline loses what truncated operands lose, and its gradient likewise."""
    case = ParityCase("rnn_tanh", Variant((1, 3, 2, 5)), F32, tf32=True)
    given = parity_cases.draw(case, 0)
    leaves, weights = given.to(F32, "cpu")
    v = {**leaves, **weights}
    h = truncate_to_tf32(v["h_0"][0].detach())
    inside = leaves["x"][0] @ v["weight_ih_l0"].T + v["bias_ih_l0"] + v["bias_hh_l0"]
    wanted = torch.tanh(inside + h @ truncate_to_tf32(v["weight_hh_l0"].detach()).T)
    got = reference_runs.by_tf32(case, given, leaves, weights)["y"][0]
    assert (
        (got - wanted).abs().max()
        < 1e-6
        < (got - reference_runs.by_steps(case, given, leaves, weights)["y"][0]).abs().max()
    )
    da = 1 - wanted.detach() ** 2
    back = torch.autograd.grad(got.sum(), leaves["h_0"])[0][0]
    expected = truncate_to_tf32(da) @ truncate_to_tf32(v["weight_hh_l0"].detach())
    assert (back - expected).abs().max() < 1e-6
    assert float((truncate_to_tf32(v["x"].detach()) / v["x"].detach() - 1).abs().max()) < 2**-10


def a_stale_graph(work: Callable[[], object]) -> Callable[[], object]:
    work()
    return lambda: None


def one_without_its_backward(work: Any) -> Callable[[], object]:
    """What the backward gave is from the capture."""

    def replay() -> None:
        old = {name: v for name, v in work.results.items() if name.startswith("gradient")}
        work()
        work.results |= old

    work()
    return replay


def refuses(work: Callable[[], object]) -> Callable[[], object]:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


CALLED = ParityCase("rnn_tanh", replace(SMALL, size=(4, 20, 2, 5)), BF16, calls=True, fused=True)


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (a_stale_graph, "in a CUDA graph: y has other bits than in a plain call, in rnn_tanh in bfloat16"),
        (one_without_its_backward, "in a CUDA graph: gradient of x has other bits"),
        (refuses, "in a CUDA graph: raised RuntimeError: operation not permitted when stream is capturing, in rnn"),
    ],
)
def test_a_graph_that_is_wrong(graph: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Fused())
    monkeypatch.setattr(bitwise_checks, "graph", graph)
    monkeypatch.setattr(bitwise_checks, "COMPILER", "aot_eager")
    findings = parity.Findings()
    parity.examine(findings, "cpu", [CALLED], ("triton",))
    assert any(said in line for line in findings.wrong) and all("in a CUDA graph" in line for line in findings.wrong)
    assert (graph is one_without_its_backward) == all("gradient" in line for line in findings.wrong)


@pytest.mark.parametrize(("kind", "both"), [*((kind, False) for kind in KINDS), ("lstm", True)])
def test_every_call_is_as_a_plain_one(kind: str, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = replace(CALLED, kind=kind, variant=replace(CALLED.variant, both=both))
    assert examined(called, patch=monkeypatch).wrong == []


def test_a_row_that_looks_at_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(v: LayerOutputs) -> LayerOutputs:
        return v._replace(y=v.y + v.y.mean(1, keepdim=True) * 0)

    found = examined(CALLED, backend=Fused(after=mixed), patch=monkeypatch)
    assert any("among other rows: y has other bits" in line for line in found.wrong)
    assert all("among other rows" in line for line in found.wrong)


def test_a_compiler_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, inputs: Any) -> Callable[..., Any]:
        return lambda *given: [v * 1.01 if v.is_floating_point() else v for v in module(*given)]

    put(monkeypatch, Fused())
    monkeypatch.setattr(bitwise_checks, "graph", rerun)
    for compiler, said in ((wrong, "compiled: y has other bits"), ("nobody", "compiled: raised InvalidBackend")):
        monkeypatch.setattr(bitwise_checks, "COMPILER", compiler)
        findings = parity.Findings()
        parity.examine(findings, "cpu", [CALLED], ("triton",))
        assert any(said in line for line in findings.wrong) and all("compiled" in line for line in findings.wrong)


def test_an_autocast_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "layer_dtypes", lambda cell, t, fused: (BF16, F32))  # as a CPU's GRU
    found = examined(CALLED, patch=monkeypatch)
    assert any("under autocast: y has other bits" in line for line in found.wrong)


# Large things.


MANY = ParityCase("lstm", replace(SMALL, many=103), F32, fused=True)


def test_rows_among_many_are_those_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined(MANY, patch=monkeypatch).wrong == []

    def far(v: LayerOutputs) -> LayerOutputs:
        return v._replace(y=torch.cat([v.y[:, :-2], v.y[:, -2:] * 1.01], 1))  # the last row has no steps

    found = examined(MANY, backend=Fused(after=far), patch=monkeypatch)
    assert any("y is off by" in line and "among 103 rows" in line for line in found.wrong)


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "memory", lambda device: 2.0**30)
    far = next(p for p in select(False) if p.variant.many)
    found = examined(far, MANY, patch=monkeypatch)
    (line,) = [line for line in found.lines() if "memory" in line]
    assert line.startswith(
        "left out for want of memory: rnn_tanh in bfloat16 (T 64, B 32, I 1, H 256, among 131200 rows"
    )
    assert line.endswith("needs 48 GiB, 1 are free") and found.wrong == [] and sum(found.ran.values()) == 1


def test_the_truth_of_long_ones_is_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.dtype, str]] = []
    real = parity.numbers

    def look(runner: Any, case: ParityCase, given: Any, dtype: torch.dtype, device: str) -> Any:
        asked.append((dtype, device))
        return real(runner, case, given, dtype, "cpu")

    monkeypatch.setattr(parity, "numbers", look)
    monkeypatch.setattr(parity_cases, "LONG", 3)
    put(monkeypatch, Fused())
    monkeypatch.setattr(parity, "memory", lambda device: 0.0)
    findings = parity.Findings()
    with torch.device("cpu"):
        parity._examine(findings, "cpu:0", ParityCase("gru", Variant((4, 30, 2, 5)), F16), ("triton",))
    assert asked[0] == (torch.float64, "cpu:0") and findings.wrong == []
    assert {p.variant.size[0] for p in select(False) if p.variant.size[0] > 1000} == {70_000}


# Several processes.


class Deadly(ParityCase):
    """Ends the process that takes it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


class Endless(ParityCase):
    """Never comes back."""

    def __reduce__(self) -> tuple[Any, ...]:
        return time.sleep, (1000,)


def crewed(every: list[ParityCase], seconds: float = 600.0) -> tuple[parity.Findings, list[int]]:
    findings, told = parity.Findings(), []
    worker_pool.work(findings, "cpu", every, ("reference", "triton"), lambda done, what: told.append(done), seconds, 2)
    return findings, told


def test_several_processes_find_what_one_finds() -> None:
    every = [ParityCase(kind, SMALL, F32) for kind in ("lstm", "gru")] + [TF32]
    findings, told = crewed(every)
    alone = parity.Findings()
    parity.examine(alone, "cpu", every, ("reference", "triton"))
    assert told == [1, 2, 3] and findings == alone and findings.ran["reference", "float32"] == 2
    assert findings.wrong == [] and sum(findings.skipped["triton"].values()) >= 3
    late, told = crewed(every * 4, 0.0)
    assert late.left >= 12 - worker_pool.MOST and late.left + len(told) <= 12 and not late.ended
    late, told = crewed([every[0], MANY, every[1]], 0.0)
    assert late.left == 2 and told == [], "a large one has its turn alone, and does not begin late"


def test_what_several_found_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [ParityCase("lstm", SMALL, F32), ParityCase("gru", SMALL, F32), replace(TF32, kind="gru"), MANY]
    wrong = Fused(after=lambda v: v._replace(y=v.y * 1.01))
    whole, parts = examined(*every, backend=wrong, patch=monkeypatch), parity.Findings(skipped={"cpu": {"why": 1}})
    for case in every:
        parts.add(examined(case, backend=wrong, patch=monkeypatch))
    other = parity.Findings(left=1, ended=True, without=["a"], failing=["b"], skipped={"cpu": {"why": 2}})
    parts.add(other)
    assert parts.wrong == whole.wrong != [] and parts.culprits == whole.culprits
    assert parts.culprits == {("triton", p.kind, p.precision) for p in every}
    assert (parts.ran, parts.worst, parts.kernels) == (whole.ran, whole.worst, whole.kernels)
    assert (parts.left, parts.ended, parts.without, parts.failing) == (1, True, ["a"], ["b"])
    assert parts.skipped == {"cpu": {"why": 3}}


def test_an_error_of_the_examination_is_said_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found, future = parity.Findings(), Future()  # type: ignore[var-annotated]
    future.set_exception(ValueError("no such thing"))
    assert worker_pool._take(found, future, next(iter(parity_cases.persistent(90))))
    assert found.wrong[0].startswith("ValueError: no such thing, where this is examined: ") and not found.ended

    def broken(case: ParityCase) -> list[str]:
        raise ImportError("libtriton.so: cannot open")

    monkeypatch.setattr(BY_NAME["triton"], "unsupported", broken)
    every, told = [ParityCase("gru", SMALL, F32), ParityCase("lstm", SMALL, F32)], []
    parity.examine(found, "cpu", every, ("reference", "triton"), lambda done, what: told.append(done))
    assert told == [1, 2] and not found.ended
    assert [line.partition(" (")[0] for line in found.wrong[1:]] == [
        f"ImportError: libtriton.so: cannot open, where this is examined: {p.kind} in float32" for p in every
    ]


def test_a_process_that_ends_is_said_and_the_rest_goes_on() -> None:
    """Which of those that had begun it was is found out; a compiler that crashes is no device that fails."""
    every = [Deadly("lstm", SMALL, F32), *(ParityCase(kind, SMALL, F32) for kind in ("gru", "rnn_tanh", "lstm"))]
    findings, told = crewed(every)
    assert not findings.ended and len(told) == 4 and findings.ran["reference", "float32"] == 3
    (line,) = findings.wrong
    assert line.startswith("triton: ended its process, in lstm in float32")
    assert findings.culprits == {("triton", "lstm", "float32")}


def test_a_device_that_fails_with_a_process_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "works", lambda device: False)
    findings, _ = crewed([Deadly("lstm", SMALL, F32), ParityCase("gru", SMALL, F32)])
    assert findings.ended and len(findings.wrong) == 1
    assert findings.wrong[0].startswith("the device fails, and the examination ends, in or near lstm in float32")


def test_what_hangs_is_said_and_nobody_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been a compiler; a device that still runs is asked on."""
    monkeypatch.setattr(worker_pool, "GRACE", 0.1)
    for runs in (True, False):
        monkeypatch.setattr(worker_pool, "works", lambda device, runs=runs: runs)
        findings, _ = crewed([Endless("lstm", SMALL, F32)], 0.0)
        assert findings.wrong[0].startswith("triton: did not end within 0.1 s after time was up, in lstm in float32")
        assert findings.ended != runs and findings.culprits == {("triton", "lstm", "float32")}
        assert not multiprocessing.active_children()

    def stop(done: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker_pool.work(parity.Findings(), "cpu", [CALLED, Endless("gru", SMALL, F32)], ("triton",), stop, 600.0, 2)
    assert not multiprocessing.active_children()


def test_a_large_problem_has_the_device_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[ParityCase]] = []

    def wave(
        findings: parity.Findings, device: str, every: list[ParityCase], *rest: Any
    ) -> tuple[list[Any], list[Any]]:
        seen.append(every)
        return [], []

    monkeypatch.setattr(worker_pool, "_wave", wave)
    every = select(False, 90)
    crewed(every)
    assert [p for some in seen for p in some] == every and len(seen) < 10
    assert all(len(some) == 1 for some in seen if any(p.memory for p in some))
    freed: list[str] = []
    monkeypatch.setattr(parity, "_examine", lambda findings, device, case, backends: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("all"))
    parity.examine(parity.Findings(), "cuda", every)
    assert len(freed) == sum(p.memory > 0 for p in every) > 0


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert [worker_pool.size(cases) for cases in (1, 8, 300)] == [1, 2, 8]
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert worker_pool.size(300) == 1
    assert worker_pool.count("12") == 12
    for wrong in ("0", "-1", "two"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be a whole number above 0, got {wrong}"):
            worker_pool.count(wrong)


def test_the_kernels_that_ran_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Fused())
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(triton, "chip", lambda index=None: 90)
    monkeypatch.setattr(triton, "capability", lambda index=None: 90)
    findings = parity.Findings()
    row = ParityCase("lstm_proj", Variant((2, 3, 2, 64), proj=48), BF16, fused=True)
    parity.examine(findings, "cpu", [row, replace(row, stepwise=True)], ("triton",))
    assert {r[:5] for r in findings.kernels} == {("lstm_proj", side, 64, 64, "half") for side in triton_configs.SIDES}
    (line,) = gpu_check.kernels(findings)
    assert line.endswith(f"2 of {len(triton_configs.rows_of(90))} persistent kernels of sm_90 ran") and FUSED
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "machine", cuda.machine._replace(capability=lambda index: 90))
    put(monkeypatch, Fused(), "cuda")
    small = ParityCase("gru", Variant((2, 3, 2, 64)), F16, fused=True)
    parity.examine(findings, "cpu", [small, replace(small, stepwise=True), replace(small, kind="lstm")], ("cuda",))
    _, line = gpu_check.kernels(findings)
    assert line == f"cuda       3 of {len(cuda_configs.able(90))} kernels that a GPU of 9.0 can hold ran"
    names = {row.name for row in findings.kernels if isinstance(row, cuda_configs.CompiledKernel)}
    assert names == {"cta_gru_fp16_64", "step_gru_fp16_8", "cta_lstm_fp16_64"}


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_every_cuda_kernel_is_met(capability: int) -> None:
    rows = cuda_configs.able(capability)
    every = [p for p in select(False, None, rows) if p.fused]
    assert {parity_cases.compiled_for(p, capability) for p in every} >= set(rows)
    assert len(every) == len(set(every))
