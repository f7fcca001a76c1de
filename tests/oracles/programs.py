"""Programs in a process of their own: what may hang, and what a process decides once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def program(text: str, timeout: float = 120, **env: str) -> str:
    """Run a program that finds the modules of this folder. Returns what it printed; fails where it hangs."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **env}
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
