"""The benchmark of custom cells: what is chosen, that the loop is the cell, what is wrong, its targets and its tables.

Nothing here says how fast anything is, and nothing is compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_rows import SHAPE, Made, row

import rnnkit
from rnnkit import variants
from rnnkit.benchmarks.speed import (
    bench_cases,
    pages,
    report,
    roofline,
    rows,
    targets,
    timing,
    variant_cells,
    variant_goals,
    variant_loops,
    variant_table,
)
from rnnkit.benchmarks.speed.accuracy import AccuracyCheck
from rnnkit.benchmarks.speed.bench_cases import CUSTOM, VARIANTS, BenchCase, BenchJob, select
from rnnkit.benchmarks.speed.variant_loops import BUILT_IN, COMPILED_LOOP, LOOP

NAMED = {
    *("LSTM", "GRU", "LayerNormLSTM", "LayerNormGRU", "LayerNormSumLSTM", "LayerNormSumGRU", "PeepholeLSTM"),
    *("ZoneoutLSTM", "ZoneoutGRU", "RecurrentDropoutLSTM", "RecurrentDropoutGRU", "CandidateDropoutLSTM"),
    *("CandidateDropoutGRU", "CoupledLSTM", "IndRNN", "LiGRU", "SLSTM", "BlockGRU", "GRUD", "AUGRU", "MGU"),
}


def job(cell: str, mode: str = "training", **sizes: int) -> BenchJob:
    shape = {"batch": 2, "steps": 3, "inputs": 5, "hidden": 8, **sizes}
    return BenchJob(BenchCase("variants", **shape, cells=VARIANTS), cell, mode)  # type: ignore[arg-type]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups of custom cells have a small shape each."""
    cases = [case for case in bench_cases.TABLE if case.group not in CUSTOM]
    both = [BenchCase("variants", 2, 3, 8, 8, cells=VARIANTS, devices=("cpu",), quick=True)]
    both.append(dataclasses.replace(both[0], group="compiled", modes=("inference",)))
    monkeypatch.setattr(bench_cases, "TABLE", (*cases, *both))


# What is measured.


def test_every_variant_has_its_jobs() -> None:
    assert {*VARIANTS} >= NAMED and "time_gaps" not in VARIANTS and "GRUDInputs" not in VARIANTS
    jobs = select("cpu", cells=["variants"])
    assert {j.case.group for j in jobs} == {"variants"}, (
        "compiled ones are for --compile, plain ones are another matter"
    )
    shapes = {j.case.name for j in jobs}
    assert {"4x100x64x64", "32x100x128x128"} <= shapes
    assert {(j.case.name, j.cell, j.mode) for j in jobs} == {
        (shape, cell, mode) for shape in shapes for cell in VARIANTS for mode in bench_cases.MODES
    }
    compiled = select("cpu", cells=["variants"], compiled=True)
    assert {j.case.steps for j in compiled if j.case.group == "compiled"} == {32}
    assert {j.mode for j in compiled if j.case.group == "compiled"} == {"inference"}
    assert {j.case.group for j in select("cpu", cells=["variants"], quick=True)} == {"variants"}
    assert len(select("cpu", cells=["variants"], quick=True)) == 2 * len(VARIANTS)


def test_plain_jobs_are_without_custom_cells() -> None:
    assert not {j.case.group for j in select("cpu")} & {*CUSTOM}
    assert not {j.case.group for j in select("cpu", ["judged"])} & {*CUSTOM}
    assert not {j.case.group for j in select("cpu", cells=["lstm", "gru"])} & {*CUSTOM}
    assert {j.cell for j in select("cpu", cells=["slstm"])} == {"SLSTM"}
    assert {(j.case.group, j.cell) for j in select("cpu", ["variants"], ["lstm"])} == {("variants", "LSTM")}
    both = {(j.case.group in CUSTOM, j.cell) for j in select("cpu", cells=["LSTM", "MGU"])}
    assert both == {(False, "LSTM"), (True, "LSTM"), (True, "MGU")}
    assert {j.cell for j in select("cpu", [SHAPE], ["variants", "rnn"])} == {"RNN"}


def test_operations_of_a_custom_cell() -> None:
    for cell in variant_cells.BUILT_IN:
        case = BenchCase("grid", 2, 3, 5, 8)
        assert job(cell, "inference").flops == BenchJob(case, cell, "inference").flops
    assert job("IndRNN", "inference").flops == 2 * 3 * 2 * 8 * 5, "no product with the state"
    heads = variant_cells.HEADS["SLSTM"]
    assert job("SLSTM", "inference").flops == 2 * 3 * 2 * 8 * (4 * 5 + 4 * 8 / heads)
    made: Any = Made()
    limit = [roofline.roofline_seconds(made, job("MGU", mode), "cpu", 1) for mode in bench_cases.MODES]
    assert 0 < limit[0] < limit[1]


# The loop.


@pytest.mark.parametrize("mode", bench_cases.MODES)
@pytest.mark.parametrize("cell", VARIANTS)
def test_the_loop_is_the_cell(cell: str, mode: str) -> None:
    made = variant_loops.setup(job(cell, mode), "cpu", 1, ("auto", "reference"), False, None)
    assert [one.name for one in made.ours] == ["auto", "reference"] and not made.failed and not made.cannot
    names = [LOOP, BUILT_IN] if cell in variant_cells.BUILT_IN else [LOOP]
    assert [peer.name for peer in made.peers] == names and made.ours[1].ran == "reference"
    check = AccuracyCheck(job(cell, mode), made)
    assert all(check.error_ratio(one) <= 1 for one in made.ours)
    assert all(check.error_ratio(peer, peer=True) <= 1 for peer in made.peers)


def test_masks_are_drawn_by_both_sides_in_every_call() -> None:
    made = variant_loops.setup(job("ZoneoutLSTM"), "cpu", 1, ("auto",), False, None)
    for one in (*made.ours, *made.peers):
        first, second = one.run(one.module, made.x)[0], one.run(one.module, made.x)[0]
        assert not torch.equal(first, second)
        assert all(map(torch.equal, one.numbers(made.x, True), one.numbers(made.x, True)))
    before = torch.get_rng_state()
    made.ours[0].numbers(made.x, True)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_call_brings_has_its_gradient() -> None:
    made = variant_loops.setup(job("AUGRU"), "cpu", 1, ("reference",), False, None)
    closed = made.baseline.run.__closure__ or ()
    (given,) = [cell.cell_contents for cell in closed if isinstance(cell.cell_contents, dict)]
    assert given["attention"].shape == (3, 2) and given["attention"].requires_grad
    for one in (*made.ours, made.baseline):
        given["attention"].grad = None
        one.work(made.x, True)()
        assert given["attention"].grad.abs().sum() > 0


def test_every_cell_is_compiled_anew_and_its_time_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    @contextlib.contextmanager
    def fresh() -> Iterator[None]:
        said.append("fresh")
        yield

    monkeypatch.setattr("torch._inductor.utils.fresh_cache", fresh)
    monkeypatch.setattr(torch.compiler, "reset", lambda: said.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: said.append(dynamic) or module)
    short = job("MGU", "inference")
    over = dataclasses.replace(short, case=dataclasses.replace(short.case, group="compiled"))
    made = variant_loops.setup(over, "cpu", 1, ("auto",), True, None)
    assert said == ["reset", False, "fresh"]
    assert [peer.name for peer in made.peers] == [LOOP, COMPILED_LOOP] and made.compile_seconds[COMPILED_LOOP] > 0
    assert not variant_loops.setup(short, "cpu", 1, ("auto",), True, None).compile_seconds

    def broken(module: Any, dynamic: bool) -> Any:
        def call(*_: object, **__: object) -> None:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    made = variant_loops.setup(over, "cpu", 1, ("auto",), True, None)
    assert made.unable == ["compiled loop cannot run here and is left out: RuntimeError: no C++ compiler"]
    assert [peer.name for peer in made.peers] == [LOOP]


# A run.


@pytest.mark.usefixtures("tiny")
def test_a_run(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    assert bench("--cell", "LSTM,LayerNormSumGRU", "--case", "variants,compiled", "--compile") == 0
    kept = rows.read(tmp_path / "rows.csv")
    assert {r.implementation for r in kept} == {"auto"} and all(r.ran in ("cpu", "reference") for r in kept)
    found = {(r.group, r.cell, r.against) for r in kept}
    assert found == {
        *(("variants", cell, LOOP) for cell in ("LSTM", "LayerNormSumGRU")),
        *(("compiled", cell, peer) for cell in ("LSTM", "LayerNormSumGRU") for peer in (LOOP, COMPILED_LOOP)),
        *((group, "LSTM", BUILT_IN) for group in CUSTOM),
    }
    assert all((r.compile_s is not None) == (r.against == COMPILED_LOOP) for r in kept)
    assert all(r.ms > 0 and r.commit and r.processor and r.isa and r.torch for r in kept)
    said = capsys.readouterr()
    assert said.err.count("compiling the loop, some half a minute") == 2 and "compiled in" in said.err
    text = (tmp_path / "report.md").read_text()
    assert "compiling, s" in text and "### variants, training" in text and "variants, against loop" in text


@pytest.mark.usefixtures("tiny")
def test_what_is_wrong_has_no_time(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = rnnkit.Custom.forward

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        y, states = right(self, *args, **kwargs)
        return y * 1.0001, states

    monkeypatch.setattr(rnnkit.Custom, "forward", wrong)
    timed: list[int] = []
    monkeypatch.setattr(timing, "alternate", lambda works, *_: timed.append(len(works)) or [[1.0] * 2 for _ in works])
    assert bench("--cell", "MGU") == 1
    assert capsys.readouterr().out.count("auto is WRONG") == 2 and not timed
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.usefixtures("tiny")
def test_a_backend_that_has_no_custom_cells_says_so(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--cell", "MGU", "--mode", "inference", "--backend", "torch") == 2
    assert "backend 'torch' cannot run MGU" in capsys.readouterr().out


def test_what_is_no_cell_is_named(bench: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--cell", "peephole") == 2
    said = capsys.readouterr().err
    assert "'peephole'" in said and "RNN, LSTM, GRU, variants, each of rnnkit.variants" in said


# What is aimed at.


def of(case: str = "4x100x64x64", ratio: float = 13.0, against: str = LOOP, **facts: Any) -> list[rows.BenchRow]:
    """A row for each cell of a shape."""
    cells = variant_cells.BUILT_IN if against == BUILT_IN else VARIANTS
    hidden = int(case.rpartition("x")[2])
    some = {"group": "variants", "case": case, "H": hidden, "against": against, "ratio_p50": ratio, **facts}
    return [row(**some, cell=cell) for cell in cells]


def marks(some: list[rows.BenchRow]) -> dict[tuple[str, str, str], bool | None]:
    return {(v.group, v.mode, v.against): v.met for v in targets.judge(some)}


@pytest.mark.parametrize(
    ("case", "least"), [("4x100x64x64", 12.0), ("32x100x128x128", 1.5)], ids=["small", "products bind"]
)
def test_training_against_the_loop(case: str, least: float) -> None:
    key = (f"variants, {case}", "training", LOOP)
    assert marks(of(case, least + 0.01))[key] is True
    assert marks(of(case, least - 0.01))[key] is False
    assert marks(of(case, least + 0.01)[1:])[key] is None, "not all cells"
    first, *others = of(case, 4 * least)
    below = [dataclasses.replace(first, ratio_p50=0.99), *others]
    assert marks(below)[key] is False, "nowhere below 1"
    assert marks([below[0]])[key] is False, "no further cell can mend that"
    assert marks(of(case, 0.5, threads=2))[key] is None and marks(of(case, 0.5, dtype="bfloat16"))[key] is None


def test_the_other_targets() -> None:
    assert marks(of("2x10x32x32", 0.99))["variants, other shapes", "training", LOOP] is False
    every = [case.name for case in bench_cases.TABLE if case.group == "variants"]
    for ratio, met in ((1.01, True), (0.99, False)):
        inference = [r for case in every for r in of(case, ratio, mode="inference")]
        assert marks(inference)["variants", "inference", LOOP] is met
    over = [case.name for case in bench_cases.TABLE if case.group == "compiled"]
    key = ("compiled", "inference", COMPILED_LOOP)
    for ratio, worst, met in ((1.05, 0.95, True), (1.05, 0.89, False), (0.95, 0.95, False)):
        some = [r for case in over for r in of(case, ratio, COMPILED_LOOP, group="compiled", mode="inference")]
        assert marks([dataclasses.replace(some[0], ratio_p50=worst), *some[1:]])[key] is met
    for case, least, words in (("32x100x128x128", 0.8, "H >= 128"), ("4x100x64x64", 0.6, "H < 128")):
        key = (f"variants, {words}", "training", BUILT_IN)
        others = [r for name in every if name not in (case, "32x100x128x128") for r in of(name, 0.7, BUILT_IN)]
        wide = of("32x100x128x128", 0.9, BUILT_IN) if case != "32x100x128x128" else []
        assert marks([*of(case, least + 0.01, BUILT_IN), *others, *wide])[key] is True
        assert marks([*of(case, least - 0.01, BUILT_IN), *others, *wide])[key] is False


def test_settings_are_judged_apart() -> None:
    found = targets.judge([*of(ratio=13.0), *of(ratio=11.0, isa="avx2"), *of(ratio=2.0, threads=2), row()])
    assert [(v.cell, v.threads, v.met) for v in found if v.cell == "all"] == [
        ("all", 1, False), ("all", 1, True), ("all", 2, None)
    ]  # fmt: skip
    assert [v.group for v in found if v.cell == "GRU"] == ["grid"], "custom cells have no verdict each"
    (one,) = [v for v in found if v.met]
    assert one.wanted == "mean >= 12, worst >= 1" and one.cases == one.shapes == len(VARIANTS)
    assert one.worst_case.endswith(" 4x100x64x64") and "all" in report.cells(one)


# Tables and pictures.


def test_tables() -> None:
    compiled = of("4x32x64x64", 2.0, COMPILED_LOOP, group="compiled", mode="inference", compile_s=31.7)
    some = [*of(), *of("32x100x128x128", 0.85, BUILT_IN), *compiled, row()]
    found = variant_table.table(some)
    assert found is not None
    head, lines = found
    assert head == [
        "cell",
        "loop, training, 4×100×64×64",
        "compiled loop, inference, 4×32×64×64",
        "built-in, training, 32×100×128×128",
    ]
    assert [line[0] for line in lines] == list(VARIANTS)
    assert lines[0] == ["LSTM", "13.00", "2.00 (32 s)", "0.85"] and lines[-1][-1] == ""
    assert variant_table.table([row()]) is None
    text = pages.tables({"a": some})
    assert pages.CUSTOM in text and "| LSTM | 13.00 | 2.00 (32 s) | 0.85 |" in text and "| met |" in text
    assert "variants" not in pages.tables({"a": [row()]})
    assert variant_goals.is_custom(some[0]) and not variant_goals.is_custom(row())
    told = compiled[0].line()
    assert "compiled in 32 s" in told and "compiled in" not in row().line()


def test_the_column_of_compiling_comes_back(tmp_path: Path) -> None:
    some = [*of("4x32x64x64", 2.0, COMPILED_LOOP, group="compiled", compile_s=31.5)[:1], row()]
    rows.write(tmp_path / "rows.csv", some)
    assert rows.read(tmp_path / "rows.csv") == some


@pytest.mark.parametrize("cells", [1, len(VARIANTS)])
def test_the_picture(cells: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from rnnkit.benchmarks.speed import plots, variant_plot

    some = [*of()[:cells], *of(ratio=0.5, mode="inference")[:cells]]
    some += of("4x32x64x64", 2.0, COMPILED_LOOP, group="compiled", mode="inference")[:cells]
    assert [path.name for path in plots.draw(tmp_path, some)] == ["variants.png"]
    figure = variant_plot.ratios(some, "somewhere")
    assert figure is not None and len(figure.axes) == 3
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        box = axes.xaxis.label.get_window_extent(canvas.get_renderer())
        assert box.y0 >= figure.legends[0].get_window_extent(canvas.get_renderer()).y1, "words stand on words"
    assert "4×100×64×64: 13.00" in figure.axes[0].get_title()
    assert variant_plot.ratios([row()], "somewhere") is None


def test_a_class_that_is_added_is_measured() -> None:
    """What rnnkit.variants exports and is a cell, all but the plain RNN."""
    own = [name for name in variants.__all__ if issubclass(type(getattr(variants, name)), type)]
    cells = {name for name in own if issubclass(getattr(variants, name), rnnkit.Cell)}
    assert {*VARIANTS} == cells - {"RNN"}
