"""What the benchmark says of rows: targets met or missed, tables, pictures, pages, what `auto` goes by.

On made-up rows, but for the one test that holds the pages and dispatch_times.csv against what is recorded.
"""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made_rows import row

import rnnkit
from rnnkit.backends import BY_NAME, dispatch_times
from rnnkit.benchmarks.dispatch import fit_dispatch
from rnnkit.benchmarks.speed import machine, pages, picture, report, rows, targets, timing
from rnnkit.benchmarks.speed.bench_cases import TABLE, BadInput, BenchCase

ROOT = Path(__file__).resolve().parents[2]
RECORDED = pytest.mark.skipif(not rows.RESULTS.is_dir(), reason="a wheel carries no results")


# Targets.


@pytest.mark.parametrize(
    ("facts", "met"),
    [
        ([dict(ratio_p50=2.0), dict(ratio_p50=8.0)], True),  # geometric mean 4
        ([dict(ratio_p50=2.0), dict(ratio_p50=7.9)], False),
        ([dict(ratio_p50=0.99), dict(ratio_p50=40.0)], False),  # the worst
        ([dict(ratio_p50=1.1, share=0.9), dict(ratio_p50=1.2, share=0.63)], True),  # the limit: 0.753
        ([dict(ratio_p50=1.1, share=0.9), dict(ratio_p50=1.2, share=0.62)], False),
        ([dict(ratio_p50=0.9, share=0.9)], False),
        ([dict(cell="LSTM", ratio_p50=1.3), dict(cell="LSTM", ratio_p50=1.3)], True),
        ([dict(cell="LSTM", ratio_p50=0.96), dict(cell="LSTM", ratio_p50=3.0)], False),
        ([dict(cell="LSTM", mode="inference", ratio_p50=1.21)], True),
        ([dict(mode="inference", ratio_p50=3.0)], True),
        ([dict(mode="inference", ratio_p50=2.9)], False),
        ([dict(mode="inference", against="onnxruntime", ratio_p50=1.31)], True),
        ([dict(mode="inference", against="onnxruntime", ratio_p50=1.29)], False),
        ([dict(group="step", mode="inference", ratio_p50=2.0)], True),
        ([dict(group="step", mode="inference", ratio_p50=1.9)], False),
        ([dict(group="step", mode="inference", cell="RNN", ratio_p50=1.5)], True),
        ([dict(group="scan", mode="inference", B=32, H=128, share=0.81, ratio_p50=0.1)], True),
        ([dict(group="scan", mode="inference", share=0.9), dict(group="scan", mode="inference", share=0.79)], False),
        ([dict(group="resets", against="without", ratio_p50=0.96)], True),
        ([dict(group="lengths", against="without", ratio_p50=1.5), dict(group="lengths", against="without",
                                                                          ratio_p50=0.94)], False),
        ([dict(group="resets", against="torch.nn, split", ratio_p50=0.1)], None),
        ([dict(group="field", ratio_p50=0.1)], None),
        ([dict(device="cuda", ratio_p50=0.1)], None),
    ],
)  # fmt: skip
def test_targets(facts: list[dict[str, Any]], met: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [row(case=f"{some.get('B', 1)}x{k}x1x1", **some) for k, some in enumerate(facts)]
    monkeypatch.setattr(targets, "TABLE", [BenchCase(r.group, r.B, k, 1, 1) for k, r in enumerate(found)])
    (verdict,) = targets.judge(found)
    assert verdict.met is met and verdict.mark == {True: "met", False: "MISSED", None: "-"}[met]
    assert verdict.cases == len(facts) and verdict.mark in report.cells(verdict)


def whole(group: str, wide: bool = True, **facts: Any) -> list[rows.BenchRow]:
    """A row for each shape of a group on a CPU; of `scan`, those with B > 1 or with B = 1."""
    every = [case for case in TABLE if case.group == group and "cpu" in case.devices]
    some = [case for case in every if group != "scan" or wide == (case.batch > 1)]
    return [row(group=group, case=case.name, B=case.batch, **facts) for case in some]


@pytest.mark.parametrize(
    ("group", "facts", "floor"),
    [
        ("grid", dict(ratio_p50=5.0), dict(ratio_p50=0.9)),
        ("grid", dict(ratio_p50=1.1), dict(ratio_p50=0.9)),
        ("scan", dict(mode="inference", share=0.9), dict(share=0.5)),
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


def test_a_module_of_ones_own_stands_in_the_table_without_a_mark() -> None:
    found = targets.judge([row(), row(implementation="cpu"), row(implementation="my.package:Own", ratio_p50=0.1)])
    assert [(v.implementation, v.wanted == "", v.met) for v in found] == [
        ("auto", False, None), ("my.package:Own", True, None),
    ]  # fmt: skip
    assert "my.package:Own: grid, against torch.nn" in report.cells(found[1])


def test_what_is_possible_at_all() -> None:
    (verdict,) = targets.judge([row(ratio_p50=2.0, share=0.5), row(case="2x2x2x2", ratio_p50=8.0, share=0.8)])
    assert verdict.possible == pytest.approx(math.sqrt(4.0 * 10.0))
    assert f"{verdict.possible:.2f}" in report.cells(verdict)[report.HEAD.index("possible")]


def test_the_readme_marks_each_target() -> None:
    text = report.summary(
        {"a": [*whole("grid", ratio_p50=5.0), *whole("grid", cell="LSTM", ratio_p50=1.1),
               *whole("scan", mode="inference", share=0.7)[:1], row(cell="RNN")]}, "results"
    )  # fmt: skip
    (layers,) = [line for line in text.splitlines() if line.startswith("| grid, training, against torch.nn")]
    assert "RNN, GRU: mean ≥ 4 or 75% of the limit, worst ≥ 1; LSTM: mean ≥ 1.3" in layers
    assert layers.endswith("| 4.00, 50%: - (1 of 17 shapes) | 1.10 (1.10), 50%: **missed** | 5.00 (5.00), 50%: met |")
    (scan,) = [line for line in text.splitlines() if line.startswith("| scan, ")]
    assert "each ≥ 80% of the peak" in scan and scan.endswith("| 70%: **missed** |")


@pytest.mark.parametrize(("share", "said"), [(0.746, "74%"), (0.75, "75%"), (0.29, "29%"), (1.0, "100%")])
def test_a_missed_share_does_not_read_as_a_met_one(share: float, said: str) -> None:
    assert report.percent(share) == said


def test_percentiles_and_means() -> None:
    assert timing.percentiles([float(k) for k in range(11)]) == (2.0, 5.0, 8.0)
    assert targets.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert targets.geometric_mean([2.0, 0.0]) == 0.0


# Files.


def test_rows_come_back_and_newer_ones_take_the_place(tmp_path: Path) -> None:
    first, second = row(), row(mode="inference", peak_mib=None)
    rows.write(tmp_path / "deep" / "rows.csv", [first, second])
    assert rows.read(tmp_path / "deep" / "rows.csv") == [first, second]
    newer = row(ratio_p50=9.0, commit="def")
    assert rows.merge([first, second], [newer]) == [newer, second]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match=r"other\.csv has the columns"):
        rows.read(tmp_path / "other.csv")


def test_names_of_files() -> None:
    assert machine.file_name("cpu", "AMD EPYC (Zen 4)") == "cpu-amd-epyc-zen4"
    assert machine.file_name("cuda", "NVIDIA H100 80GB HBM3") == "cuda-nvidia-h100-80gb-hbm3"
    assert machine.processor("cpu") and re.fullmatch("[0-9a-f]{7,}[+]?|0[.].*", machine.commit())


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.commit() == rnnkit.__version__


def test_the_commit_is_not_marked_for_what_recording_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, other = tmp_path / "benchmarks" / "machine.py", tmp_path / "rnnkit" / "ops.py"
    made = [tmp_path / path for path in ("benchmarks/results/a.csv", "rnnkit/backends/dispatch_times.csv",
                                         pages.README, pages.PERFORMANCE, *pages.PICTURES.values())]  # fmt: skip
    for path in (module, other, *made):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "--no-gpg-sign", "-m", "1"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(machine, "__file__", str(module))
    clean = machine.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    for path in made:
        path.write_text("2")
    assert machine.commit() == clean
    other.write_text("2")
    assert machine.commit() == f"{clean}+"


MARKED = "# A\n\n<!-- {0}: begin -->\nstale\n<!-- {0}: end -->\n\nlast\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with pages whose figures are old, and with no rows."""
    for name in ("docs/assets", "results"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / pages.README).write_text(MARKED.format("number") + MARKED.format("speed"))
    (tmp_path / pages.PERFORMANCE).write_text(MARKED.format("tables"))
    return tmp_path


def test_the_script_of_the_pages(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, performance = clone / pages.README, clone / pages.PERFORMANCE
    words = ["--root", str(clone), "--results", str(clone / "results")]
    before = readme.read_text()
    assert pages.main(words) == 2 and "no rows" in capsys.readouterr().err
    assert readme.read_text() == before, "nothing is changed before everything is known"
    some = [row(case="a", ratio_p50=2.0), row(case="b", ratio_p50=8.0), row(group="step", mode="inference"),
            row(case="a", ratio_p50=77.0, threads=2)]  # fmt: skip
    rows.write(clone / "results" / "cpu-abacus-zen9.csv", some)
    for _ in range(2):
        assert pages.main(words) == 0
        text = readme.read_text()
        assert text.count("# A\n") == text.count("last\n") == 2 and "stale" not in text and "77" not in text
        assert "**Training is 4.0 times as fast as with torch.nn**: geometric mean over 2 shapes (GRU 4.0)" in text
        assert "Abacus (Zen 9), 1 thread, float32" in text
        (layers,) = [line for line in text.splitlines() if line.startswith("| plain layers, against torch.nn")]
        assert layers.split(" | ")[1:] == ["", "", "", "", "", "4.00 (2.00) |"]
        deep = performance.read_text()
        assert (
            "### Abacus (Zen 9), 2 threads, float32" in deep and "(../benchmarks/results/cpu-abacus-zen9.csv)" in deep
        )
        assert "| a |  |  |  |  |  | 2.00 |\n| b |  |  |  |  |  | 8.00 |" in deep
        assert "| 4.00 |" in deep.replace("|  |", "|"), "one case has no worst"


@pytest.mark.parametrize(
    "broken", ["# A\n", MARKED.format("speed") * 2, "<!-- speed: end -->\n<!-- speed: begin -->\n"]
)
def test_a_page_without_its_marks_is_left_alone(broken: str, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = clone / pages.README
    readme.write_text(MARKED.format("number") + broken)
    rows.write(clone / "results" / "cpu-abacus-zen9.csv", [row()])
    before = readme.read_text()
    assert pages.main(["--root", str(clone), "--results", str(clone / "results")]) == 2
    assert "expected one line <!-- speed: begin -->" in capsys.readouterr().err and readme.read_text() == before


def test_the_figure_in_the_first_lines_is_rounded_down() -> None:
    assert "is 1.9 times" in pages.number([row(ratio_p50=1.999)])


def test_the_picture_is_the_rows(tmp_path: Path) -> None:
    """A dot for each shape, the mean in figures, nothing of the machine, the same text every time."""
    some = [*whole("grid", ratio_p50=5.0), *whole("grid", cell="LSTM", mode="inference", ratio_p50=0.5)]
    drawn = {name: picture.draw(some, "A <machine>", theme) for name, theme in picture.THEMES.items()}
    assert len(set(drawn.values())) == 2
    for name, text in drawn.items():
        assert text == picture.draw(some, "A <machine>", picture.THEMES[name])
        assert text.count("<circle") == len(some) and ">5.00<" in text and ">0.50<" in text
        assert "A &lt;machine&gt;" in text and str(ROOT) not in text
        places = [float(x) for x in re.findall(r'(?:cx|x|x1|x2)="([-0-9.]+)"', text)]
        assert min(places) >= 0 and max(places) <= picture.WIDTH
        ElementTree.fromstring(text)


def lines(some: list[dispatch_times.RecordedShape]) -> list[list[str]]:
    return [dispatch_times.written(one, tuple(BY_NAME)) for one in some]


def test_choose_takes_plain_layers_on_gpus_and_averages_processors(tmp_path: Path) -> None:
    def facts(name: str, ms: float, **more: Any) -> rows.BenchRow:
        return row(**{"implementation": name, "ms": ms, "device": "cuda", **more})

    others = [
        facts("auto", 9),
        facts("cuda", 9, layers=2),
        facts("cuda", 9, group="step"),
        facts("cpu", 9, device="cpu"),
    ]
    one = [facts("cuda", 1.0), facts("torch", 2.0), facts("reference", 3.0), *others]
    two = [facts("cuda", 4.0), facts("torch", 8.0), facts("cuda", 5.0, mode="inference", cell="RNN")]
    found = fit_dispatch.table({"b": two, "a": one})
    assert lines(found) == [
        ["cuda", "", "float32", "gru", "1", "", "1", "1", "64", "64", "a+b", "2", "", "", "4", ""],
        ["cuda", "", "float32", "rnn_tanh", "0", "", "1", "1", "64", "64", "b", "5", "", "", "", ""],
    ]
    assert fit_dispatch.table({"a": others}) == []
    file = tmp_path / "dispatch_times.csv"
    cpu = [some for some in dispatch_times.read(dispatch_times.FILE) if some.kind.device == "cpu"]
    fit_dispatch.save(file, [*cpu, found[1]._replace(source="older")])
    rows.write(tmp_path / "results" / "b.csv", two)
    assert fit_dispatch.main(["--results", str(tmp_path / "results"), "--to", str(file)]) == 0
    kept = sorted(cpu, key=lambda some: some.key)
    assert lines(dispatch_times.read(file)) == lines([*kept, *fit_dispatch.table({"b": two})])
    assert fit_dispatch.main(["--results", str(tmp_path), "--to", str(file)]) == 2, "no rows of a GPU: left alone"


@RECORDED
def test_what_is_recorded_is_what_the_pages_and_auto_say() -> None:
    """All are written by scripts, from benchmarks/results/ alone."""
    files = {path.stem: rows.read(path) for path in rows.recorded(rows.RESULTS)}
    for path, text in pages.written(ROOT, files).items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path}: python -m rnnkit.benchmarks.speed.pages"
    every = dispatch_times.read(dispatch_times.FILE)
    assert lines([some for some in every if some.kind.device != "cpu"]) == lines(fit_dispatch.table(files)), (
        "python -m rnnkit.benchmarks.dispatch.fit_dispatch"
    )
    head, *_ = dispatch_times.FILE.read_text(encoding="utf-8").splitlines()
    assert head.split(",") == [*dispatch_times.FACTS, *BY_NAME]


@pytest.mark.parametrize("shapes", [1, 3, 17])
def test_the_words_of_the_picture_of_ratios_fit_in(shapes: int) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from rnnkit.benchmarks.speed import plots

    for modes in (("training",), ("inference", "training")):
        figure = plots.ratios([r for mode in modes for r in whole("grid", mode=mode)[-shapes:]])
        assert figure is not None
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for label in (figure.axes[0].yaxis.label, figure.axes[0].xaxis.label, figure._suptitle):
            box = label.get_window_extent(canvas.get_renderer())
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, (
                label.get_text()
            )


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rnnkit.benchmarks.speed import plots

    sweep = [row(group="sweep", T=t, B=16, H=128, I=128, ms=t / 10, against_ms=t / 5) for t in (1, 8, 64)]
    drawn = plots.draw(tmp_path, [row(), row(case="2x2x2x2", threads=2), *sweep])
    assert sorted(path.name for path in drawn) == ["ratios-1t.png", "ratios-2t.png", "sizes-training-1t.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000 for path in drawn)
    assert plots.draw(tmp_path, [row(group="resets", against="without")]) == []
