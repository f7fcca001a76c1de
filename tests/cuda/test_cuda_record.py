"""What the record of the compiled CUDA kernels stands for: the sources that it was made of, and no others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.benchmarks.usage import cuda_usage as compiled
from rnnkit.benchmarks.usage import source_digest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def digests(monkeypatch: pytest.MonkeyPatch, csrc: Path) -> dict[str, str]:
    """A job of each regime as it is compiled from these sources."""
    monkeypatch.setattr(compiled, "SOURCES", csrc / "cuda")
    rows = {row.regime: row for row in cuda_configs.ROWS}
    return {regime: compiled.digest_of(compiled.CudaBuildJob(row, "sm_80")) for regime, row in rows.items()}


def test_the_record_is_of_these_sources() -> None:
    """A kernel that was edited since may spill."""
    now = {job.name: compiled.digest_of(job) for job in compiled.jobs()}
    recorded = {f"{line.name.row} {line.name.chip}": line.source for line in compiled.read(compiled.CUDA_COMPILED)}
    stale = [name for name, source in now.items() if recorded.get(name) != source]
    assert not stale, (
        f"{compiled.CUDA_COMPILED} was made from other sources than these: {len(stale)} of {len(now)} entries, the "
        f"first {stale[0]}. Run `make cuda-compile` and commit what it writes."
    )


@pytest.mark.parametrize(
    ("name", "before", "after", "changed"),
    [
        ("cuda/cta_forward.cuh", "const bool aligned16 = f.H", "const bool aligned16 = 1 + f.H", "cta"),
        ("cuda/step.cuh", "arch::sync();", "", "step"),
        ("cells/lstm.h", "o * M::tanh(c)", "M::tanh(c)", "cta step"),
        ("cuda/arch_gpu.cuh", "rna.tf32", "rn.tf32", "cta step"),
        ("cuda/nvcc.py", '"-O3"', '"-O2"', "cta step"),
        ("cuda/scan.h", "bool opmath;", "bool opmath; // and more /* of it", ""),
        ("cuda/step.cuh", "arch::sync();", "/* a\n b */ arch::sync\n(\n)  ;", ""),
        ("cuda/cta.cuh", "#define RNNKIT_CTA(", "#define  RNNKIT_CTA(", ""),
        ("cuda/ops.cpp", "namespace", "name space", ""),
        ("cuda/probes.cu", "namespace", "name space", ""),
    ],
)
def test_what_makes_a_record_old(
    name: str, before: str, after: str, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernels' figures come from and nothing else; comments and white space do not count."""
    there = digests(monkeypatch, CSRC)
    shutil.copytree(CSRC, tmp_path / "csrc")
    shutil.copytree(CSRC, tmp_path / "edited")
    assert digests(monkeypatch, tmp_path / "csrc") == there, "the folder does not count"
    text = (tmp_path / "edited" / name).read_text()
    assert before in text
    (tmp_path / "edited" / name).write_text(text.replace(before, after, 1))
    now = digests(monkeypatch, tmp_path / "edited")
    assert {regime for regime in now if now[regime] != there[regime]} == set(changed.split())


def test_a_row_is_part_of_its_digest() -> None:
    row = next(row for row in cuda_configs.ROWS if row.resident != (0, 0))
    other = row._replace(resident=(row.resident[0], row.resident[1] - 1))
    every = {compiled.digest_of(compiled.CudaBuildJob(r, chip)) for r in (row, other) for chip in cuda_configs.CHIPS}
    assert len(every) == 2 * len(cuda_configs.CHIPS)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a  =\n b;// c", "a=b;", True),
        ("return x", "returnx", False),
        ("a + +b", "a++b", False),
        ("f( {a}, -b )", "f({a},-b)", True),
        ('say("a  b")', 'say("a b")', False),
        ('say("a // b");', 'say("a ");', False),
        ("#define F (a) \\\n  b", "#define F (a)   b", True),
        ("#define F (a)", "#define F(a)", False),
        ("#define A\nB", "#define A B", False),
    ],
)
def test_what_counts_in_a_source(one: str, other: str, same: bool) -> None:
    assert ("".join(source_digest.pieces(one)) == "".join(source_digest.pieces(other))) is same
