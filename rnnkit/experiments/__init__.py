"""`python -m rnnkit experiments`: why gates exist, shown by programs that run.

    gradient-flow   how a gradient falls or grows on its way back through time, by cell and scale of the weights
    memory          which cells solve the adding problem and the copy task, and up to which length
    gates           what an LSTM's and a GRU's gates do over the characters of a real text, and what a reset does
    gru-vs-lstm     parameters, time and loss at equal width and at equal parameters
    models          naive, autoregressive, Markov and latent models on a real series and a real text

Each writes a CSV, a picture and three sentences about the numbers that it just found. Pictures need matplotlib
(pip install rnnkit[plots]), models also statsmodels (pip install rnnkit[data]) unless with --data text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

from ..cli.progress import Progress
from ..demo import check_out, seed_option, text
from . import gates, gradient_flow, gru_vs_lstm, memory, models
from .common import Finding, expect_room, write

EXPERIMENTS: dict[str, ModuleType] = {
    "gradient-flow": gradient_flow,
    "memory": memory,
    "gates": gates,
    "gru-vs-lstm": gru_vs_lstm,
    "models": models,
}
"""Each a module with sizes QUICK and FULL and run(size, seed, show) -> Finding."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}, or all")
    parser.add_argument(
        "--out", type=Path, default=Path("experiments-out"), metavar="DIR", help="default: %(default)s/"
    )
    parser.add_argument("--quick", action="store_true", help="under a minute each, not up to ten")
    parser.add_argument("--data", metavar="NAME", help=f"of models: {', '.join(models.STEPS)}, or all; default: all")
    parser.add_argument("--seed", type=seed_option, default=0, metavar="S", help="default: %(default)s")


def main(options: argparse.Namespace) -> int:
    """Check, then run them one after the other; returns the exit code."""
    there = f"there are {', '.join(EXPERIMENTS)}, and all"
    chosen = list(EXPERIMENTS) if options.name == ["all"] else options.name
    unknown = [name for name in chosen if name not in EXPERIMENTS]
    if unknown or not chosen:
        return _complain(f"there is no experiment {', '.join(unknown)}; {there}" if unknown else f"which one? {there}")
    if options.data is not None and "models" not in chosen:
        return _complain("only models takes --data")
    if options.data not in (None, "all", *models.STEPS):
        return _complain(f"there is no data set {options.data}; there are {', '.join(models.STEPS)}, and all")
    try:
        check_out(options.out)
        if "models" in chosen and options.data != "text":
            models.sunspots()
        if {"gates", "gru-vs-lstm", "models"} & set(chosen):
            text.load(None)
        expect_room(chosen, options.out)
    except (text.InputError, ModuleNotFoundError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(_unwritten(error, options.out))
    for name in chosen:
        finding = _run(name, options)
        try:
            files = write(finding, name, options.out)
        except OSError as error:
            return _complain(_unwritten(error, options.out))
        print(
            f"{name}: {', '.join(map(str, files))}", *(f"  {said}" for said in finding.sentences), sep="\n", flush=True
        )
    return 0


def _run(name: str, options: argparse.Namespace) -> Finding:
    progress: Progress | None = None

    def show(done: int, of: int, what: str) -> None:
        nonlocal progress
        progress = progress or Progress(name, of, sys.stderr)
        progress.show(done, what)

    experiment = EXPERIMENTS[name]
    of = {"data": [options.data]} if name == "models" and options.data not in (None, "all") else {}
    try:
        return experiment.run(experiment.QUICK if options.quick else experiment.FULL, options.seed, show, **of)
    finally:
        if progress is not None:
            progress.close()


def _unwritten(error: OSError, out: Path) -> str:
    return f"cannot write to {error.filename or out}: {error.strerror or error}"


def _complain(what: str) -> int:
    print(f"rnnkit experiments: {what}", file=sys.stderr)
    return 2
