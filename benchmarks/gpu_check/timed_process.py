"""A subprocess with a timeout, in this Python: for what may hang a GPU, crash, or be watched by a tool.

Its output goes into a file, which is read when it has ended. It finds the packages that this process has found, be
they installed or a clone's. One that does not end in time is killed, with whatever it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import rnnkit


class TimedProcess:
    """`python -m module arguments`, begun. before: a command that runs it; more: of the environment."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        said: Path,
        before: Sequence[str] = (),
        more: Mapping[str, str] | None = None,
    ) -> None:
        places = [str(Path(rnnkit.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), **(more or {})}
        self.said = said
        with said.open("wb") as file:
            self._process = subprocess.Popen(
                [*before, sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the process that began it
            )

    def wait(self, end: float) -> int | None:
        """Its exit code; None where it had to be killed at `end`, as time.monotonic() counts."""
        try:
            return self._process.wait(max(end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.stop()

    def stop(self) -> None:
        """Kill the process and its children."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def text(self) -> str:
        """Its output so far."""
        return self.said.read_text(encoding="utf-8", errors="replace")
