"""Backend `triton` without a GPU: what it refuses and why, the table of configurations, the launches that a scan makes,
compilation ahead of time, and the interpreter, in processes of its own.

The kernels' numbers are tested in tests/triton/interpreted/.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_backends import PLAIN
from torch import Tensor

import rnnkit
from rnnkit.backends import BY_NAME, LayerInputs, LayerOutputs, LayerSpec, dispatch_times, preference, select_backend
from rnnkit.backends import gpu as questions
from rnnkit.backends.triton import backend as triton
from rnnkit.backends.triton import configs as triton_configs
from rnnkit.cells import CELLS

TESTS = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(not triton.installed(), reason="needs Triton: pip install rnnkit[triton]")


def interpreted(*arguments: str, **given: str) -> None:
    """pytest with these arguments where Triton interprets, and with `given` in its environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", **given}
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=env)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("which", ["budget", pytest.param("not budget", marks=pytest.mark.long)])
def test_kernels_in_the_interpreter(which: str) -> None:
    interpreted(str(TESTS / "triton" / "interpreted" / "test_kernels.py"), "-k", which, "-m", "not long")


@needs_triton
@pytest.mark.long
def test_more_kernels_in_the_interpreter() -> None:
    interpreted(str(TESTS / "triton" / "interpreted" / "test_kernels.py"), "-m", "long")


@needs_triton
@pytest.mark.long
def test_inside_torch_in_the_interpreter() -> None:
    interpreted(str(TESTS / "triton" / "interpreted" / "test_in_torch.py"))


@needs_triton
@pytest.mark.long
def test_recompute_in_the_interpreter() -> None:
    # a relu RNN has no gates to make again; in bfloat16 one rounding moves its kink
    chosen = "triton and held or half_types and ranges3 and bfloat16 and not relu"
    interpreted(str(TESTS / "layer" / "test_recompute.py"), "-k", chosen)


@needs_triton
@pytest.mark.long
def test_mutations_and_what_is_shared_in_the_interpreter() -> None:
    interpreted(
        str(TESTS / "triton" / "interpreted" / "test_triton_mutations.py"),
        str(TESTS / "triton" / "interpreted" / "test_shared.py"),
    )


@needs_triton
@pytest.mark.long
def test_what_gpu_check_asks_in_the_interpreter() -> None:
    interpreted(str(TESTS / "triton" / "interpreted" / "test_examined.py"))


@needs_triton
@pytest.mark.parametrize("regime", ["", pytest.param("step", marks=pytest.mark.long)])
def test_no_steps_no_rows_and_chunks_in_the_interpreter(regime: str) -> None:
    chosen = "triton and (chunks or no_steps or left_out)"
    interpreted(
        str(TESTS / "layer" / "test_layer_op.py"), "-k", f"{chosen} and not reset_state", RNNKIT_TRITON_REGIME=regime
    )


# What it says of a machine.

QUESTIONS = {name: getattr(questions, name).__wrapped__ for name in ("present", "capability_of", "amd")}
"""Without a memory."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with Triton and two GPUs, of compute capability 9.0 and 8.0."""
    monkeypatch.setattr(triton, "installed", lambda: True)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: ((9, 0), (8, 0))[k])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")  # torch's default
    for name, ask in QUESTIONS.items():
        monkeypatch.setattr(questions, name, ask)
    return monkeypatch


def reasons(**change: Any) -> list[str]:
    return BY_NAME["triton"].unsupported(LayerSpec(**{**PLAIN, "device": "cuda", **change}))


def test_runs_on_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert reasons(dtype=dtype) == []
    gpu.setattr(torch.version, "hip", "6.4")
    gpu.setattr(torch.cuda, "get_device_capability", lambda k: (7, 0))
    chip = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    gpu.setattr(torch.cuda, "get_device_properties", lambda k: chip)
    assert reasons() == [] and triton.capability() == triton_configs.AMD
    chip.gcnArchName = "gfx1100"
    assert reasons() == ["of AMD's GPUs its kernels are compiled for gfx942 alone, got gfx1100"]


def test_says_what_a_user_can_act_upon(gpu: pytest.MonkeyPatch) -> None:
    assert reasons(device="cpu") == ["runs on the device cuda, got cpu"]
    assert reasons(dtype=torch.float64) == ["computes in float32, bfloat16 and float16, got torch.float64"]
    assert reasons(hidden_size=0) == ["needs at least one unit, got H=0"]
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU, and torch sees none" in reasons()[0] and "TRITON_INTERPRET=1" in reasons()[0]
    gpu.setattr(triton, "installed", lambda: False)
    assert reasons() == ["Triton is not installed: pip install rnnkit[triton]"]


def test_auto_asks_torch_first_for_what_torch_knows(gpu: pytest.MonkeyPatch) -> None:
    """Until a device has measured them; what torch has no layer for goes to the kernels."""
    plain = LayerSpec(**{**PLAIN, "device": "cuda"})
    assert preference(plain)[0].name == "cuda" and select_backend("auto", plain, cache=False).name == "torch"
    assert "not measured on a GPU" in str(BY_NAME["triton"].auto_exclusion_reason(plain))
    for extra in ({"lengths": True}, {"reset": True}, {"cell": "gru_reset_before"}, {"recompute": True}):
        assert select_backend("auto", plain._replace(**extra), cache=False).name == "triton"
    assert select_backend("triton", plain, cache=False).name == "triton"
    gpu.setattr(dispatch_times, "measured_backends", lambda *_: ("triton", "torch", "reference"))
    assert select_backend("auto", plain, cache=False).name == "triton"  # from then on the recorded order decides


def test_explain_says_the_regime(gpu: pytest.MonkeyPatch) -> None:
    def detail(**change: Any) -> str:
        return str(BY_NAME["triton"].detail(LayerSpec(**{**PLAIN, "device": "cuda", **change})))

    small = detail(cell="lstm", hidden_size=96, dtype=torch.bfloat16)
    assert small == "persistent: the recurrent weights stay on chip for the whole sequence"
    assert detail(hidden_size=512).startswith("step: no kernel keeps the recurrent weights of H=512 on chip")
    odd = detail(cell="lstm", hidden_size=100, dtype=torch.bfloat16)
    assert odd.endswith("of sizes that are no multiples of 16 up to 63 units fit")
    with triton.regimes.alone("step"), triton.regimes.alone("step"):
        assert detail() == "step: RNNKIT_TRITON_REGIME=step asks for it"
    assert detail().startswith("persistent: ") and triton.regimes.only is None


def test_explain_asks_the_device_that_the_layer_is_on(gpu: pytest.MonkeyPatch) -> None:
    """Of several GPUs another one may have less shared memory."""
    problem = LayerSpec(**{**PLAIN, "device": "cuda", "cell": "gru", "hidden_size": 128, "dtype": torch.float32})
    gpu.setattr(triton, "kind", lambda dtype: "tf32")
    for index in (None, 0):
        assert str(BY_NAME["triton"].detail(problem._replace(device_index=index))).startswith("persistent: ")
    small = "step: no kernel keeps the recurrent weights of H=128 on chip in TF32 on sm_80 (163 KiB of shared memory a "
    assert BY_NAME["triton"].detail(problem._replace(device_index=1)) == f"{small}block), up to 64 units fit"


def test_on_a_cpu_the_reasons_are_listed() -> None:
    found = rnnkit.explain(rnnkit.GRU(3, 4), torch.zeros(2, 1, 3)).to_dict()["layers"][0]
    assert found["reasons"]["triton"][0] == "runs on the device cuda, got cpu"


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


def test_tf32_on_amd_by_what_torch_allows_its_products(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "6.4")
    assert triton.kind(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert triton.kind(torch.float32) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("text", ["__version__ = '3.1.0'", "raise ImportError('libtriton.so: no such file')"])
def test_a_triton_that_cannot_be_used_is_a_reason(text: str, tmp_path: Path) -> None:
    """Layers run by other backends as if there were none."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(text, encoding="utf-8")
    code = (
        "import rnnkit, torch; layer, x = rnnkit.GRU(3, 4), torch.zeros(2, 1, 3); layer(x)\n"
        "print(rnnkit.explain(layer, x).to_dict()['layers'][0]['reasons']['triton'])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(TESTS.parent)]), "TRITON_INTERPRET": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the Triton that is installed cannot be used (" in done.stdout and "pip install --upgrade" in done.stdout


def test_a_folder_of_that_name_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    assert triton.installed.__wrapped__() is False  # type: ignore[attr-defined]


# The table.


def test_rows_stand_once_and_name_what_there_is() -> None:
    assert len({row[:6] for row in triton_configs.PERSISTENT}) == len(triton_configs.PERSISTENT)
    for row in triton_configs.PERSISTENT:
        assert row.multiple in triton_configs.MULTIPLES
        assert (
            row.kernel in triton_configs.KERNELS
            and row.side in triton_configs.SIDES
            and row.kind in triton_configs.KINDS
        )
        assert row.hidden in triton_configs.TILES and row.size in triton_configs.TILES and row.size <= row.hidden
        assert row.chips and set(row.chips) <= set(triton_configs.CHIPS)
        assert row.size == row.hidden or row.kernel == "lstm_proj"
    assert {cell for kernel in triton_configs.KERNELS for cell in triton_configs.CELLS_OF[kernel]} == set(CELLS)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120, triton_configs.AMD])
def test_every_problem_has_a_plan(cell: str, capability: int) -> None:
    for kind in triton_configs.KINDS:
        for side in triton_configs.SIDES:
            sizes = (16, 32, 1, 33, 64, 100, 257, 4096)
            plans = [triton_configs.launch_config(cell, side, hidden, 0, kind, capability, 16) for hidden in sizes]
            assert plans[0].regime == plans[1].regime == "persistent"
            assert plans[2].regime == "persistent" or kind == "ieee" or capability == triton_configs.AMD
            assert plans[-1].regime == plans[-2].regime == "step"
            assert all(plan.precision == ("tf32" if kind == "tf32" else "ieee") for plan in plans)


def test_a_chip_runs_every_row_that_names_it() -> None:
    """A row's shared memory is that of the chip where it takes most: another may have less, and need less."""
    for capability, chip in ((triton_configs.AMD, "gfx942"), (80, "sm_80"), (90, "sm_90"), (100, "sm_100")):
        assert triton_configs.rows_of(capability) == [row for row in triton_configs.PERSISTENT if chip in row.chips]
    assert all(
        row.shared <= triton_configs.SMALL_SHARED for k in triton_configs.SMALL for row in triton_configs.rows_of(k)
    )
    assert triton_configs.find_kernel("lstm", "forward", 128, 0, "half", triton_configs.AMD) is not None


def test_chips_with_little_shared_memory() -> None:
    assert triton_configs.launch_config("lstm", "forward", 128, 0, "half", 80, 16).regime == "persistent"
    assert triton_configs.launch_config("lstm", "forward", 128, 0, "half", 86, 16).regime == "step"
    assert triton_configs.chip_of(121) == ("sm_100", 99 * 1024) and triton_configs.chip_of(103)[0] == "sm_100"


@pytest.mark.parametrize(
    ("cell", "side", "hidden", "rows", "expected"),
    [
        ("lstm", "forward", 256, 16, (16, 32)),  # 1024 columns: 32 programs, and 16 if they were wider
        ("lstm", "backward", 256, 16, (16, 32)),
        ("lstm", "forward", 2048, 1, (16, 64)),
        ("lstm", "forward", 2048, 17, (32, 64)),
        ("lstm", "forward", 2048, 33, (64, 64)),
        ("lstm", "forward", 2048, 100, (128, 64)),
        ("lstm", "forward", 2047, 100, (32, 64)),  # not aligned: taller ones spill
        ("lstm", "forward", 1024, 64, (32, 64)),  # 64 rows at once would be 64 programs
        ("lstm", "backward", 1024, 64, (16, 32)),
        ("lstm", "backward", 1024, 4096, (128, 64)),
        ("gru", "forward", 300, 0, (16, 32)),
    ],
)
def test_tiles_of_a_step(cell: str, side: str, hidden: int, rows: int, expected: tuple[int, int]) -> None:
    """Tall for many rows, so that W_hh is read seldom; small where a GPU would stand idle otherwise."""
    for kind in triton_configs.KINDS:
        plan = triton_configs.launch_config(cell, side, hidden, 0, kind, 90, rows)
        assert (plan.regime, plan.block_b, plan.block_n) == ("step", *expected)


# What a scan launches.


class Launches(list):
    """Stands in for kernels/launch.start."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], plan: triton_configs.LaunchConfig, **arguments: Any) -> None:
        self.append((kernel, grid, arguments))

    @property
    def names(self) -> list[str]:
        return [kernel.__name__ for kernel, _, _ in self]


def scan(
    cell: str, regime: str, steps: int, *, batch: int = 33, hidden: int = 40, proj: int = 0, reverse: bool = False,
    tile: triton_configs.Tile = triton_configs.STEP[1],
) -> tuple[Launches, ...]:  # fmt: skip
    """The launches of a forward and of a backward on tensors without memory."""
    from rnnkit.kernels import persistent, step

    kind, size = CELLS[cell], proj or hidden

    def some(*sizes: int) -> Tensor:
        return torch.empty(sizes, device="meta")

    t = LayerInputs(
        some(steps, batch, 3), some(batch, size), some(batch, hidden) if kind.has_c else None,
        some(kind.gates * hidden, 3), some(kind.gates * hidden, size), None, None,
        some(proj, hidden) if proj else None,
    )  # fmt: skip
    module: Any = persistent if regime == "persistent" else step
    plan = triton_configs.step_config(tile, "tf32", "")
    both = Launches(), Launches()
    gx = some(steps, batch, kind.gates * hidden)
    y, h_n, c_n, c_all, gates = module.forward(
        kind, gx, t.h_0, t.c_0, t, None, t0=0, reverse=reverse, save=True, config=plan, run=both[0]
    )
    grads = LayerOutputs(y, h_n, c_n, c_all)
    module.backward(kind, grads, y, c_all, gates, t, None, reverse=reverse, config=plan, run=both[1])
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


@needs_triton
def test_what_a_step_reads_is_made_contiguous_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expanded or unaligned operand is copied for the scan, not for each step."""
    from rnnkit.kernels import step

    seen: list[int] = []
    monkeypatch.setattr(step, "contiguous_aligned", lambda v: seen.append(1) or v)
    counts = []
    for steps in (2, 9):
        seen.clear()
        scan("lstm", "step", steps, proj=7)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


@needs_triton
@pytest.mark.parametrize("regime", ["persistent", "step"])
@pytest.mark.parametrize(("cell", "proj"), [*((cell, 0) for cell in CELLS), ("lstm", 7)])
def test_one_compilation_serves_both_directions(cell: str, proj: int, regime: str) -> None:
    """What is compiled depends on constants and on None; the direction is a number that is not specialized on."""
    both = [
        [
            (kernel, {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr or arguments[p.name] is None})
            for launches in scan(cell, regime, 2, proj=proj, reverse=reverse)
            for kernel, _, arguments in launches
        ]
        for reverse in (False, True)
    ]
    assert both[0] == both[1]
    for launches in scan(cell, regime, 2, proj=proj, reverse=True):
        for kernel, _, arguments in launches:
            if "reverse" in arguments:
                assert arguments["reverse"] == 1 and type(arguments["reverse"]) is int
                assert "reverse" in {p.name for p in kernel.params if p.do_not_specialize and not p.is_constexpr}


@needs_triton
def test_only_products_take_tall_tiles() -> None:
    """The other kernels keep several whole blocks of gates in registers."""
    for tile in triton_configs.STEP:
        for launches in scan("lstm", "step", 1, proj=7, tile=tile):
            for kernel, grid, arguments in launches:
                rows = tile.rows if kernel.__name__.startswith("product") else triton_configs.ROWS
                assert arguments["BLOCK_B"] == rows and grid[0] == -(-33 // rows)


@needs_triton
def test_sizes_that_are_not_aligned_have_kernels_of_their_own() -> None:
    """A row is the first that serves a size: whole by its tile, and by 16 where everything is a multiple of it."""
    for row in triton_configs.PERSISTENT:
        hidden, proj = triton_configs.fullest(row)
        cell, capability = triton_configs.CELLS_OF[row.kernel][0], 100 if "sm_100" in row.chips else 90
        if {"sm_90", "sm_100"} & set(row.chips):
            assert triton_configs.find_kernel(cell, row.side, hidden, proj, row.kind, capability) == row
    for hidden, multiple in ((48, 16), (47, 1), (40, 1), (64, 16), (1, 1), (16, 16)):
        assert triton_configs.find_kernel("gru", "forward", hidden, 0, "half", 90).multiple == multiple  # type: ignore[union-attr]
    for hidden, proj, multiple in ((64, 48, 16), (64, 47, 1), (63, 48, 1)):
        assert triton_configs.find_kernel("lstm", "forward", hidden, proj, "half", 90).multiple == multiple  # type: ignore[union-attr]
