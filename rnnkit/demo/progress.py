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
    """Shows on `stream` how many of `total` steps are done, the loss, and the time left."""

    def __init__(self, label: str, total: int, stream: TextIO) -> None:
        self.label, self.total, self.stream = label, total, stream
        self.in_place = stream.isatty()
        self.start = self.shown_at = time.perf_counter()

    def show(self, done: int, loss: float) -> None:
        """After step `done`, counted from 1, whose loss in bits per character was `loss`."""
        now = time.perf_counter()
        left = (now - self.start) / done * (self.total - done)
        figures = f"step {done}/{self.total}  {loss:.3f} bits per character  {left:.0f} s left"
        if self.in_place:
            if now - self.shown_at >= REFRESH or done == self.total:
                self.shown_at = now
                filled = BAR * done // self.total
                line = f"{self.label:<8} [{'#' * filled}{'.' * (BAR - filled)}] {figures}"
                width = shutil.get_terminal_size().columns - 1
                self.stream.write("\r" + line[:width].ljust(width))
                self.stream.flush()
        elif done * LINES // self.total > (done - 1) * LINES // self.total or done == 1:
            print(f"{self.label:<8} {figures}", file=self.stream, flush=True)

    def close(self) -> None:
        """End the line of the bar."""
        if self.in_place:
            print(file=self.stream, flush=True)
