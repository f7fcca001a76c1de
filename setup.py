"""What is compiled: rnnkit._C, one shared library on the LibTorch stable ABI and Python's limited C API.

One binary serves torch >= 2.11 and CPython >= 3.10. It is optional: where it cannot be built the reason is
printed and rnnkit is installed without it. Two variables of the environment decide:

    RNNKIT_EXTENSION   unset: try; 0: leave it out; 1: a failed build is an error
    RNNKIT_CUDA        unset or 0: for the CPU only; 1: with the CUDA kernels
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
TORCH_TARGET_VERSION = "0x020b000000000000ULL"  # 2.11
ELSEWHERE = {
    "rnnkit.kernels": "kernels",
    "rnnkit.benchmarks": "benchmarks",
}  # packages that live beside rnnkit/


def choice(name: str) -> str | None:
    """The value of an environment variable that may be 0, 1 or unset."""
    value = os.environ.get(name) or None
    if value not in (None, "0", "1"):
        raise SystemExit(f"rnnkit: {name} must be 0, 1 or unset, got {value!r}")
    return value


def without_extension(reason: str) -> None:
    """Say why there is no extension; end the build where it was asked for."""
    if choice("RNNKIT_EXTENSION") == "1":
        raise SystemExit(f"rnnkit: RNNKIT_EXTENSION=1, but the C++ extension cannot be built: {reason}")
    print(
        f"rnnkit: WARNING: installing without the C++ extension: {reason}. Everything works, only the backend"
        " 'cpu' is missing. RNNKIT_EXTENSION=1 makes this an error, RNNKIT_EXTENSION=0 a choice.",
        file=sys.stderr,
    )


def extension() -> dict[str, Any]:
    """setup()'s arguments for the extension; none where it is left out."""
    if choice("RNNKIT_EXTENSION") == "0":
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        without_extension(f"torch cannot be imported where the build runs ({error}); use --no-build-isolation")
        return {}

    class BuildOptional(cpp_extension.BuildExtension):
        """torch's build, which gives up with a reason instead of an error."""

        def run(self) -> None:
            compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
            if shutil.which(compiler) is None:
                self.give_up(f"there is no C++ compiler {compiler!r}; install one (Debian: g++) or set CXX")
                return
            try:
                super().run()
            except Exception as error:
                self.give_up(f"the build failed, what the compiler said stands above ({error})")

        def give_up(self, reason: str) -> None:
            """Go on as a pure package, and leave nothing of an earlier build in it."""
            without_extension(reason)
            earlier = [*self.get_outputs()]
            if self.editable_mode:
                earlier += map(str, ROOT.glob("rnnkit/_C*.so"))
            for path in earlier:
                Path(path).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True

    sources = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    depends = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
    flags = ["-O3", "-std=c++17", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    flags += ["-fvisibility=hidden"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    library = cpp_extension.CppExtension(
        "rnnkit._C", sources, depends=depends, extra_compile_args={"cxx": flags}, py_limited_api=True
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildOptional},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if choice("RNNKIT_CUDA") == "1" and not list(ROOT.glob("csrc/cuda/*.cu")):
    raise SystemExit("rnnkit: RNNKIT_CUDA=1, but this version has no CUDA kernels (csrc/cuda/*.cu); unset it")

beside = {name: folder for name, folder in ELSEWHERE.items() if (ROOT / folder / "__init__.py").exists()}
setup(
    packages=[*find_packages(str(ROOT), include=["rnnkit", "rnnkit.*"]), *beside],
    package_dir=beside,
    **extension(),
)
