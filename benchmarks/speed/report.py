"""Tables and summaries of result rows: those of a run, and of recorded rows, which pages.py puts into docs/.

python -m rnnkit.benchmarks.speed.report bench-out/rows.csv     a run's targets once more
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rnnkit import __version__
from rnnkit.cli.instruction_set import WORDS

from . import targets, timing
from .bench_cases import CELLS, MODES, PLAIN, BadInput
from .implementations import ORT, PACKED, SPLIT, STEPWISE, TORCH, WITHOUT
from .rows import BenchRow, read
from .targets import Verdict
from .variant_goals import is_custom

NO_PLOTS = "no pictures, since matplotlib is not installed: pip install rnnkit[plots]"
HEAD = ["what", "cell", "mode", "threads", "cases", "mean", "worst", "at", "small", "of the limit", "possible",
        "wanted", ""]  # fmt: skip


def where(processor: str, isa: str, processor_isa: str) -> str:
    """A processor and the instruction set of its rows: "AMD EPYC (Zen 4), AVX-512", "AMD EPYC (Zen 4) held to AVX2"."""
    if isa == "-":
        return processor
    return f"{processor}{', ' if isa == processor_isa else ' held to '}{WORDS[isa]}"


def heading(rows: Sequence[BenchRow], machine: str) -> str:
    """Where and of what the rows of a run are, and what the machine was measured to do."""
    about, dtypes = rows[0], dict.fromkeys(row.dtype for row in rows)
    parts = [where(about.processor, about.isa, about.processor_isa), f"torch {about.torch}"]
    if any(row.against == ORT for row in rows):
        parts.append(f"ONNX Runtime {importlib.metadata.version('onnxruntime')}")
    parts += [f"rnnkit {__version__} at {about.commit}", *dtypes]
    if about.tf32 != "-":
        parts.append(f"TF32: {about.tf32}")
    return f"{', '.join(parts)}. One core, or the GPU: {machine}."


def percent(share: float) -> str:
    """Rounded down: 79.6 % is not the 80 % that are asked for."""
    return f"{math.floor(100 * share + 1e-6)}%"


def cells(v: Verdict) -> list[str]:
    """A verdict as the cells of a line."""
    form, timed = percent if v.group == "scan" else "{:.2f}".format, not v.group.startswith("memory")
    who = "" if v.implementation == "auto" else f"{v.implementation}: "
    how = ", ".join([v.mode, *(part for part in (v.launch, v.dtype) if part not in ("call", "float32"))])
    return [f"{who}{v.group}, against {v.against}", v.cell, how, str(v.threads), str(v.cases), form(v.mean),
            form(v.worst), v.worst_case, "" if v.small is None else f"{v.small:.2f}", percent(v.share) if timed else "",
            "" if v.possible is None else f"{v.possible:.2f}", v.wanted, v.mark]  # fmt: skip


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(line[k]) for line in (head, *lines)) for k in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    )


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def markdown(
    rows: Sequence[BenchRow], verdicts: Sequence[Verdict], machine: str, wrong: Sequence[str], notes: Sequence[str]
) -> str:
    """A run's report."""
    about = rows[0]
    parts = ["# rnnkit bench", heading(rows, machine)]
    if wrong:
        parts.append("\n".join(f"- **{line}**" for line in wrong))
    parts += [
        "## Targets",
        "Ratios are the peer's time over rnnkit's (`auto`): above 1, rnnkit is faster. Mean: geometric mean. Of the "
        "limit: geometric mean of the least possible time, at this machine's measured rates, over the time taken, on "
        "large rows. Small: geometric mean of the others, of which the limit knows little. Possible: the ratio at the "
        "limit, the most that this machine allows there. In `scan` mean and worst are shares of the machine, in "
        "`memory` the other's peak over rnnkit's.",
        table(HEAD, [cells(v) for v in verdicts]),
        "## Rows",
        f"p20–p80 of the paired ratios. Memory: {timing.MEMORY[about.device]}.",
    ]
    for group in dict.fromkeys(row.group for row in rows):
        for mode in MODES:
            some = [row for row in rows if row.group == group and row.mode == mode]
            if some:
                compiled = any(row.compile_s is not None for row in some)
                head, more = ([*ROW_HEAD, "compiling, s"], 1) if compiled else (ROW_HEAD, 0)
                lines = [_row(row) + [_seconds(row.compile_s)] * more for row in some]
                parts += [f"### {group}, {mode}", table(head, lines)]
    if notes:
        parts += ["## Notes", "\n".join(f"- {line}" for line in dict.fromkeys(notes))]
    return "\n\n".join(parts) + "\n"


ROW_HEAD = ["B×T×I×H", "cell", "threads", "implementation", "against", "ms", "its ms", "ratio", "p20–p80", "GFLOP/s",
            "of the limit", "MiB", "its MiB"]  # fmt: skip


def _row(row: BenchRow) -> list[str]:
    who = f"{row.implementation} → {row.ran}" if row.implementation == "auto" else row.implementation
    who += "".join(f", {how}" for how in (row.launch, row.dtype) if how not in ("call", "float32"))
    return [row.case, row.cell, str(row.threads), who, row.against, f"{row.ms:.4g}", f"{row.against_ms:.4g}",
            f"{row.ratio_p50:.2f}", f"{row.ratio_p20:.2f}–{row.ratio_p80:.2f}", f"{row.gflops:.1f}", f"{row.share:.0%}",
            _mib(row.peak_mib), _mib(row.against_peak_mib)]  # fmt: skip


def _seconds(took: float | None) -> str:
    return "-" if took is None else f"{took:.1f}"


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size:.3g}"


# What the summary shows, line by line: group, peer, words. One column for each cell and mode.
SUMMARY = (
    ("grid", TORCH, "layers, against torch.nn"),
    ("grid", ORT, "layers, against ONNX Runtime"),
    ("stacks", TORCH, "small stacks, H = 64, against torch.nn"),
    ("step", TORCH, "one step of a cell, B = 1, H = 64, against torch.nn"),
    ("resets", SPLIT, "resets, against torch.nn on rows split at them"),
    ("resets", STEPWISE, "resets, against a loop over torch.nn's cell"),
    ("resets", WITHOUT, "resets, against rnnkit without"),
    ("lengths", PACKED, "lengths, against torch.nn on packed rows"),
    ("lengths", WITHOUT, "lengths, against rnnkit without"),
)


def summary(files: Mapping[str, Sequence[BenchRow]], results: str) -> str:
    """Tables, one for each processor, number of threads, way of launching and dtype; `results`: where a link finds the
    rows."""
    parts = []
    for name, rows in files.items():
        for threads, launch, dtype in sorted({(row.threads, row.launch, row.dtype) for row in rows}):
            some = [row for row in rows if (row.threads, row.launch, row.dtype) == (threads, launch, dtype)]
            about = some[-1]
            verdicts = targets.judge([row for row in some if not (targets.brought(row) or is_custom(row))])
            found = {(v.group, v.against, v.cell, v.mode): v for v in verdicts}
            lines = []
            for group, peer, words in SUMMARY:
                line = []
                for cell in CELLS:
                    for mode in MODES:
                        v = found.get((group, peer, cell, mode))
                        line.append("" if v is None else _figures(v))
                if any(line):
                    lines.append([words, *line])
            memory = {cell: _memory(some, cell) for cell in CELLS}
            if any(memory.values()):
                lines.append(["peak memory, torch.nn's over ours", *_in_training(memory)])
            if lines:
                device = f"{threads} {'thread' if threads == 1 else 'threads'}" if about.device == "cpu" else launch
                on = where(about.processor, about.isa, about.processor_isa)
                peak = max(row.peak_gflops for row in some)
                parts += [
                    f"{on}, {device}, torch {about.torch}, {dtype}, multiply-add peak {peak:.0f} GFLOP/s a core "
                    f"([rows]({results}/{name}.csv)):"
                    if about.device == "cpu"
                    else f"{on}, {device}, torch {about.torch}, {dtype} ([rows]({results}/{name}.csv)):",
                    table(["", *(f"{cell} {mode}" for cell in CELLS for mode in MODES)], lines),
                ]
            aims = _aims(verdicts)
            if aims:
                parts += [AIMS, table(["target", "wanted", *CELLS], aims)]
    return "\n\n".join(parts)


def _memory(rows: Sequence[BenchRow], cell: str) -> list[float]:
    """torch.nn's peak over ours in training, of every plain layer that was measured by `auto`."""
    return [
        row.against_peak_mib / row.peak_mib
        for row in rows
        if (row.cell, row.mode, row.implementation, row.against) == (cell, "training", "auto", TORCH)
        and row.group in PLAIN
        and row.peak_mib
        and row.against_peak_mib
    ]


def _in_training(memory: dict[str, list[float]]) -> list[str]:
    """A cell for each cell and mode, those of inference empty."""
    said = {cell: f"{targets.geometric_mean(v):.2f} ({min(v):.2f})" if v else "" for cell, v in memory.items()}
    return [said[cell] if mode == "training" else "" for cell in CELLS for mode in MODES]


AIMS = (
    "What is aimed at: the geometric mean and in brackets the worst, of layers also the share of the limit (the least "
    "time that this machine could take) on large rows:"
)


def _aims(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The lines of the targets: one for each group, peer and mode, a column for each cell."""
    lines: dict[tuple[str, str, str], dict[str, Verdict]] = {}
    for v in verdicts:
        if v.wanted:
            lines.setdefault((v.group, v.against, v.mode), {})[v.cell] = v
    found = []
    for (group, against, mode), by_cell in lines.items():
        wanted: dict[str, list[str]] = {}
        for cell, v in by_cell.items():
            wanted.setdefault(v.wanted, []).append(cell)
        said = [f"{', '.join(some)}: {words}" if len(wanted) > 1 else words for words, some in wanted.items()]
        figures = [_judged(by_cell[cell]) if cell in by_cell else "" for cell in CELLS]
        found.append([f"{group}, {mode}, against {against}", "; ".join(said).replace(">=", "≥"), *figures])
    return found


def _judged(v: Verdict) -> str:
    share = f", {percent(v.share)}" if v.group == "grid" and v.dtype == "float32" else ""
    return f"{_figures(v)}{share}: {'**missed**' if v.met is False else v.mark}"


def _figures(v: Verdict) -> str:
    form = percent if v.group == "scan" else "{:.2f}".format
    return form(v.mean) if v.cases == 1 else f"{form(v.mean)} ({form(v.worst)})"


def main(arguments: list[str] | None = None) -> int:
    """The script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a run's rows.csv: print its targets")
    options = parser.parse_args(arguments)
    try:
        print(aligned(HEAD, [cells(v) for v in targets.judge(read(options.rows))]))
    except BadInput as error:
        print(f"rnnkit.benchmarks.speed.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
