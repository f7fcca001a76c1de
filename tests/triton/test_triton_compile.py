"""The Triton kernels compiled ahead of time: the record of what each takes, and that it is of what launches compile."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_triton import TESTS, needs_triton
from torch import Tensor

from rnnkit.backends.triton import configs
from rnnkit.cells import CELLS


@needs_triton
def test_the_record_holds_every_configuration_and_none_is_wrong() -> None:
    """By every version of Triton: both acts of an RNN, each tile of a step, each row's shared memory."""
    from rnnkit.benchmarks.usage import triton_usage

    lines = triton_usage.read(triton_usage.COMPILED)
    assert [line for line in lines if line.wrong] == []
    jobs = list(triton_usage.jobs())
    launched = [(job, launch) for job in jobs for launch in triton_usage.launches(job)]
    wanted = {triton_usage.named(job, launch, version) for job, launch in launched for version in configs.VERSIONS}
    assert {line.name for line in lines} == wanted and len(lines) == len(wanted), "make triton-compile"
    assert {name.cell for name in wanted if name.regime == "persistent"} == set(CELLS)
    products = {(name.block_b, name.block_n, name.warps) for name in wanted if name.function == "product.product"}
    assert products == set(configs.STEP)
    found: dict[tuple[Any, ...], int] = {}
    for name, usage, *_ in lines:
        if name.regime == "persistent":
            sizes, multiple = (name.hidden, name.proj or name.hidden), 1 if name.hidden % 16 else 16
            row = (name.kernel, name.side, *map(configs.tile, sizes), name.kind, multiple)
            found[row] = max(found.get(row, 0), usage.shared)
    assert found == {row[:6]: row.shared for row in configs.PERSISTENT}


@needs_triton
def test_what_is_compiled_is_what_a_launch_compiles() -> None:
    """By Triton's own rules: what is known of sizes and addresses, and what is not asked."""
    from rnnkit.benchmarks.usage import triton_usage
    from rnnkit.benchmarks.usage.triton_usage import launches, specialized

    def facts(hidden: int, chip: str, rows: int) -> tuple[dict[str, str], dict[str, list[str]]]:
        config = configs.step_config(configs.STEP[0], "half", "")
        job = triton_usage.TritonBuildJob("lstm", "lstm", "forward", "bf16", "half", chip, hidden, 0, config)
        form = triton_usage.Form(rows=rows)
        (launch,) = [launch for launch in launches(job, form) if launch.function == "product.product"]
        types, constants, known, _ = specialized(launch, chip)
        names = launch.kernel.arg_names
        assert {names[place]: v for (place,), v in constants}["TRANSPOSED"] is True
        return dict(types), {names[place]: [fact for fact, _ in some] for (place,), some in known}

    aligned, narrow = ["tt.divisibility"], ["tt.divisibility", "tt.pointer_range"]
    types, known = facts(128, "sm_90", 16)
    assert types["w"] == "*bf16" and types["a"] == "*fp32" and types["K"] == types["B"] == "i32"
    assert all(known[name] == aligned for name in ("a", "w", "out", "a_width", "out_width", "K", "N"))
    assert "B" not in known, "16 rows are compiled as 15 are"
    assert not any(facts(127, "sm_90", 1)[1].values()) and not any(facts(1, "sm_90", 1)[1].values())
    assert facts(128, "gfx942", triton_usage.FEW)[1]["a"] == narrow
    assert facts(128, "gfx942", triton_usage.MANY)[1]["a"] == aligned


@needs_triton
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_no_launch_is_of_another_kind_than_the_record(kernel: str) -> None:
    """Whatever H, P and B are, and wherever in memory a tensor begins, Triton knows of the arguments what it knew when
    the table was compiled. (Constants but sizes are compared by the record's names.)"""
    from rnnkit.benchmarks.usage.triton_usage import EVERYTHING, Form, TritonBuildJob, jobs, launches, specialized

    def unaligned(sizes: tuple[int, ...], **how: Any) -> Tensor:
        return torch.empty(torch.Size(sizes).numel() + 1, **how)[1:].view(sizes)

    def kinds(job: TritonBuildJob, form: Form = EVERYTHING, make: Any = torch.empty) -> set[Any]:
        return {(launch.kernel, specialized(launch, job.chip)[0::2]) for launch in launches(job, form, make)}

    mine = [job for job in jobs() if job.kernel == kernel and job.chip == "sm_90" and job.dtype in ("bf16", "fp32")]
    scans = {(job.cell, job.side, job.dtype, job.kind, job.config.regime): job for job in mine}
    recorded = set().union(*map(kinds, mine))
    for job in scans.values():
        for hidden, rows in itertools.product((1, 2, 5, 8, 16, 20, 24, 48, 127, 128), (1, 16, 33)):
            projections = [p for p in (1, 3, 16, 20, 48) if p < hidden] if kernel == "lstm_proj" else [0]
            for proj, make in itertools.product(projections, (torch.empty, unaligned)):
                given = job._replace(hidden=hidden, proj=proj)
                assert kinds(given, Form(rows=rows), make) <= recorded, (job, hidden, proj)


def test_a_run_replaces_what_its_own_triton_said(tmp_path: Path) -> None:
    from rnnkit.benchmarks.usage.triton_usage import COMPILED, merged, read, write

    before = read(COMPILED)
    old, new = ([line for line in before if line.name.triton == version] for version in configs.VERSIONS)
    changed = [line._replace(usage=line.usage._replace(registers=1)) for line in old[:2]]
    write(tmp_path / "one.csv", merged(before, [*changed, old[0]]))
    assert read(tmp_path / "one.csv") == [old[0], changed[1], *new]  # each once, the one of more registers
    assert read(tmp_path / "none.csv") == []
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\], expected triton, .*; remove it"):
        read(tmp_path / "other.csv")


@needs_triton
def test_what_a_search_prints_is_a_row_of_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As configs.py has it, to be copied there."""
    from rnnkit.benchmarks.usage import triton_usage

    rows = configs.PERSISTENT[:2]
    monkeypatch.setattr(triton_usage, "search", lambda kernel: iter(rows))
    assert triton_usage.main(["--search", "gru"]) == 0
    assert ast.literal_eval("[" + capsys.readouterr().out.replace(type(rows[0]).__name__, "") + "]") == list(rows)


@needs_triton
def test_some_of_the_table_compiles(tmp_path: Path) -> None:
    """Every 151st scan; CI takes more, `make triton-compile` the whole."""
    command = [sys.executable, "-m", "rnnkit.benchmarks.usage.triton_usage", "--part", "1/151", "--workers", "1"]
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scans" in done.stdout


@needs_triton
def test_a_spill_is_found(tmp_path: Path) -> None:
    """An LSTM of 128 units on four warps keeps more than its registers hold."""
    code = (
        "from rnnkit.benchmarks.usage import triton_usage as c; from rnnkit.backends.triton import configs\n"
        "row = configs.CompiledKernel('lstm', 'backward', 128, 128, 'tf32', 16, ('sm_80',), 4, 0)\n"
        "configs.PERSISTENT, configs.KERNELS = (row,), ()\n"
        "raise SystemExit(c.main(['--workers', '1', '--part', '1/1', '--to', 'nowhere']))"
    )
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent, env=env)
    assert done.returncode == 1 and "lstm.backward: spills" in done.stderr, done.stdout + done.stderr
