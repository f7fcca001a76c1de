"""The CUDA kernels on the CPU under sanitizers, both at once, each in a process of its own in which the sanitizer comes
first. ThreadSanitizer finds two accesses that no barrier orders, AddressSanitizer and UBSan accesses beyond any memory.

Without further arguments both watch every row of the table, forward and backward, with everything on: lengths, resets,
both directions, a batch that is no multiple of the tile. With pytest's arguments they watch what those choose of all
tests of the kernels.

    python tests/ci/simt_sanitize.py [--flavour asan] [pytest's arguments]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda"))
from simt import run  # noqa: E402

TESTS = ("tests/cuda/simt/test_rows.py", "tests/cuda/simt/test_kernels.py")
FLAVOURS = ("tsan", "asan")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--flavour", action="append", choices=FLAVOURS)
    o, rest = arguments.parse_known_args()
    flavours = o.flavour or FLAVOURS
    if not rest:  # all libraries are needed, and one process at a time builds
        for flavour in flavours:
            make = ["make", "-s", f"-j{os.cpu_count()}", "simt", f"FLAVOUR={flavour}", f"PYTHON={sys.executable}"]
            subprocess.run(make, cwd=ROOT, check=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for flavour in flavours:
            # What pytest captured would be lost when a sanitizer ends the process.
            command = [sys.executable, "-m", "pytest", "-q", "-s", *TESTS, *(rest or ["-k", "test_every_row"])]
            said = Path(folder) / flavour
            with open(said, "w") as file:
                env = {**os.environ, **run.sanitizer(flavour)}
                child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
            running[flavour] = (child, said)
        try:
            for flavour, (child, said) in running.items():
                failed |= child.wait()
                print(f"== {flavour}\n{said.read_text(errors='replace')}", flush=True)
        finally:
            for child, _ in running.values():
                child.kill()
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
