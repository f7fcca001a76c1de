"""The CUDA kernels on the CPU under sanitizers: tests/simt/test_kernels.py, each time in a process of its own in which
the sanitizer comes first. AddressSanitizer and UBSan find accesses beyond any memory, ThreadSanitizer two accesses that
no barrier orders.

    python tests/ci/simt_sanitize.py [--flavour asan] [pytest's arguments]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from simt import run  # noqa: E402


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--flavour", action="append", choices=("asan", "tsan"))
    o, rest = arguments.parse_known_args()
    failed = 0
    for flavour in o.flavour or ("asan", "tsan"):
        print(f"== {flavour}", flush=True)
        # What pytest captured would be lost when a sanitizer ends the process.
        command = [sys.executable, "-m", "pytest", "-q", "-s", "tests/simt/test_kernels.py", *rest]
        failed |= subprocess.run(command, cwd=ROOT, env={**os.environ, **run.sanitizer(flavour)}).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
