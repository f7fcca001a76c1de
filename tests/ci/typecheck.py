"""mypy on the package as it is installed: kernels/ and benchmarks/ in their places, rnnkit.kernels and so on.

mypy does not follow setuptools' mapping, so it is shown a folder of links that has the installed form.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    tree = ROOT / "build" / "typecheck"
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / "rnnkit"
    package.mkdir(parents=True)
    for source in [*(ROOT / "rnnkit").iterdir(), ROOT / "kernels", ROOT / "benchmarks"]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    config = f"--config-file={ROOT / 'pyproject.toml'}"
    cache = f"--cache-dir={ROOT / '.mypy_cache'}"
    return subprocess.run([sys.executable, "-m", "mypy", config, cache, "-p", "rnnkit"], cwd=tree).returncode


if __name__ == "__main__":
    sys.exit(main())
