"""The command line, `python -m rnnkit COMMAND`: what it can be asked, and what its exit codes mean.

Each command is a module with `add_arguments(parser)` and `main(options) -> int`. Exit codes: 0 all right, 1 a check
failed, 2 bad input, 3 no device, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import NoReturn

from .. import __version__, demo, experiments, tune
from ..benchmarks.gpu_check import main as gpu_check
from ..benchmarks.speed import run as bench
from . import info

COMMANDS: dict[str, ModuleType] = {
    "info": info,
    "tune": tune,
    "bench": bench,
    "demo": demo,
    "experiments": experiments,
    "gpu-check": gpu_check,
}
CODES = "exit codes: 0 all right, 1 a check failed, 2 bad input, 3 no device, 130 stopped by Ctrl-C"


class OneLine(argparse.ArgumentParser):
    """Says what is wrong without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = OneLine(prog="python -m rnnkit", description="Recurrent layers for PyTorch.", epilog=CODES)
    top.add_argument("--version", action="version", version=f"rnnkit {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        first, _, rest = (module.__doc__ or "").partition("\n\n")
        about = first.removeprefix(f"`python -m rnnkit {name}`: ")
        command = commands.add_parser(
            name,
            help=about,
            description=f"{about}\n\n{rest}",
            epilog=CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` (by default the process's) name; returns the exit code."""
    top = parser()
    options = top.parse_args(arguments)
    if options.command is None:
        top.error(f"the following arguments are required: COMMAND ({', '.join(COMMANDS)})")
    try:
        return COMMANDS[options.command].main(options)
    except KeyboardInterrupt:
        return 130
