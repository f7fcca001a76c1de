"""How far a run is: a bar that moves in place on a terminal, a few lines elsewhere.

A small one of our own: torch alone is needed at run time.
"""

from __future__ import annotations

import shutil
import time
from typing import TextIO

BAR = 16  # characters
LINES = 5  # for a run where there is no terminal
REFRESH = 0.1  # seconds


class Progress:
    """Shows on `stream` how many of `total` steps (or what `unit` says) are done, some figures, and the time left."""

    def __init__(self, label: str, total: int, stream: TextIO, unit: str = "step") -> None:
        self.label, self.total, self.stream, self.unit = label, total, stream, unit
        self.in_place = stream.isatty()
        self.start = self.shown_at = time.perf_counter()

    def show(self, done: int, figures: str, share: float | None = None) -> None:
        """After step `done`, counted from 1. share: how much of all work that was, where steps are not alike."""
        now = time.perf_counter()
        share = done / self.total if share is None else share
        left = (now - self.start) / share * (1 - share)
        said = f"{self.unit} {done}/{self.total}  {figures}  {left:.0f} s left"
        if self.in_place:
            if now - self.shown_at >= REFRESH or done == self.total:
                self.shown_at = now
                filled = int(BAR * share)
                self._write(f"{self.label:<8} [{'#' * filled}{'.' * (BAR - filled)}] {said}")
        elif done * LINES // self.total > (done - 1) * LINES // self.total or done == 1:
            print(f"{self.label:<8} {said}", file=self.stream, flush=True)

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self.in_place:
            self._write("")
            self.stream.write("\r")
            self.shown_at = 0.0  # the next `show` draws the bar again
        print(line, file=self.stream, flush=True)

    def _write(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r" + line[:width].ljust(width))
        self.stream.flush()

    def close(self) -> None:
        """End the line of the bar."""
        if self.in_place:
            print(file=self.stream, flush=True)
