"""What is aimed at on a CPU, on made-up rows: each target met, missed, and measured in part."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from made_rows import row, whole

from rnnkit.benchmarks.speed import bench_cases, goals, implementations, report, rows, targets
from rnnkit.benchmarks.speed.bench_cases import CELLS, DTYPES, MODES, TABLE, BenchCase


def inference(**facts: Any) -> dict[str, Any]:
    return dict(mode="inference", **facts)


ORT = dict(mode="inference", against="onnxruntime", isa="avx2", processor_isa="avx2")
HALF = dict(dtype="bfloat16")


@pytest.mark.parametrize(
    ("facts", "met"),
    [
        # The grid against torch.nn: the mean, or the share of the limit, and the worst.
        ([dict(ratio_p50=2.0), dict(ratio_p50=8.0)], True),  # geometric mean 4
        ([dict(ratio_p50=2.0), dict(ratio_p50=7.9)], False),
        ([dict(ratio_p50=0.99), dict(ratio_p50=40.0)], False),  # the worst
        ([dict(ratio_p50=1.1, share=0.9), dict(ratio_p50=1.2, share=0.65)], True),  # 0.765 of the limit
        ([dict(ratio_p50=1.1, share=0.9), dict(ratio_p50=1.2, share=0.64)], False),
        ([dict(ratio_p50=0.9, share=0.9)], False),
        ([inference(ratio_p50=3.0)], True),
        ([inference(ratio_p50=2.9)], False),
        ([inference(ratio_p50=1.1, share=0.78)], True),
        ([inference(ratio_p50=1.1, share=0.77)], False),
        ([dict(cell="LSTM", ratio_p50=1.3), dict(cell="LSTM", ratio_p50=1.3)], True),
        ([dict(cell="LSTM", ratio_p50=0.97), dict(cell="LSTM", ratio_p50=3.0)], True),
        ([dict(cell="LSTM", ratio_p50=0.96), dict(cell="LSTM", ratio_p50=3.0)], False),
        ([inference(cell="LSTM", ratio_p50=1.25)], True),
        ([inference(cell="LSTM", ratio_p50=1.24)], False),
        # The limit counts large rows alone: a small one pulls its share neither down nor up.
        ([dict(ratio_p50=1.1, share=0.8), dict(ratio_p50=1.1, share=0.1, H=63)], True),
        ([dict(ratio_p50=1.1, share=0.8), dict(ratio_p50=1.1, share=0.1, gflops=1.99)], True),
        ([dict(ratio_p50=1.1, share=0.7), dict(ratio_p50=1.1, share=0.99, gflops=1.99)], False),
        ([dict(ratio_p50=1.1, share=0.8), dict(ratio_p50=1.1, share=0.1, gflops=2.0)], False),
        ([dict(ratio_p50=1.1, share=0.8), dict(ratio_p50=0.9, share=0.8, H=63)], False),  # but it is no excuse
        # Small stacks.
        ([inference(group="stacks", ratio_p50=1.5)], True),
        ([inference(group="stacks", ratio_p50=1.49, share=0.9)], False),
        ([inference(group="stacks", ratio_p50=0.99), inference(group="stacks", ratio_p50=9.0)], False),
        ([dict(group="stacks", ratio_p50=1.0), dict(group="stacks", ratio_p50=1.44)], True),
        ([dict(group="stacks", ratio_p50=1.0), dict(group="stacks", ratio_p50=1.43)], False),
        # ONNX Runtime, which takes whatever the processor has.
        ([dict(**ORT, ratio_p50=0.85), dict(**ORT, ratio_p50=1.31)], True),
        ([dict(**ORT, ratio_p50=1.04)], False),
        ([dict(**ORT, ratio_p50=1.04, share=0.9)], False),
        ([dict(**ORT, ratio_p50=0.84), dict(**ORT, ratio_p50=9.0)], False),
        ([dict(**{**ORT, "processor_isa": "avx512"}, ratio_p50=0.1)], None),
        ([dict(**{**ORT, "isa": "avx512", "processor_isa": "avx512"}, ratio_p50=0.1)], None),
        # Scans: wide ones against the peak, one row against the cache.
        ([inference(group="scan", B=32, H=256, share=0.85, ratio_p50=0.1)], True),
        ([inference(group="scan", B=32, H=256, share=0.84)], False),
        ([inference(group="scan", B=32, H=256, share=0.79), inference(group="scan", B=64, H=512, share=0.95)], False),
        ([inference(group="scan", B=32, H=128, share=0.1)], None),
        ([inference(group="scan", share=0.9), inference(group="scan", share=0.79)], False),
        ([inference(group="scan", share=0.8)], True),
        ([inference(group="scan", B=32, H=256, share=0.70, **HALF)], True),
        ([inference(group="scan", B=32, H=256, share=0.69, **HALF)], False),
        ([inference(group="scan", share=0.1, **HALF)], None),
        # bfloat16 against torch.nn in bfloat16.
        ([dict(ratio_p50=0.97, **HALF), dict(ratio_p50=1.75, **HALF)], True),
        ([dict(ratio_p50=1.29, share=0.9, **HALF)], False),
        ([inference(ratio_p50=0.96, **HALF), inference(ratio_p50=9.0, **HALF)], False),
        ([dict(ratio_p50=0.1, dtype="float16")], None),
        # What stays.
        ([inference(group="step", ratio_p50=2.0)], True),
        ([inference(group="step", ratio_p50=1.9)], False),
        ([inference(group="step", cell="RNN", ratio_p50=1.5)], True),
        ([dict(group="resets", against="without", ratio_p50=0.96)], True),
        ([dict(group="lengths", against="without", ratio_p50=1.5), dict(group="lengths", against="without",
                                                                          ratio_p50=0.94)], False),
        # What nothing is wanted of.
        ([dict(group="resets", against="torch.nn, split", ratio_p50=0.1)], None),
        ([dict(group="field", ratio_p50=0.1)], None),
        ([dict(device="cuda", ratio_p50=0.1)], None),
    ],
)  # fmt: skip
def test_targets(facts: list[dict[str, Any]], met: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [row(case=f"{some.get('B', 1)}x{k}x1x{some.get('H', 64)}", **some) for k, some in enumerate(facts)]
    monkeypatch.setattr(targets, "TABLE", [BenchCase(r.group, r.B, k, 1, r.H) for k, r in enumerate(found)])
    (verdict,) = targets.judge(found)
    assert verdict.met is met and verdict.mark == {True: "met", False: "MISSED", None: "-"}[met]
    assert verdict.cases == len(facts) and verdict.mark in report.cells(verdict)


@pytest.mark.parametrize(
    ("group", "facts", "floor"),
    [
        ("grid", dict(ratio_p50=5.0), dict(ratio_p50=0.9)),
        ("grid", dict(ratio_p50=1.1), dict(ratio_p50=0.9)),
        ("grid", dict(ratio_p50=1.4, **HALF), dict(ratio_p50=0.9)),
        ("grid", dict(ratio_p50=1.4, **ORT), dict(ratio_p50=0.8)),
        ("stacks", inference(ratio_p50=1.6), dict(ratio_p50=0.9)),
        ("scan", inference(share=0.9), dict(share=0.5)),
        ("resets", dict(against="without", ratio_p50=1.0), dict(ratio_p50=0.9)),
    ],
)
def test_what_was_measured_in_part_is_not_met(group: str, facts: dict[str, Any], floor: dict[str, Any]) -> None:
    every = whole(group, **facts)
    (verdict,) = targets.judge(every)
    assert verdict.met is (facts != dict(ratio_p50=1.1))
    (verdict,) = targets.judge(every[1:])
    assert verdict.met is None and verdict.mark == f"- ({len(every) - 1} of {len(every)} shapes)"
    assert report.cells(verdict)[-1] == verdict.mark
    another = dataclasses.replace(every[0], case="9x9x9x9")
    (verdict,) = targets.judge([*every[1:], another])
    assert verdict.met is None, "a shape that is none of the group's does not fill it"
    (verdict,) = targets.judge([dataclasses.replace(every[0], **floor)])
    assert verdict.met is False and verdict.mark == "MISSED", "no other shape can mend it"


def test_groups_are_judged_apart_and_by_auto() -> None:
    some = [
        *whole("grid", threads=1, ratio_p50=5.0),
        *whole("grid", threads=2, ratio_p50=3.0),
        row(implementation="cpu", ratio_p50=0.1),
        row(mode="inference", ratio_p50=3.0),
        *whole("scan", wide=False, mode="inference", share=0.9),
        *whole("scan", mode="inference", share=0.7),
    ]
    found = {(v.group, v.against, v.mode, v.threads): v for v in targets.judge(some)}
    assert len(found) == 5 and all(v.implementation == "auto" for v in found.values())
    assert found["grid", "torch.nn", "training", 1].met and not found["grid", "torch.nn", "training", 2].met
    assert found["scan", "the cache", "inference", 1].met and not found["scan", "the peak", "inference", 1].met
    assert [v.implementation for v in targets.judge([row(implementation="cpu")])] == ["cpu"]


def test_instruction_sets_are_judged_apart() -> None:
    fast, slow = (whole("grid", isa=isa, ratio_p50=ratio) for isa, ratio in (("avx512", 5.0), ("avx2", 2.0)))
    assert sorted(v.met for v in targets.judge([*fast, *slow]) if v.met is not None) == [False, True]


def test_a_module_of_ones_own_stands_in_the_table_without_a_mark() -> None:
    found = targets.judge([row(), row(implementation="cpu"), row(implementation="my.package:Own", ratio_p50=0.1)])
    assert [(v.implementation, v.wanted == "", v.met) for v in found] == [
        ("auto", False, None), ("my.package:Own", True, None),
    ]  # fmt: skip
    assert "my.package:Own: grid, against torch.nn" in report.cells(found[1])


def test_what_is_possible_at_all() -> None:
    """Of large rows, of which the limit says what they may take."""
    large = [row(ratio_p50=2.0, share=0.5), row(case="2x2x2x2", ratio_p50=8.0, share=0.8)]
    small = [row(case="3x3x3x3", H=16, ratio_p50=9.0, share=0.01), row(case="4x4x4x4", H=16, ratio_p50=4.0, share=0.01)]
    (verdict,) = targets.judge([*large, *small])
    assert verdict.possible == pytest.approx(math.sqrt(4.0 * 10.0)) and verdict.share == pytest.approx(0.4**0.5)
    assert verdict.small == pytest.approx(6.0) and verdict.mean == pytest.approx((2 * 8 * 9 * 4) ** 0.25)
    cells = dict(zip(report.HEAD, report.cells(verdict), strict=True))
    assert cells["possible"] == f"{verdict.possible:.2f}" and cells["small"] == "6.00"
    (alone,) = targets.judge(small)
    assert alone.share == pytest.approx(0.01), "where all are small there is nothing else to go by"


# Memory.


@pytest.fixture
def two_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A grid of two shapes, and a file for what the engine took before."""
    monkeypatch.setattr(goals, "TABLE", [BenchCase("grid", n, 1, 1, 64, cells=("GRU",)) for n in (1, 2)])
    monkeypatch.setattr(goals, "TRAINING_PEAKS", tmp_path / "peaks.csv")
    return tmp_path / "peaks.csv"


def trained(k: int, **facts: Any) -> rows.BenchRow:
    return row(case=f"{k}x1x1x64", **{"peak_mib": 1.0, "against_peak_mib": 1.0, **facts})


def memory(*some: rows.BenchRow) -> dict[str, targets.Verdict]:
    return {v.against: v for v in targets.judge(some) if v.group == "memory, grid"}


def test_memory_against_torch(two_shapes: Path) -> None:
    first = trained(1)
    assert memory(first, trained(2))["torch.nn"].met
    assert memory(first)["torch.nn"].mark == "- (1 of 2 shapes)"
    assert memory(first, trained(2, against_peak_mib=0.99))["torch.nn"].met is False, "the mean"
    found = memory(trained(1, against_peak_mib=2.0), trained(2, against_peak_mib=0.953))["torch.nn"]
    assert found.met and found.worst_case == "2x1x1x64" and found.mean == pytest.approx(1.906**0.5)
    assert memory(trained(1, against_peak_mib=0.952, peak_mib=1.0))["torch.nn"].met is False, "the worst"
    others = (dict(dtype="bfloat16"), dict(mode="inference"), dict(threads=2), dict(device="cuda"), dict(peak_mib=None))
    assert all(not memory(trained(1, **facts)) for facts in others)
    cells = dict(zip(report.HEAD, report.cells(found), strict=True))
    assert cells["of the limit"] == cells["possible"] == "", "memory has no such limit"


def test_memory_is_no_more_than_before(two_shapes: Path) -> None:
    two_shapes.write_text("group,case,cell,peak_mib,recompute_mib\ngrid,1x1x1x64,GRU,2,1\ngrid,2x1x1x64,GRU,4,1\n")
    once, again = goals.BEFORE, goals.BEFORE_AGAIN
    first = trained(1, peak_mib=2.0, recompute_mib=1.0)
    found = memory(first, trained(2, peak_mib=3.0, recompute_mib=1.003))
    assert found[once].met and found[once].worst == 1.0 and found[again].met, "less, and as much as before"
    found = memory(first, trained(2, peak_mib=4.1, recompute_mib=1.1))
    assert found[once].met is False and found[again].met is False and found[once].worst_case == "2x1x1x64"
    found = memory(first)
    assert found[once].mark == found[again].mark == "- (1 of 2 shapes)"
    found = memory(first, trained(2, peak_mib=9.0, recompute_mib=1.0, ran="torch"))
    assert found[once].met and found[once].cases == 1, "what torch's layer takes is torch's"
    assert found[again].met and found[again].cases == 2
    assert memory(first, trained(2, peak_mib=3.0))[again].mark == "- (1 of 2 shapes)"


def test_what_was_taken_before_is_known() -> None:
    """Of every shape and cell that is measured with recompute=True too."""
    if not rows.TRAINING_PEAKS.exists():
        pytest.skip("a wheel carries no results")
    found = goals.peaks_before()
    wanted = {(c.group, c.name, cell) for c in TABLE if c.group in ("grid", "stacks") for cell in c.cells}
    assert set(found) == wanted and all(once > 0 < again for once, again in found.values())


def test_the_groups_with_a_target_are_those_that_judged_means() -> None:
    for dtype in DTYPES:
        every = [
            row(group=c.group, B=c.batch, H=c.hidden, cell=cell, mode=mode, against=peer, dtype=dtype)
            for c in TABLE for cell in CELLS for mode in MODES
            for peer in (implementations.TORCH, implementations.WITHOUT)
        ]  # fmt: skip
        found = {r.group for r in every if goals.wanted(r)}
        assert found >= set(bench_cases.JUDGED.get(dtype, ()))
        rest = found - set(bench_cases.JUDGED.get(dtype, ()))
        assert rest <= {"resets", "lengths"} and (dtype != "float32" or not rest), "those hold in every dtype"
    jobs = bench_cases.select("cpu", ["judged"], dtypes=["float32", "bfloat16"])
    assert {job.case.group for job in jobs if job.dtype == "float32"} == set(bench_cases.JUDGED["float32"])
    assert {job.case.group for job in jobs if job.dtype == "bfloat16"} == {"grid", "scan"}
