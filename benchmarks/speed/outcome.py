"""The outcome of a run: rows, errors and notes, written to files and printed at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import report, roofline, targets, timing
from .bench_cases import BenchJob
from .rows import BenchRow, merge, read, write

BEYOND = 1.05  # of the limit: more is no noise


@dataclass
class Outcome:
    """What was reached so far."""

    rows: list[BenchRow] = field(default_factory=list)
    jobs: list[BenchJob] = field(default_factory=list)
    """The job of each row."""
    wrong: list[str] = field(default_factory=list)
    """What makes the exit code 1."""
    notes: list[str] = field(default_factory=list)

    def add(self, job: BenchJob, rows: Sequence[BenchRow]) -> None:
        """A job's rows."""
        self.rows += rows
        self.jobs += [job] * len(rows)

    def hold_against(self, machines: Mapping[str, roofline.Machine], device: str) -> None:
        """Every row against the best that the machine has shown by now."""
        self.rows = [
            _limited(row, job, machines[job.dtype], device) for row, job in zip(self.rows, self.jobs, strict=True)
        ]
        beyond = sum(row.share > BEYOND for row in self.rows)
        if beyond and device == "cpu":
            self.notes.append(
                f"{beyond} rows are faster than the limit: the machine was busy whenever it was measured, or the "
                "clock was higher since; take no share of the limit from this run"
            )

    def write(self, out: Path, machine: str, recorded: Path | None) -> list[Path]:
        """rows.csv, report.md and pictures into `out`, the rows also into `recorded`; returns what was written."""
        if not self.rows:
            return []
        write(out / "rows.csv", self.rows)
        text = report.markdown(self.rows, targets.judge(self.rows), machine, self.wrong, self.notes)
        (out / "report.md").write_text(text, encoding="utf-8")
        written = [out / "rows.csv", out / "report.md"]
        try:
            from . import plots

            written += plots.draw(out, self.rows)
        except ImportError as error:
            if error.name is None or not error.name.startswith("matplotlib"):
                raise
            self.notes.append(report.NO_PLOTS)
        if recorded is not None:
            write(recorded, merge(read(recorded) if recorded.exists() else [], self.rows))
            written.append(recorded)
        return written

    def as_json(self, interrupted: bool, machine: str | None, device: str) -> str:
        """Everything, as --json prints it."""
        verdicts = targets.judge(self.rows)
        found: dict[str, Any] = {
            "interrupted": interrupted,
            "wrong": self.wrong,
            "notes": list(dict.fromkeys(self.notes)),
            "machine": machine,
            "memory": timing.MEMORY[device],
            "targets": [{**dataclasses.asdict(v), "mark": v.mark} for v in verdicts],
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return json.dumps(found, indent=2)

    def print(self, interrupted: bool, written: Sequence[Path], machine: str) -> None:
        """Where it was measured, the targets as a table, what was wrong, the notes, what was written."""
        verdicts = targets.judge(self.rows)
        if interrupted:
            print(f"stopped by Ctrl-C after {len(self.rows)} rows; so far:\n")
        if verdicts:
            print(report.heading(self.rows, machine), end="\n\n")
            print(report.aligned(report.HEAD, [report.cells(v) for v in verdicts]))
        for line in [*self.wrong, *dict.fromkeys(self.notes)]:
            print(line)
        if written:
            print("written:", ", ".join(map(str, written)))


def _limited(row: BenchRow, job: BenchJob, machine: roofline.Machine, device: str) -> BenchRow:
    """The row with its limit at the machine's rates of now."""
    limit = roofline.roofline_seconds(machine, job, device, row.threads) * 1e3
    return dataclasses.replace(row, limit_ms=limit, share=limit / row.ms, peak_gflops=machine.peak / 1e9)
