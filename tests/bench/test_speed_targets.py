"""What is aimed at on a GPU, on made-up rows: each target met, missed, measured in part or not at all; what `auto`
would take by the rows; and how the memory that a recomputing backward needs comes into a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import Fused, pretend, put
from made_rows import row

from rnnkit.__main__ import main
from rnnkit.benchmarks.dispatch import fit_dispatch
from rnnkit.benchmarks.gpu_check import main as gpu_check
from rnnkit.benchmarks.gpu_check import parity
from rnnkit.benchmarks.speed import rows, targets
from rnnkit.benchmarks.speed.bench_cases import BenchCase


def of(who: str, **facts: Any) -> rows.BenchRow:
    plain = dict(device="cuda", group="field", H=128, dtype="bfloat16", implementation=who, ran=who, ratio_p50=1.6)
    return row(**{**plain, **facts})


def only(monkeypatch: pytest.MonkeyPatch, *cases: BenchCase) -> None:
    """The table of cases is this."""
    monkeypatch.setattr(targets, "TABLE", cases)


def verdicts(*some: rows.BenchRow) -> dict[str, targets.Verdict]:
    """Of backend cuda by call."""
    return {v.group: v for v in targets.fused(some) if (v.implementation, v.launch) == ("cuda", "call")}


def test_what_is_aimed_at_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gru: dict[str, Any] = {"cells": ("GRU",), "modes": ("training",)}
    table = [
        BenchCase("field", 1, 1, 1, 128, **gru),
        BenchCase("field", 2, 1, 1, 128, **gru),
        BenchCase("field", 1, 1, 1, 512, **gru),
    ]
    monkeypatch.setattr(targets, "TABLE", (*table, BenchCase("resets", 1, 1, 1, 128, **gru)))
    first, second = of("triton"), of("triton", case="b", ratio_p50=1.5)
    slow = of("triton", case="c", H=512, ratio_p50=0.1)
    loops = [of("reference", ms=2.0), of("reference", case="b", ms=1.0), of("reference", case="c", H=512, ms=1.0)]
    reset = of("triton", group="resets", against="without", ratio_p50=0.96)
    every = [first, second, slow, *loops, reset, of("reference", group="resets", ms=3.0)]
    found = {(v.group, v.launch): v for v in targets.judge(every) if v.met is not None}
    assert len(found) == 3 and all(v.met and v.implementation == "triton" for v in found.values())
    assert found["field, H <= 256", "call"].mean == pytest.approx(2.4**0.5) and found["all", "call"].worst == 1.0
    others = [of("triton", dtype="float32", ratio_p50=0.1), of("triton", mode="inference", ratio_p50=0.1)]
    loose = [of("reference", dtype="float32"), of("reference", mode="inference")]
    assert all(v.met for v in targets.fused([*every, *others, *loose])), "other dtypes and modes are not judged so"

    def missed(*more: rows.BenchRow) -> list[str]:
        return [v.group for v in targets.fused([*every, *more]) if v.met is False]

    assert missed(of("triton", case="d", ratio_p50=1.2)) == ["field, H <= 256"]
    assert missed(of("triton", group="resets", case="e", against="without", ratio_p50=0.95)) == ["resets"]
    assert missed(of("triton", case="f", H=512, ms=3.0), of("reference", case="f", H=512, ms=2.9)) == ["all"]
    assert missed(of("triton", group="resets", case="g", against="torch.nn, cells", ratio_p50=0.99)) == ["all"]
    assert missed(of("cuda", ratio_p50=1.9), of("cuda", case="b", ratio_p50=1.9)) == ["field, H <= 256"], (
        "more is asked"
    )
    assert not [v for v in targets.judge([of("triton", device="cpu")]) if v.met is not None], "not on a CPU"

    (part,) = targets.fused([first])
    assert part.met is None and part.mark == "- (1 of 2 shapes)", "what was not measured whole is not met"
    (part, alone) = targets.fused([first, loops[0], slow])
    assert alone.met is None and alone.mark == "- (1 of 2 shapes)", "a job without its loop"


def test_a_step_where_the_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, BenchCase("scan", 32, 100, 1, 128, modes=("inference",)), BenchCase("scan", 32, 100, 1, 256))
    scan: dict[str, Any] = dict(group="scan", mode="inference", T=100)
    both = [of("cuda", cell=cell, ms=0.05, **scan) for cell in ("LSTM", "GRU")]
    group = "scan, where cta fits"
    found = verdicts(*both)[group]
    assert found.met and found.worst == 1.0 and found.against == "0.5 µs a step" and found.shapes == 2
    assert verdicts(*both, of("cuda", cell="LSTM", case="b", ms=0.051, **scan))[group].met is False
    assert verdicts(both[0])[group].mark == "- (1 of 2 shapes)"
    others = [of("cuda", cell="LSTM", case="b", ms=9.0, H=256, **scan), of("cuda", cell="RNN", ms=9.0, **scan)]
    others += [of("cuda", cell="LSTM", ms=9.0, **scan, dtype="float32"), of("cuda", cell="GRU", ms=9.0, T=100)]
    assert verdicts(*both, *others)[group].met, "what does not fit, and other cells and dtypes, are not judged"


def test_memory_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, *(BenchCase("field", n, 1, 1, 512, cells=("LSTM",)) for n in (1, 2)))
    plain, again = "memory, field", "memory, field, recompute"

    def pair(**facts: Any) -> list[rows.BenchRow]:
        common = dict(cell="LSTM", H=512, peak_mib=2.0, against_peak_mib=2.0, recompute_mib=1.0)
        return [of("cuda", **common), of("cuda", case="b", **{**common, **facts})]

    found = verdicts(*pair())
    assert found[plain].met and found[again].met and found[again].mean == 2.0
    found = verdicts(*pair(peak_mib=2.1))
    assert found[plain].met is False and found[again].met and found[plain].worst_case == "LSTM b"
    found = verdicts(*pair(recompute_mib=1.01))
    assert found[plain].met and found[again].met is False
    found = verdicts(*pair(recompute_mib=None))
    assert found[plain].met and found[again].mark == "- (1 of 2 shapes)"
    for other in (dict(dtype="float32"), dict(mode="inference"), dict(group="grid"), dict(against="without")):
        assert verdicts(*pair(**other))[plain].mark == "- (1 of 2 shapes)"
    by_graph = [v.group for v in targets.fused([of("cuda", launch="graph", peak_mib=9.0)])]
    assert plain not in by_graph, "memory is no matter of the launch"


def test_nowhere_below_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what `auto` takes when fit_dispatch has read the rows: it goes by those in float32."""
    only(monkeypatch, *(BenchCase("grid", n, 1, 64, 64, cells=("GRU",), modes=("training",)) for n in (1, 32)))
    group = "plain, as auto"

    def shape(batch: int, wide: float, narrow: float) -> list[rows.BenchRow]:
        """cuDNN's time over ours in float32 and bfloat16."""
        found = []
        for dtype, ratio in (("float32", wide), ("bfloat16", narrow)):
            facts: dict[str, Any] = dict(group="grid", case=f"{batch}x1x64x64", B=batch, H=64, dtype=dtype)
            found += [of("cuda", ms=1.0, ratio_p50=ratio, **facts), of("torch", ms=ratio, ratio_p50=1.0, **facts)]
        return found

    good = shape(1, 2.0, 3.0)
    found = verdicts(*good, *shape(32, 0.5, 0.4))[group]
    assert found.met and found.worst == 1.0 and found.cases == found.shapes == 4
    left, taken = targets.behind([*good, *shape(32, 0.5, 0.4)], "cuda")
    assert [(r.B, r.ratio_p50) for r in left] == [(32, 0.5), (32, 0.4)] and taken == []
    found = verdicts(*good, *shape(32, 2.0, 0.4))[group]
    assert found.met is False and found.worst == 0.4, "faster in float32, so auto takes it in bfloat16 too"
    left, taken = targets.behind([*good, *shape(32, 2.0, 0.4)], "cuda")
    assert left == [] and [(r.B, r.dtype) for r in taken] == [(32, "bfloat16")]
    assert verdicts(*good, *shape(32, 0.98, 0.98))[group].met, "that much is noise"
    assert verdicts(*good)[group].mark == "- (2 of 4 shapes)"
    assert fit_dispatch.orders([])(good[0]) == "torch", "nothing recorded: plain layers are torch's"

    lines = gpu_check.judged([*good, *shape(32, 2.0, 0.4)], parity.Findings())
    assert (
        "cuda is slower than cuDNN, auto takes it all the same: GRU grid 32x1x64x64 training in bfloat16 0.40" in lines
    )
    lines = gpu_check.judged([*good, *shape(32, 0.5, 0.4)], parity.Findings())
    assert any(line.startswith("cuda is slower than cuDNN, auto leaves it to another: GRU grid 32x1") for line in lines)


def test_every_target_has_its_line() -> None:
    """One that nothing was measured for too."""
    asked = {
        ("cuda", launch, target.group)
        for _, launch, target in targets.all_targets([of("cuda"), of("cuda", launch="graph")])
    }
    lines = gpu_check.judged([of("cuda")], parity.Findings())
    said = [line for line in lines if " cuda by call: " in line]
    assert len(said) == len([group for _, launch, group in asked if launch == "call"]) == 8
    assert (
        "not measured: cuda by call: scan, where cta fits, inference, bfloat16, against 0.5 µs a step; "
        "wanted: each >= 1" in lines
    )
    assert any(line.startswith("- (1 of 6 shapes) cuda by call: field, H <= 256") for line in said)
    assert lines[-1].startswith("-      triton: not judged, no target of it was measured: ")


def test_the_memory_of_a_backward_that_recomputes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured of the fused backends, both sides in one run; the layer is as it was afterwards."""
    pretend(monkeypatch)
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20 * (2 if asked[-1] else 4))

    def look(o: Any) -> Any:
        asked.append(o.recompute)
        return o

    put(monkeypatch, Fused(options=look))
    case = BenchCase("field", 3, 4, 5, 6)
    monkeypatch.setattr("rnnkit.benchmarks.speed.bench_cases.TABLE", (case, BenchCase("grid", 3, 4, 5, 6)))
    bench = ["bench", "--device", "cuda", "--seconds", "0.001", "--cell", "gru", "--backend", "triton,reference"]
    assert main([*bench, "--out", str(tmp_path)]) == 0
    found = {(r.implementation, r.group, r.mode): r for r in rows.read(tmp_path / "rows.csv")}
    trained = found["triton", "field", "training"]
    assert trained.recompute_mib == 1.0
    others = [r.recompute_mib for key, r in found.items() if key != ("triton", "field", "training")]
    assert others and not any(others) and asked[-1] is False
