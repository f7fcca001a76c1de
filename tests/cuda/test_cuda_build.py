"""How the CUDA kernels are compiled, where there is no GPU: the table of configurations, the sources made of it, what
setup.py builds or refuses to, and the table of what each kernel takes.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from rnnkit.backends.cpu import extension
from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.benchmarks.usage import cuda_usage as compiled
from rnnkit.benchmarks.usage.cuda_usage import SIDES
from rnnkit.benchmarks.usage.kernel_usage import Usage
from rnnkit.cli import info

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SOURCES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc, generate = load("nvcc"), load("generate")
HOME = nvcc.home()
needs_nvcc = pytest.mark.skipif(HOME is None, reason=nvcc.MISSING)
ALL = ["sm_80", "sm_90a", "sm_100", "compute_100"]


def test_every_row_has_a_name_of_its_own() -> None:
    names = [row.name for row in cuda_configs.ROWS]
    assert len(names) == len(set(names)) > 80
    for row in cuda_configs.ROWS:
        regime, *cell, kind, size = row.name.split("_")
        assert (regime, "_".join(cell), kind, int(size)) == (row.regime, row.kernel, row.kind, row.units or row.rows)
        assert row.kernel in cuda_configs.GATES and row.kind in cuda_configs.KINDS


def test_rows_ascend() -> None:
    """The first that holds a size is the smallest that does."""
    for kernel in cuda_configs.GATES:
        for kind in cuda_configs.KINDS:
            mine = [row for row in cuda_configs.ROWS if (row.kernel, row.kind) == (kernel, kind)]
            units = [row.units for row in mine if row.regime == "cta"]
            assert units == sorted(set(units)) and all(n % 16 == 0 for n in units)
            assert [row.rows for row in mine if row.regime == "step"] == [8, 32], "any size, few rows and many"


def test_a_source_for_each_row(tmp_path: Path) -> None:
    paths = generate.write(tmp_path)
    assert [path.name for path in paths] == [f"{row.name}.cu" for row in cuda_configs.ROWS]
    assert [path.read_text() for path in paths] == [cuda_configs.source(row) for row in cuda_configs.ROWS]
    os.utime(paths[0], ns=(1, 1))
    paths[1].write_text("another text")
    (tmp_path / "of_no_row.cu").touch()
    assert generate.write(tmp_path) == paths
    assert paths[0].stat().st_mtime_ns == 1, "what has not changed is not compiled again"
    assert paths[1].read_text() == cuda_configs.source(cuda_configs.ROWS[1])
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.parametrize(
    ("asked", "capability", "chips"),
    [
        (None, None, ALL),
        ("", (9, 0), ALL),
        ("sm_90a,compute_100", None, ["sm_90a", "compute_100"]),
        ("native", (9, 0), ["sm_90a"]),
        ("native", (8, 6), ["sm_80"]),
        ("native", (10, 3), ["sm_100"]),
        ("native", (12, 0), ["compute_100"]),
    ],
)
def test_what_is_compiled_for(asked: str | None, capability: tuple[int, int] | None, chips: list[str]) -> None:
    assert nvcc.chosen(asked, cuda_configs.CHIPS, capability) == chips


def test_what_cannot_be_compiled_for() -> None:
    with pytest.raises(ValueError, match=r"expected native or some of sm_80,.*,compute_100, got 'sm_70'"):
        nvcc.chosen("sm_70", cuda_configs.CHIPS, None)
    with pytest.raises(ValueError, match="torch sees none"):
        nvcc.chosen("native", cuda_configs.CHIPS, None)


def toolkit(folder: Path, headers: bool = True) -> Path:
    """What looks like one."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.7, V13.7.1'\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime_api.h").touch()
    return folder


def test_where_the_toolkit_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, named, script = toolkit(tmp_path / "usual"), toolkit(tmp_path / "named"), toolkit(tmp_path / "script", False)
    monkeypatch.setattr(nvcc, "USUAL", str(usual))
    monkeypatch.setenv("PATH", str(script / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert nvcc.home() == nvcc.home(None) == usual, "an nvcc without headers beside it calls another"
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert nvcc.home() == named and nvcc.version(named) == "13.7"
    assert nvcc.smaller("13.7") and not nvcc.smaller("12.9")
    monkeypatch.setenv("CUDA_HOME", str(script))
    assert nvcc.home(str(named)) == named and nvcc.home() == usual
    monkeypatch.setattr(nvcc, "USUAL", str(tmp_path))
    assert nvcc.home() is None


Setup = Callable[..., dict[str, Any]]


@pytest.fixture
def run_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """setup.py in a folder of its own: what it tells setuptools under these variables."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(ROOT / "setup.py", root)
    for name in ("csrc", "rnnkit", "kernels", "benchmarks"):
        (root / name).symlink_to(ROOT / name)

    def run(**variables: str) -> dict[str, Any]:
        told: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: told.update(arguments))
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        for name in ("RNNKIT_CUDA", "RNNKIT_CUDA_ARCH", "RNNKIT_EXTENSION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        runpy.run_path(str(root / "setup.py"))
        return told

    return run


def test_without_cuda(run_setup: Setup) -> None:
    for variables in ({}, {"RNNKIT_CUDA": "0"}):
        (library,) = run_setup(**variables)["ext_modules"]
        assert not any("cuda" in source for source in library.sources)
        assert not any("cuda" in name for name in library.libraries)


def test_with_cuda(run_setup: Setup, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "toolkit")
    (library,) = run_setup(RNNKIT_CUDA="1", CUDA_HOME=str(home))["ext_modules"]
    kernels = [f"build/cuda/{row.name}.cu" for row in cuda_configs.ROWS]
    own = ["csrc/cuda/ops.cpp", "csrc/cuda/probes.cu"]
    assert [source for source in library.sources if "cuda" in source] == [*own, *kernels]
    assert all((tmp_path / "root" / kernel).exists() for kernel in kernels)
    flags = library.extra_compile_args
    assert [flag for flag in flags["nvcc"] if "gencode" in flag] == [nvcc.gencode(chip) for chip in ALL]
    assert {*nvcc.FLAGS, "-compress-mode=size"} <= set(flags["nvcc"])
    assert any("-warn-spills,-Werror" in flag for flag in flags["nvcc"])
    assert f"-DRNNKIT_CUDA_BUILT=13.7,{','.join(ALL)}" in flags["cxx"]
    assert "cudart_static" in library.libraries and "cudart" not in library.libraries
    assert str(home) == cpp_extension.CUDA_HOME

    asked = tmp_path / "root" / "build" / "flags.txt"
    assert "build/flags.txt" in library.depends
    os.utime(asked, ns=(1, 1))
    run_setup(RNNKIT_CUDA="1", CUDA_HOME=str(home))
    assert asked.stat().st_mtime_ns == 1
    run_setup(RNNKIT_CUDA="1", CUDA_HOME=str(home), RNNKIT_CUDA_ARCH="sm_90a")
    assert asked.stat().st_mtime_ns > 1, "a library for other chips is out of date"


def test_what_is_slow_without_ninja(
    run_setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch then compiles one source after the other, and there are as many as kernels."""
    home = str(toolkit(tmp_path / "toolkit"))
    for available in (True, False):
        monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda available=available: available)
        run_setup(RNNKIT_CUDA="1", CUDA_HOME=home)
        assert ("WARNING: without ninja one source is compiled after" in capsys.readouterr().err) != available
        run_setup()
        assert "ninja" not in capsys.readouterr().err, "a minute's worth of C++"


def test_what_setup_refuses(run_setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(toolkit(tmp_path / "toolkit"))
    with pytest.raises(SystemExit, match="RNNKIT_CUDA must be 0, 1 or unset, got '2'"):
        run_setup(RNNKIT_CUDA="2")
    with pytest.raises(SystemExit, match="RNNKIT_CUDA=1 asks for what RNNKIT_EXTENSION=0 leaves out; unset one"):
        run_setup(RNNKIT_CUDA="1", RNNKIT_EXTENSION="0")
    with pytest.raises(SystemExit, match=r"RNNKIT_CUDA_ARCH: expected native or some of sm_80,.* got '90'"):
        run_setup(RNNKIT_CUDA="1", CUDA_HOME=home, RNNKIT_CUDA_ARCH="90")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="RNNKIT_CUDA_ARCH: native asks for this machine's GPU"):
            run_setup(RNNKIT_CUDA="1", CUDA_HOME=home, RNNKIT_CUDA_ARCH="native")
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(SystemExit, match=r"RNNKIT_CUDA=1, but no CUDA toolkit was found: .*Set CUDA_HOME, or unset"):
        run_setup(RNNKIT_CUDA="1", CUDA_HOME=home)


@needs_nvcc
def test_a_spill_fails_the_build(tmp_path: Path) -> None:
    """Two hundred values of a thread that live at once, and registers for fewer."""
    values = "\n".join(f"  const float v{k} = x[{k}];" for k in range(200))
    sums = " + ".join(f"v{k} * y" for k in range(200))
    text = 'extern "C" __global__ void __launch_bounds__(THREADS) kernel(const volatile float* x, float* out) {{\n'
    text = text.format() + f"{values}\n  const float y = x[200];\n  *out = {sums};\n}}\n"

    def compile(threads: int) -> subprocess.CompletedProcess[str]:
        source = tmp_path / "kernel.cu"
        source.write_text(text.replace("THREADS", str(threads)))
        command = [HOME / "bin" / "nvcc", *nvcc.FLAGS, nvcc.gencode("sm_80"), "-c", source, "-o", tmp_path / "kernel.o"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert compile(128).returncode == 0
    failed = compile(1024)
    assert failed.returncode != 0 and "pill" in failed.stderr


PTXAS = """\
ptxas info    : 52 bytes gmem
ptxas info    : Compiling entry function '_ZN6rnnkit4cuda4stepINS0_4StepINS0_4cell3rnnENS0_4kind4bf16ELi8ELi1EEELi1E\
NS0_12StepBackwardIS6_E3EndEEEvNS0_6MatrixENS0_8OperandsElT1_' for 'sm_80'
ptxas info    : Function properties for _ZN6rnnkit4cuda4stepINS0_4
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6rnnkit4cuda4stepINS0_4StepINS0_4cell3rnnENS0_4kind4bf16ELi8ELi1EEELi1E\
NS0_12StepBackwardIS6_E5GatesEEEvNS0_6MatrixENS0_8OperandsElT1_' for 'sm_80'
ptxas info    : Function properties for _ZN6rnnkit4cuda4stepINS0_4
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 16 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6rnnkit4cuda4eachINS0_11StepForwardINS0_4StepINS0_4cell3rnnENS0_4kind4\
bf16ELi8ELi1EEEE3EndEEEvlT_' for 'sm_80'
ptxas info    : Function properties for _ZN6rnnkit4cuda4each
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 400 bytes cmem[0]
"""


def test_what_ptxas_says() -> None:
    found = list(compiled.said(PTXAS))
    assert found == [
        ("backward", "step", Usage(40, 0, 0)),
        ("backward", "step", Usage(32, 8, 16)),
        ("forward", "each", Usage(12, 0, 0)),
    ]
    row = next(row for row in cuda_configs.ROWS if row.regime == "step")
    sizes = {"forward_asks": 101, "backward_asks": 201}
    each, step = compiled.lines(compiled.CudaBuildJob(row, "sm_80"), "13.0", found, sizes)
    assert (step.name.side, step.name.function, step.usage) == ("backward", "step", Usage(40, 8, 216))
    assert step.wrong == "spills 8 bytes" and step.fits
    assert (each.name.side, each.name.function, each.usage) == ("forward", "each", Usage(12, 0, 0))
    assert each.wrong is None
    with pytest.raises(ValueError, match="found no"):
        list(compiled.said("Compiling entry function '_Z7forwardv' for 'sm_80'\nptxas info    : Used 3 registers"))


def test_too_much_shared_memory() -> None:
    row = cuda_configs.ROWS[0]
    small, large = cuda_configs.CHIPS["sm_80"], cuda_configs.CHIPS["sm_90a"]

    def line(chip: str, bytes: int) -> compiled.CudaRecord:
        found = [("forward", "cta_forward", Usage(9, 0, 0))]
        return compiled.lines(compiled.CudaBuildJob(row, chip), "13.0", found, {"forward_asks": bytes + 1})[0]

    assert line("sm_80", small).fits and not line("sm_80", small + 1).fits
    assert line("sm_80", small + 1).wrong is None, "it runs on other chips"
    assert "no chip has more than" in str(line("sm_90a", large + 1).wrong)


def test_the_record_is_of_this_table() -> None:
    """Every row for every chip, none spills, and shared memory as the table computes it."""
    found = compiled.read(compiled.CUDA_COMPILED)
    assert {(line.name.row, line.name.chip) for line in found} == {(job.row.name, job.chip) for job in compiled.jobs()}
    rows = {row.name: row for row in cuda_configs.ROWS}
    able = {chip: {row.name for row in cuda_configs.able(int(chip[3:].strip("a")))} for chip in cuda_configs.CHIPS}
    for line in found:
        assert line.wrong is None
        assert line.name.function in compiled.WITHOUT or line.usage.shared == cuda_configs.shared_bytes(
            rows[line.name.row], compiled.SIDES.index(line.name.side)
        )
        assert line.fits or line.name.row not in able[line.name.chip]


@needs_nvcc
def test_a_row_compiles(tmp_path: Path) -> None:
    """One of each regime, by the command's own way."""
    for name in ("cta_rnn_bf16_64", "step_rnn_bf16_8"):
        row = next(row for row in cuda_configs.ROWS if row.name == name)
        lines = compiled.build(compiled.CudaBuildJob(row, "sm_80"), nvcc, HOME, "13.0")
        assert not isinstance(lines, str), lines
        assert {line.name.side for line in lines} == set(compiled.SIDES)
        assert all(line.wrong is None and 0 < line.usage.registers <= 255 for line in lines)
        broken = row._replace(kernel="none")
        assert "none" in str(compiled.build(compiled.CudaBuildJob(broken, "sm_80"), nvcc, HOME, "13.0"))


def test_a_part_is_checked_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def build(job: compiled.CudaBuildJob, *_: Any) -> list[compiled.CudaRecord]:
        made.append(job.name)
        return compiled.lines(job, "13.0", [("forward", "cta_forward", Usage(9, 8 * (job.chip == spills), 0))], {})

    spills = ""
    toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(compiled, "build", build)
    record = tmp_path / "record.csv"
    assert compiled.main(["--part", "2/90", "--to", str(record)]) == 0
    every = [job.name for job in compiled.jobs()]
    assert made == every[1::90] and not record.exists()
    assert compiled.main(["--to", str(record)]) == 0
    assert [line.name.row + " " + line.name.chip for line in compiled.read(record)] == every
    before, spills = record.read_text(), "sm_100"
    assert compiled.main(["--to", str(record)]) == 1 and record.read_text() == before


@pytest.mark.parametrize(("most", "warps"), [(40, [7, 14]), (12, [14]), (3, [])])
def test_a_search_finds_what_fits(most: int, warps: list[int]) -> None:
    """Where more than so many fragments a thread spill; of 294 KiB of weights an sm_80 must have 131 in registers."""
    row = cuda_configs.CompiledKernel("cta", "gru", "bf16", 224, 14, 8)
    tried: list[cuda_configs.CompiledKernel] = []

    def compile(job: compiled.CudaBuildJob) -> list[compiled.CudaRecord]:
        tried.append(job.row)
        found = [(side, f"cta_{side}", Usage(9, 4 * (kept > most), 0)) for side, kept in zip(SIDES, job.row.resident)]
        return compiled.lines(job, "13.0", found, {})

    fits = list(compiled.search(row, compile, "sm_80"))
    assert [fit.warps for fit in fits] == warps and len(tried) < 30
    for fit in fits:
        assert fit.resident == (min(most, 28, 3 * 7 * 14 // fit.warps),) * 2
        assert all(cuda_configs.shared_bytes(fit, side) <= cuda_configs.CHIPS["sm_80"] for side in (0, 1))


def reach() -> list[str]:
    """The lines of docs/cuda.md on how far the regime cta goes."""
    chips = ((90, 100, 103), (80,), cuda_configs.SMALL)
    cells = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU, reset before"}
    kinds = [kind for kind in cuda_configs.KINDS if kind != "f64"]
    lines = [f"| | | {' | '.join(cuda_configs.KINDS[kind] for kind in kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for capabilities, (kernel, cell) in itertools.product(chips, cells.items()):
        every = []
        for capability in capabilities:
            rows = [row for row in cuda_configs.able(capability) if (row.regime, row.kernel) == ("cta", kernel)]
            every.append([max(row.units for row in rows if row.kind == kind) for kind in kinds])
        assert every == every[:1] * len(every), "chips that stand together reach equally far"
        shared, names = cuda_configs.limit(capabilities[0]) // 1024, ", ".join(f"sm_{k}" for k in capabilities)
        lines.append(f"| {names} ({shared} KiB) | {cell} | {' | '.join(str(units) for units in every[0])} |")
    return lines


def test_the_design_says_how_far_cta_goes() -> None:
    page = (ROOT / "docs/cuda.md").read_text(encoding="utf-8")
    assert "\n".join(reach()) in page, "\n".join(["docs/cuda.md has another table than:", *reach()])


def test_info_says_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    found = info.gather()["cuda_kernels"]
    assert (found["count"] == 0) == bool(extension.cuda_missing) and bool(found["chips"]) == (found["count"] > 0)
    monkeypatch.setattr(extension, "cuda_kernels", ("a", "b"))
    monkeypatch.setattr(extension, "cuda_built", ("13.7", "sm_80", "sm_90a"))
    monkeypatch.setattr(extension, "cuda_missing", "")
    assert "CUDA kernels  2, compiled by CUDA 13.7 for sm_80, sm_90a" in info.table(info.gather())
    monkeypatch.setattr(extension, "cuda_kernels", ())
    monkeypatch.setattr(extension, "cuda_built", ())
    monkeypatch.setattr(extension, "cuda_missing", "it is built without")
    assert "CUDA kernels  it is built without" in info.table(info.gather())


@pytest.mark.parametrize(
    ("capability", "chips", "served"),
    [
        (80, "sm_80", True),
        (86, "sm_80", True),
        (80, "sm_86", False),
        (90, "sm_80", False),
        (90, "sm_80 sm_90a", True),
        (103, "sm_100", True),
        (100, "sm_90a", False),
        (120, "sm_100", False),
        (120, "sm_100 compute_100", True),
        (90, "sm_100 compute_100", False),
        (90, "", False),
    ],
)
def test_which_gpus_are_served(capability: int, chips: str, served: bool) -> None:
    assert extension.cuda_serves(capability, tuple(chips.split())) is served


def test_the_compiler_can_be_asked_for() -> None:
    done = subprocess.run([sys.executable, SOURCES / "nvcc.py"], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (HOME is not None)
    assert done.stdout.strip() == str(HOME or nvcc.MISSING)
