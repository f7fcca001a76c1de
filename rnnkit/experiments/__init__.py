"""`python -m rnnkit experiments`: why gates exist, shown by programs that run.

    gradient-flow   how a gradient falls or grows on its way back through time, by cell and scale of the weights
    memory          which cells solve the adding problem, and up to which length
    gates           what an LSTM's gates do over the characters of a real text, and what a reset does
    gru-vs-lstm     parameters, time and loss at equal width and at equal parameters
    models          naive, autoregressive, Markov and latent models on a real series and a real text

Each writes a CSV, a picture (with matplotlib) and three sentences about the numbers that it just found.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..demo import check_out
from ..progress import Progress
from . import gates, gradient_flow, gru_vs_lstm, memory, models
from .common import MissingPackage, write

EXPERIMENTS = {
    "gradient-flow": gradient_flow,
    "memory": memory,
    "gates": gates,
    "gru-vs-lstm": gru_vs_lstm,
    "models": models,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("name", nargs="+", metavar="NAME", help=f"{names}, or all")
    parser.add_argument("--out", type=Path, default=Path("experiments-out"), metavar="DIR", help="default: %(default)s/")
    parser.add_argument("--quick", action="store_true", help="under a minute each")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")


def main(options: argparse.Namespace) -> int:
    """Run them one after the other; returns the exit code."""
    chosen = list(EXPERIMENTS) if options.name == ["all"] else options.name
    unknown = [name for name in chosen if name not in EXPERIMENTS]
    if unknown:
        return _complain(f"there is no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}, and all")
    try:
        check_out(options.out)
    except ValueError as error:
        return _complain(str(error))
    for name in chosen:
        progress: Progress | None = None

        def show(done: int, of: int, what: str, name: str = name) -> None:
            nonlocal progress
            if progress is None:
                progress = Progress(name, of, sys.stderr, "part")
            progress.show(done, what)

        try:
            finding = EXPERIMENTS[name].run(options.quick, options.seed, show)
            files = write(finding, name, options.out)
        except MissingPackage as error:
            return _complain(str(error))
        except OSError as error:
            return _complain(f"cannot write to {options.out}: {error.strerror or error}")
        finally:
            if progress is not None:
                progress.close()
        print(f"{name}: {', '.join(map(str, files))}")
        for sentence in finding.sentences:
            print(f"  {sentence}")
        if files[-1].suffix != ".png":
            print("  no picture, since matplotlib is not installed: pip install rnnkit[plots]")
    return 0


def _complain(what: str) -> int:
    print(f"rnnkit experiments: {what}", file=sys.stderr)
    return 2
