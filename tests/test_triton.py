"""Backend `triton` without a GPU: what it refuses and why, the table of configurations, the launches that a scan makes,
compilation ahead of time, and the interpreter, in processes of its own.

The kernels' numbers are tested in tests/interpreted/.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from test_backends import PLAIN
from torch import Tensor

import rnnkit
from rnnkit.backends import BY_NAME, Outputs, Problem, Tensors, measured, preference, resolve, triton
from rnnkit.cells import CELLS
from rnnkit.kernels import table

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(not triton.installed(), reason="needs Triton: pip install rnnkit[triton]")


def interpreted(*arguments: str) -> None:
    """pytest with these arguments where Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=env)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("which", ["budget", "not budget"])
def test_kernels_in_the_interpreter(which: str) -> None:
    interpreted(str(TESTS / "interpreted" / "test_kernels.py"), "-k", which)


@needs_triton
def test_inside_torch_in_the_interpreter() -> None:
    interpreted(str(TESTS / "interpreted" / "test_in_torch.py"))


@needs_triton
def test_recompute_in_the_interpreter() -> None:
    interpreted(str(TESTS / "test_recompute.py"), "-k", "triton and held or half_types and ranges3 and bfloat16")


@needs_triton
def test_planted_errors_and_what_is_shared_in_the_interpreter() -> None:
    interpreted(str(TESTS / "interpreted" / "test_planted.py"), str(TESTS / "interpreted" / "test_shared.py"))


@needs_triton
def test_what_gpu_check_asks_in_the_interpreter() -> None:
    interpreted(str(TESTS / "interpreted" / "test_examined.py"))


@needs_triton
def test_no_steps_no_rows_and_chunks_in_the_interpreter() -> None:
    chosen = "triton and (chunks or no_steps or left_out)"
    interpreted(str(TESTS / "test_layer_op.py"), "-k", f"{chosen} and not reset_state")


# What it says of a machine.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with Triton and two GPUs, of compute capability 9.0 and 8.0."""
    monkeypatch.setattr(triton, "installed", lambda: True)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: ((9, 0), (8, 0))[k])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton, "capability", triton.capability.__wrapped__)
    monkeypatch.setattr(triton, "missing", triton.missing.__wrapped__)
    return monkeypatch


def reasons(**change: Any) -> list[str]:
    return BY_NAME["triton"].unsupported(Problem(**{**PLAIN, "device": "cuda", **change}))


def test_runs_on_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert reasons(dtype=dtype) == []
    gpu.setattr(torch.version, "hip", "6.4")
    gpu.setattr(torch.cuda, "get_device_capability", lambda k: (7, 0))
    chip = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    gpu.setattr(torch.cuda, "get_device_properties", lambda k: chip)
    assert reasons() == [] and triton.capability() == table.AMD
    chip.gcnArchName = "gfx1100"
    assert reasons() == ["of AMD's GPUs its kernels are compiled for gfx942 alone, got gfx1100"]


def test_says_what_a_user_can_act_upon(gpu: pytest.MonkeyPatch) -> None:
    assert reasons(device="cpu") == ["runs on the device cuda, got cpu"]
    assert reasons(dtype=torch.float64) == ["computes in float32, bfloat16 and float16, got torch.float64"]
    assert reasons(hidden_size=0) == ["needs at least one unit, got H=0"]
    gpu.setattr(torch.cuda, "get_device_capability", lambda k: ((9, 0), (7, 5))[k])
    assert reasons() == ["needs GPUs from compute capability 8.0 on, got one of 7.5"]
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU, and torch sees none" in reasons()[0] and "TRITON_INTERPRET=1" in reasons()[0]
    gpu.setattr(triton, "installed", lambda: False)
    assert reasons() == ["Triton is not installed: pip install rnnkit[triton]"]


def test_auto_asks_torch_first_for_what_torch_knows(gpu: pytest.MonkeyPatch) -> None:
    """Until a device has measured them; what torch has no layer for goes to the kernels."""
    plain = Problem(**{**PLAIN, "device": "cuda"})
    assert preference(plain)[0].name == "cuda" and resolve("auto", plain).name == "torch"
    assert "not measured on a GPU" in str(BY_NAME["triton"].reluctant(plain))
    for extra in ({"lengths": True}, {"reset": True}, {"cell": "gru_reset_before"}, {"recompute": True}):
        assert resolve("auto", plain._replace(**extra)).name == "triton"
    assert resolve("triton", plain).name == "triton"
    gpu.setattr(measured, "TYPICAL", {("cuda", plain.cell, plain.train): ("triton", "torch", "reference")})
    assert resolve("auto", plain).name == "triton"  # from then on the recorded order decides


def test_explain_says_the_regime(gpu: pytest.MonkeyPatch) -> None:
    def detail(**change: Any) -> str:
        return str(BY_NAME["triton"].detail(Problem(**{**PLAIN, "device": "cuda", **change})))

    small = detail(cell="lstm", hidden_size=100, dtype=torch.bfloat16)
    assert small == "persistent: the recurrent weights stay on chip for the whole sequence"
    assert detail(hidden_size=512).startswith("step: no kernel keeps the recurrent weights of H=512 on chip")
    with triton.stepwise(), triton.stepwise():
        assert detail() == "step: RNNKIT_TRITON_REGIME=step asks for it"
    assert detail().startswith("persistent: ") and not triton.STEPWISE


def test_on_a_cpu_the_reasons_are_listed() -> None:
    found = rnnkit.explain(rnnkit.GRU(3, 4), torch.zeros(2, 1, 3)).to_dict()["layers"][0]
    assert found["reasons"]["triton"][-1] == "runs on the device cuda, got cpu"


@pytest.mark.parametrize(("set_to", "kind"), [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_tf32_exactly_where_torch_allows_it(set_to: str, kind: str) -> None:
    """Also where reading `allow_tf32` raises, once the finer setting was used."""
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    try:
        rnn.fp32_precision = set_to
        assert triton.kind(torch.float32) == kind and triton.kind(torch.bfloat16) == "half"
    finally:
        rnn.fp32_precision = before


# The table.


def test_rows_stand_once_and_name_what_there_is() -> None:
    assert len({row[:5] for row in table.PERSISTENT}) == len(table.PERSISTENT)
    for row in table.PERSISTENT:
        assert row.kernel in table.KERNELS and row.side in table.SIDES and row.kind in table.KINDS
        assert row.hidden in table.TILES and row.size in table.TILES and row.size <= row.hidden
        assert row.chips and set(row.chips) <= set(table.CHIPS)
        assert row.size == row.hidden or row.kernel == "lstm_proj"
    assert set(table.CELL_OF.values()) == set(CELLS) - {"rnn_relu"}  # which is rnn_tanh's kernel


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120, table.AMD])
def test_every_problem_has_a_plan(cell: str, capability: int) -> None:
    for kind in table.KINDS:
        for side in table.SIDES:
            plans = [table.plan(cell, side, hidden, 0, kind, capability) for hidden in (1, 32, 33, 64, 100, 257, 4096)]
            assert plans[0].regime == plans[1].regime == "persistent"
            assert plans[-1].regime == plans[-2].regime == "step"
            assert all(plan.precision == ("tf32" if kind == "tf32" else "ieee") for plan in plans)


def test_chips_with_little_shared_memory() -> None:
    assert table.plan("lstm", "forward", 128, 0, "half", 80).regime == "persistent"
    assert table.plan("lstm", "forward", 128, 0, "half", 86).regime == "step"
    assert table.chip_of(121) == ("sm_100", 99 * 1024) and table.chip_of(103)[0] == "sm_100"


# What a scan launches.


class Launches(list):
    """Stands in for kernels/launch.start."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], plan: table.Plan, **arguments: Any) -> None:
        self.append((kernel, grid, arguments))

    @property
    def names(self) -> list[str]:
        return [kernel.__name__ for kernel, _, _ in self]


def scan(cell: str, regime: str, steps: int, batch: int = 33, hidden: int = 40, proj: int = 0) -> tuple[Launches, ...]:
    """The launches of a forward and of a backward on tensors without memory."""
    from rnnkit.kernels import persistent, step

    kind, size = CELLS[cell], proj or hidden

    def some(*sizes: int) -> Tensor:
        return torch.empty(sizes, device="meta")

    t = Tensors(
        some(steps, batch, 3), some(batch, size), some(batch, hidden) if kind.has_c else None,
        some(kind.gates * hidden, 3), some(kind.gates * hidden, size), None, None,
        some(proj, hidden) if proj else None,
    )  # fmt: skip
    module: Any = persistent if regime == "persistent" else step
    plan = table.step("tf32", "")
    both = Launches(), Launches()
    gx = some(steps, batch, kind.gates * hidden)
    y, h_n, c_n, c_all, gates = module.forward(
        kind, gx, t.h_0, t.c_0, t, None, t0=0, reverse=False, save=True, plan=plan, run=both[0]
    )
    grads = Outputs(y, h_n, c_n, c_all)
    module.backward(kind, grads, y, c_all, gates, t, None, reverse=False, plan=plan, run=both[1])
    return both


@needs_triton
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_is_one_launch_whatever_the_length(cell: str) -> None:
    for steps in (1, 70_000):
        for launches in scan(cell, "persistent", steps):
            ((kernel, grid, arguments),) = launches
            assert grid == (3,) and arguments["n"] == steps
            fixed = {p.name for p in kernel.params if p.is_constexpr}
            unspecialized = {p.name for p in kernel.params if p.do_not_specialize}
            assert "n" in unspecialized - fixed  # one compilation serves every T


@needs_triton
@pytest.mark.parametrize(
    ("cell", "proj", "forward", "backward"),
    [("rnn_tanh", 0, 2, 2), ("lstm", 0, 2, 2), ("gru", 0, 2, 2), ("lstm", 7, 4, 4), ("gru_reset_before", 0, 4, 4)],
)
def test_a_step_is_few_launches(cell: str, proj: int, forward: int, backward: int) -> None:
    """Tensors on `meta` have no values, so a copy to the host would have raised."""
    launches = scan(cell, "step", 5, proj=proj)
    assert [len(some) for some in launches] == [5 * forward, 5 * backward]
    for some in launches:
        for kernel, _, arguments in some:
            assert not {"k", "n"} & set(arguments) - {p.name for p in kernel.params if p.do_not_specialize}


# Compilation ahead of time.


def compiled_lines() -> list[Any]:
    from rnnkit.benchmarks.compile_table import COMPILED, Line

    with COMPILED.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    hints = get_type_hints(Line)
    assert lines and list(lines[0]) == list(Line._fields)
    return [Line(**{name: hints[name](v) for name, v in line.items()}) for line in lines]


def test_the_record_holds_every_configuration_and_none_is_wrong() -> None:
    from rnnkit.benchmarks.compile_table import jobs

    lines = compiled_lines()
    assert [line for line in lines if line.wrong] == []
    recorded = {(*line[:3], *line[4:12]) for line in lines if line.regime == "persistent"}
    wanted = {
        ("persistent", j.kernel, j.side, j.hidden, j.proj, j.dtype, j.kind, j.chip, *j.plan[1:2], *j.plan[4:6])
        for j in jobs()
        if j.plan.regime == "persistent"
    }
    assert recorded == wanted, "make triton-compile"
    for row in table.PERSISTENT:
        of = [v for v in lines if v.regime == "persistent" and table.tile(v.proj or v.hidden) == row.size]
        mine = [v.shared for v in of if (v.kernel, v.side, v.hidden, v.kind) == (row[:3] + row[4:5])]
        assert max(mine) == row.shared, row
    steps = {(line.chip, line.dtype, line.kind) for line in lines if line.regime == "step"}
    assert len(steps) == len(table.CHIPS) * 4


@needs_triton
def test_some_of_the_table_compiles(tmp_path: Path) -> None:
    """Every 60th scan; CI and `make triton-compile` take the whole."""
    command = [sys.executable, "-m", "rnnkit.benchmarks.compile_table", "--part", "1/60", "--workers", "1"]
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scans" in done.stdout


@needs_triton
def test_a_spill_is_found(tmp_path: Path) -> None:
    """An LSTM of 128 units on four warps keeps more than its registers hold."""
    code = (
        "from rnnkit.benchmarks import compile_table as c; from rnnkit.kernels import table\n"
        "row = table.Row('lstm', 'backward', 128, 128, 'tf32', ('sm_80',), 4, 0)\n"
        "table.PERSISTENT, table.KERNELS = (row,), ()\n"
        "raise SystemExit(c.main(['--workers', '1', '--part', '1/1', '--to', 'nowhere']))"
    )
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent, env=env)
    assert done.returncode == 1 and "lstm.backward: spills" in done.stderr, done.stdout + done.stderr
