"""What is compiled: rnnkit._C, one shared library on the LibTorch stable ABI and Python's limited C API.

One binary serves torch >= 2.11 and CPython >= 3.10. It is optional: where it cannot be built the reason is
printed and rnnkit is installed without it. Two variables of the environment decide:

    RNNKIT_EXTENSION   unset: try; 0: leave it out; 1: a failed build is an error
    RNNKIT_CUDA        unset or 0: for the CPU only; 1: with the CUDA kernels, and a failed build is an error

With the kernels a third says what for: RNNKIT_CUDA_ARCH, `native` or some of the chips of
rnnkit/backends/cuda/configs.py; unset: all of them, and PTX for later ones.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
TORCH_TARGET_VERSION = "0x020b000000000000ULL"  # 2.11
NO_NINJA = "without ninja one source is compiled after the other, for hours; `pip install ninja` compiles them at once"
ELSEWHERE = ("kernels", "benchmarks")  # folders beside rnnkit/ whose packages are installed as rnnkit.<folder>


def choice(name: str) -> str | None:
    """The value of an environment variable that may be 0, 1 or unset."""
    value = os.environ.get(name) or None
    if value not in (None, "0", "1"):
        raise SystemExit(f"rnnkit: {name} must be 0, 1 or unset, got {value!r}")
    return value


def without_extension(reason: str) -> None:
    """Say why there is no extension; end the build where it was asked for."""
    for name in ("RNNKIT_EXTENSION", "RNNKIT_CUDA"):
        if choice(name) == "1":
            raise SystemExit(f"rnnkit: {name}=1, but the C++ extension cannot be built: {reason}")
    print(
        f"rnnkit: WARNING: installing without the C++ extension: {reason}. Everything works, only the backend"
        " 'cpu' is missing. RNNKIT_EXTENSION=1 makes this an error, RNNKIT_EXTENSION=0 a choice.",
        file=sys.stderr,
    )


def load(name: str) -> ModuleType:
    """A module of csrc/cuda/, where no package is."""
    spec = importlib.util.spec_from_file_location(f"rnnkit_cuda_{name}", ROOT / "csrc" / "cuda" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"rnnkit: csrc/cuda/{name}.py is missing; build from a clone or the sdist")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_cuda(cpp_extension: Any) -> tuple[list[str], dict[str, Any], list[str], list[str]]:
    """The CUDA kernels: sources, further arguments of the extension, flags for C++ and for nvcc."""
    import torch

    nvcc, generate = load("nvcc"), load("generate")
    home = nvcc.home(cpp_extension.CUDA_HOME)
    if home is None:
        raise SystemExit(f"rnnkit: RNNKIT_CUDA=1, but {nvcc.MISSING}. Set CUDA_HOME, or unset RNNKIT_CUDA.")
    cpp_extension.CUDA_HOME = str(home)  # None where torch itself is built without CUDA
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    try:
        chips = nvcc.chosen(os.environ.get("RNNKIT_CUDA_ARCH"), generate.table().CHIPS, capability)
    except ValueError as error:
        raise SystemExit(f"rnnkit: RNNKIT_CUDA_ARCH: {error}") from None
    release = nvcc.version(home)
    kernels = generate.write(ROOT / "build" / "cuda")
    print(f"rnnkit: {len(kernels)} CUDA kernels for {', '.join(chips)} by {home / 'bin' / 'nvcc'}", file=sys.stderr)
    if not cpp_extension.is_ninja_available():
        print(f"rnnkit: WARNING: {NO_NINJA}", file=sys.stderr)
    arguments = {
        "include_dirs": [str(ROOT / "csrc" / "cuda")],
        "library_dirs": [str(home / "lib64")],
        # Nothing of CUDA's is needed where the library is loaded, and nothing of it meets torch's own.
        "libraries": ["cudart_static", "rt", "dl", "pthread"],
        "extra_link_args": ["-Wl,--exclude-libs,ALL"],
    }
    sources = [*(ROOT / "csrc" / "cuda" / name for name in ("ops.cpp", "probes.cu")), *kernels]
    hidden = "-Xcompiler=-fvisibility=hidden"
    return (
        [str(path.relative_to(ROOT)) for path in sources],
        arguments,
        [f"-DRNNKIT_CUDA_BUILT={','.join([release, *chips])}"],
        [*nvcc.FLAGS, *nvcc.smaller(release), hidden, *(nvcc.gencode(chip) for chip in chips)],
    )


def extension() -> dict[str, Any]:
    """setup()'s arguments for the extension; none where it is left out."""
    cuda = choice("RNNKIT_CUDA") == "1"
    if choice("RNNKIT_EXTENSION") == "0":
        if cuda:
            raise SystemExit("rnnkit: RNNKIT_CUDA=1 asks for what RNNKIT_EXTENSION=0 leaves out; unset one of them")
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

    rooms = ("torch", "layer", "cpu")
    sources = sorted(str(path.relative_to(ROOT)) for room in rooms for path in ROOT.glob(f"csrc/{room}/*.cpp"))
    depends = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*h"))
    flags = ["-O3", "-std=c++17", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    flags += ["-fvisibility=hidden"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    arguments: dict[str, Any] = {}
    nvcc_flags: list[str] = []
    if cuda:
        kernels, arguments, more, nvcc_flags = with_cuda(cpp_extension)
        sources += kernels
        flags += more
    # A library in place is up to date only where nothing that it depends on is newer, what was asked for included.
    asked, text = ROOT / "build" / "flags.txt", "\n".join([*flags, *nvcc_flags])
    if not asked.exists() or asked.read_text(encoding="utf-8") != text:
        asked.parent.mkdir(exist_ok=True)
        asked.write_text(text, encoding="utf-8")
    library = cpp_extension.CppExtension(
        "rnnkit._C",
        sources,
        depends=[*depends, str(asked.relative_to(ROOT))],
        extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
        py_limited_api=True,
        **arguments,
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildOptional},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


beside = {
    f"rnnkit.{name}": name.replace(".", "/")
    for name in find_packages(str(ROOT), include=[pattern for name in ELSEWHERE for pattern in (name, f"{name}.*")])
}
setup(
    packages=[*find_packages(str(ROOT), include=["rnnkit", "rnnkit.*"]), *beside],
    package_dir=beside,
    **extension(),
)
