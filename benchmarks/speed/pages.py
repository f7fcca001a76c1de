"""Writes the pages that show recorded rows: README's number and table, docs/performance.md's tables, the picture.

    python -m rnnkit.benchmarks.speed.pages      writes them in this clone, from benchmarks/results/ alone

What is written stands between two marks, `<!-- NAME: begin -->` and `<!-- NAME: end -->`; the rest of a page is
people's. A test holds every page against the rows.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rnnkit.cli.instruction_set import SETTINGS, WORDS

from . import picture, report, targets, variant_table
from .bench_cases import CELLS, MODES, BadInput
from .implementations import ORT, PACKED, SPLIT, STEPWISE, TORCH
from .rows import RESULTS, BenchRow, read, recorded
from .variant_goals import is_custom

README, PERFORMANCE = "README.md", "docs/performance.md"
PICTURES = {theme: f"docs/assets/speed-{theme}.svg" for theme in picture.THEMES}
WIDEST = (*SETTINGS, "-")
# README's table, line by line: group, peer, words.
SMALL = (
    ("grid", TORCH, "plain layers, against torch.nn"),
    ("grid", ORT, "plain layers, against ONNX Runtime"),
    ("stacks", TORCH, "stacks of 1 to 3 small layers, against torch.nn"),
    ("lengths", PACKED, "lengths, against torch.nn on packed rows"),
    ("resets", STEPWISE, "resets, against a loop over torch.nn's cell"),
    ("resets", SPLIT, "resets, against torch.nn on rows split at them"),
)


def written(root: Path, files: Mapping[str, Sequence[BenchRow]]) -> dict[str, str]:
    """Every page as it must be, by its path below `root`. Raises BadInput where a page lacks its marks."""
    every = [own for rows in files.values() if (own := _one_thread(rows))]
    if not every:
        raise BadInput("no rows of one CPU thread; `make bench BENCH=--record` puts some into benchmarks/results")
    every.sort(key=lambda rows: WIDEST.index(rows[0].isa))  # stable: by name among those of one instruction set
    readme = put(_read(root / README), "number", number(every), README)
    pages = {
        README: put(readme, "speed", small(every), README),
        PERFORMANCE: put(_read(root / PERFORMANCE), "tables", tables(files), PERFORMANCE),
    }
    about = f"{_on(every[0])}, 1 thread, float32, torch {_version(every[0])}"
    return pages | {path: picture.draw(every[0], about, picture.THEMES[theme]) for theme, path in PICTURES.items()}


def _one_thread(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """What README shows of a processor: float32 on one thread, as `auto` runs it."""
    return [
        row for row in rows
        if (row.device, row.threads, row.dtype, row.implementation) == ("cpu", 1, "float32", "auto")
    ]  # fmt: skip


def _on(rows: Sequence[BenchRow]) -> str:
    """The processor and the instruction set."""
    return report.where(rows[0].processor, rows[0].isa, rows[0].processor_isa)


def _version(rows: Sequence[BenchRow]) -> str:
    """torch's, without what it was built for."""
    return rows[0].torch.partition("+")[0]


def number(every: Sequence[Sequence[BenchRow]]) -> str:
    """README's first figure: training of all plain layers, all cells and shapes in one mean, rounded down; the widest
    instruction set comes first."""
    said: list[str] = []
    details: list[str] = []
    for rows in every:
        some = [row for row in rows if (row.group, row.against, row.mode) == ("grid", TORCH, "training")]
        if some:
            each = [f"{cell} {_down(own)}" for cell in CELLS if (own := [row for row in some if row.cell == cell])]
            as_fast = "" if said else " as fast as with torch.nn"
            said.append(f"{_down(some)} times{as_fast} on {WORDS[some[0].isa]}")
            details.append(f"{_on(some)}: {', '.join(each)}, {len({row.case for row in some})} shapes")
    if not said:
        raise BadInput("no rows of the grid in training against torch.nn")
    return f"**Training is {_and(said)}**: geometric mean over shapes and cells, 1 thread ({'; '.join(details)})."


def _and(said: Sequence[str]) -> str:
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def _down(rows: Sequence[BenchRow]) -> str:
    """The geometric mean of the ratios, rounded down to a tenth."""
    return f"{math.floor(10 * targets.geometric_mean(row.ratio_p50 for row in rows)) / 10:.1f}"


def small(every: Sequence[Sequence[BenchRow]]) -> str:
    """README's table: a line for each comparison and cell, two columns for each processor and instruction set."""
    found = [{(v.group, v.against, v.cell, v.mode): v for v in targets.judge(rows)} for rows in every]
    lines = []
    for group, peer, words in SMALL:
        for cell in CELLS:
            line = [verdicts.get((group, peer, cell, mode)) for verdicts in found for mode in MODES]
            if any(line):
                lines.append([words, cell, *("" if v is None else f"{v.mean:.2f} ({v.worst:.2f})" for v in line)])
                words = ""
    head = ["", "", *(f"{WORDS[rows[0].isa]}: {mode}" for rows in every for mode in MODES)]
    measured = [
        f"{_on(rows)} (torch {_version(rows)}, multiply-add peak {max(row.peak_gflops for row in rows):.0f} GFLOP/s)"
        for rows in every
    ]
    return f"1 thread, float32; {'; '.join(measured)}:\n\n{report.table(head, lines)}"


CUSTOM = (
    "Custom cells of `rnnkit.variants`: a loop of torch operators' time over rnnkit's, the compiled loop's with what "
    "compiling it took, and the built-in layer's; below it what is aimed at."
)


def tables(files: Mapping[str, Sequence[BenchRow]]) -> str:
    """docs/performance.md's tables: of each processor, number of threads, way of launching and dtype."""
    parts = []
    for name, rows in files.items():
        for setting in sorted({(row.threads, row.launch, row.dtype) for row in rows}):
            some = [row for row in rows if (row.threads, row.launch, row.dtype) == setting]
            threads = f"{setting[0]} thread{'s' if setting[0] > 1 else ''}"
            device = f"{_on(some)}, {threads if some[0].device == 'cpu' else setting[1]}"
            commits = ", ".join(sorted({row.commit for row in targets.judged(some)}))
            parts += [
                f"### {device}, {setting[2]}",
                f"Measured at {commits}; a + marks a tree with changes.",
                report.summary({name: some}, "../benchmarks/results"),
            ]
            custom = variant_table.table(some)
            if custom is not None:
                goals = [v for v in targets.judge([row for row in some if is_custom(row)]) if v.wanted]
                parts += [CUSTOM, report.table(*custom)]
                parts += [report.table(report.HEAD, [report.cells(v) for v in goals])] if goals else []
            shapes = by_shape(some)
            if shapes:
                parts += ["Plain layers, shape by shape: torch.nn's time over rnnkit's.", shapes]
    return "\n\n".join(parts)


def by_shape(rows: Sequence[BenchRow]) -> str:
    """The grid against torch.nn, a line for each shape; empty where none was measured."""
    found = {
        (row.case, row.cell, row.mode): row.ratio_p50
        for row in rows
        if (row.group, row.against, row.implementation) == ("grid", TORCH, "auto")
    }
    lines = [
        [case.replace("x", "×"), *(_ratio(found.get((case, cell, mode))) for mode in MODES for cell in CELLS)]
        for case in dict.fromkeys(case for case, _, _ in found)
    ]
    head = ["B×T×I×H", *(f"{cell} {mode}" for mode in MODES for cell in CELLS)]
    return report.table(head, lines) if lines else ""


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def put(text: str, name: str, between: str, page: str = "the page") -> str:
    """`text` with what stands between the marks of this name replaced. Raises BadInput where they are not there once
    each."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise BadInput(f"{page}: expected one line {begin} and below it one line {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{between}\n\n{end}{rest.partition(end)[2]}"


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{page}: {error.strerror}") from error


def main(arguments: list[str] | None = None) -> int:
    """The script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=RESULTS.parents[1], metavar="DIR", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        pages = written(options.root, {path.stem: read(path) for path in recorded(options.results)})
        for path, text in pages.items():
            (options.root / path).write_text(text, encoding="utf-8")
    except BadInput as error:
        print(f"rnnkit.benchmarks.speed.pages: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"rnnkit.benchmarks.speed.pages: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"written: {', '.join(pages)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
