"""What the benchmark says of rows: tables, pictures, pages, what `auto` goes by.

On made-up rows, but for the one test that holds the pages and dispatch_times.csv against what is recorded.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made_rows import row, whole

import rnnkit
from rnnkit.backends import BY_NAME, dispatch_times
from rnnkit.benchmarks.dispatch import fit_dispatch
from rnnkit.benchmarks.speed import machine, pages, picture, report, rows, targets, timing
from rnnkit.benchmarks.speed.bench_cases import BadInput

ROOT = Path(__file__).resolve().parents[2]
RECORDED = pytest.mark.skipif(not rows.RESULTS.is_dir(), reason="a wheel carries no results")


# Tables.


def test_the_readme_marks_each_target() -> None:
    text = report.summary(
        {"a": [*whole("grid", ratio_p50=5.0), *whole("grid", cell="LSTM", ratio_p50=1.1),
               *whole("scan", mode="inference", share=0.7)[:1], row(cell="RNN")]}, "results"
    )  # fmt: skip
    (layers,) = [line for line in text.splitlines() if line.startswith("| grid, training, against torch.nn")]
    assert "RNN, GRU: mean ≥ 4 or 76% of the limit on large rows, worst ≥ 1; LSTM: mean ≥ 1.3" in layers
    assert layers.endswith("| 4.00, 50%: - (1 of 21 shapes) | 1.10 (1.10), 50%: **missed** | 5.00 (5.00), 50%: met |")
    (scan,) = [line for line in text.splitlines() if line.startswith("| scan, ")]
    assert "mean ≥ 85% of the peak, worst ≥ 80%" in scan and scan.endswith("| 70%: **missed** |")


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
    held = row(ratio_p50=1.0, isa="avx2")
    assert rows.merge([first], [held]) == [first, held], "of another instruction set"
    with pytest.raises(BadInput, match=r"other\.csv has the columns"):
        rows.read(tmp_path / "other.csv")


@pytest.mark.parametrize("lacks", [1, 2, 3, 4, 5])
def test_rows_of_before_there_were_all_columns(lacks: int, tmp_path: Path) -> None:
    """Before there were dtypes all was float32; before there were instruction sets all of a CPU was AVX-512."""
    path, written = tmp_path / "rows.csv", [row(), row(device="cuda", isa="-", processor_isa="-")]
    rows.write(path, written)
    lines = path.read_text().splitlines()
    assert lines[0].endswith(",dtype,recompute_mib,isa,processor_isa,compile_s")
    path.write_text("\n".join(line.rsplit(",", lacks)[0] for line in lines) + "\n")
    assert rows.read(path) == written


def test_names_of_files() -> None:
    assert machine.file_name("cpu", "AMD EPYC (Zen 4)", "avx2") == "cpu-amd-epyc-zen4-avx2"
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
    rows.write(clone / "results" / "cpu-abacus-zen9-avx512.csv", some)
    held = row(ratio_p50=3.0, isa="avx2", peak_gflops=50.0)
    rows.write(clone / "results" / "cpu-abacus-zen9-avx2.csv", [held])
    for _ in range(2):
        assert pages.main(words) == 0
        text = readme.read_text()
        assert text.count("# A\n") == text.count("last\n") == 2 and "stale" not in text and "77" not in text
        assert "as fast as with torch.nn on AVX-512 and 3.0 times on AVX2**: geometric mean over shapes" in text
        assert "Abacus (Zen 9), AVX-512: GRU 4.0, 2 shapes; Abacus (Zen 9) held to AVX2: GRU 3.0, 1 shapes" in text
        (layers,) = [line for line in text.splitlines() if line.startswith("| plain layers, against torch.nn")]
        assert layers.split(" | ")[1:] == ["GRU", "", "4.00 (2.00)", "", "3.00 (3.00) |"], "side by side, widest first"
        assert "AVX-512: inference | AVX-512: training | AVX2: inference | AVX2: training |" in text
        deep = performance.read_text()
        assert "### Abacus (Zen 9), AVX-512, 2 threads, float32" in deep and "peak 100 GFLOP/s a core" in deep
        assert "### Abacus (Zen 9) held to AVX2, 1 thread, float32" in deep and "peak 50 GFLOP/s a core" in deep
        assert "(../benchmarks/results/cpu-abacus-zen9-avx2.csv)" in deep
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
    some = [[row(ratio_p50=1.999)], [row(ratio_p50=1.21, isa="avx2")], [row(mode="inference")]]
    assert "**Training is 1.9 times as fast as with torch.nn on AVX-512 and 1.2 times on AVX2**" in pages.number(some)
    assert "**Training is 1.2 times as fast as with torch.nn on AVX2**" in pages.number(some[1:])


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
