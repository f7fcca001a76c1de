"""`python -m rnnkit demo`: train a character model with torch.nn and with rnnkit, in turn, and lay the curves together.

A stack of recurrent layers learns the sources of Python's standard library, or a text of yours, twice: from the same
seed, on the same batches, both models a step at a time; the recurrent class is the only difference. The loss curves
must lie on one another over the first steps, or the exit code is 1. Written are result.json and, with
matplotlib, curves.png. Ctrl-C keeps what was reached. Several processes: torchrun --nproc-per-node 2 -m rnnkit demo
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import GRU, LSTM, RNN, explain
from ..backends import NAMES, check_name
from ..cli import instruction_set
from ..cli.info import versions
from ..cli.progress import Progress
from . import model, report, text, train
from .text import InputError

LAYERS = {"lstm": (nn.LSTM, LSTM), "gru": (nn.GRU, GRU), "rnn": (nn.RNN, RNN)}
MEMORY_STEPS = 3
PROMPT = "def "
SAMPLE = 400  # letters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--cell", choices=LAYERS, default="lstm", help="default: %(default)s")
    parser.add_argument("--text", type=Path, metavar="FILE", help="learn this UTF-8 text, not the standard library")
    parser.add_argument("--steps", type=_positive, default=300, metavar="N", help="of each run; default: %(default)s")
    parser.add_argument(
        "--backend", default="auto", metavar="B", help=f"for rnnkit's layer: {', '.join(NAMES)}; default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="folder to write to; default: %(default)s/"
    )
    parser.add_argument("--seed", type=seed_option, default=0, metavar="S", help="default: %(default)s")
    instruction_set.add_argument(parser)


def main(options: argparse.Namespace) -> int:
    """Check, train twice, report; returns the exit code."""
    try:
        if options.isa is not None:
            instruction_set.hold(options.isa)
        check_name(options.backend)
        check_out(options.out)
        corpus = text.load(options.text)
        where = train.join_processes()
    except train.NoDevice as error:
        return _complain(error, 3)
    except ValueError as error:
        return _complain(error, 2)
    try:
        return Demo(options, corpus.to(where.device), where).run()
    except NotImplementedError as error:
        return _complain(error, 2)
    except OSError as error:
        return _complain(f"cannot write to {options.out}: {error.strerror or error}", 2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Demo:
    """The two runs and what is said and written about them; process 0 alone speaks and writes."""

    def __init__(self, options: argparse.Namespace, corpus: text.Corpus, where: train.ProcessInfo) -> None:
        self.options, self.corpus, self.where = options, corpus, where
        torch_layer, our_layer = LAYERS[options.cell]
        ours = functools.partial(our_layer, backend=options.backend)
        self.layers: list[Callable[..., nn.Module]] = [torch_layer, ours]
        self.theirs, self.ours = train.Run("torch.nn"), train.Run("rnnkit")
        self.sample: str | None = None

    def run(self) -> int:
        """Train both; report and write what was reached, also after Ctrl-C."""
        interrupted, tf32 = False, torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # both in float32: TF32 alone would set the curves apart
        try:
            self.ours.backends = self._backends()
            self._make_folder()
            self._train()
        except KeyboardInterrupt:
            interrupted = True
            # The process ends here, once it has written: torchrun sends on the signal that the terminal has sent.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
        check = report.compare(self.theirs.loss, self.ours.loss)
        if self._is_first_process():
            self._report(check, interrupted)
        return 130 if interrupted else 0 if check.passed else 1

    def _make_folder(self) -> None:
        if self._is_first_process():
            self.options.out.mkdir(parents=True, exist_ok=True)

    def _is_first_process(self) -> bool:
        return self.where.rank == 0

    def _backends(self) -> list[str]:
        """Which backends run rnnkit's layer on a batch of this size."""
        ours = model.CharModel(self.layers[1], len(self.corpus.letters)).to(self.where.device)
        inputs, _ = next(self.corpus.batches(1, self.options.seed, self.where.rank, self.where.world))
        layers = explain(ours, inputs).to_dict()["layers"]
        return sorted({layer["backend"] for layer in layers})

    def _train(self) -> None:
        common = (self.corpus, self.where)
        if self._is_first_process():
            self._say(
                f"{self.options.cell.upper()}, {model.LAYERS} layers of {model.HIDDEN}, learns {self.corpus.source} "
                f"({len(self.corpus.train):,} characters) on {_device(self.where)}"
            )
        steps, seed = self.options.steps, self.options.seed
        sides = list(zip((self.theirs, self.ours), self.layers, strict=True))
        for count in (1, MEMORY_STEPS):  # what torch sets up once is no side's memory
            for run, layer in sides:
                train.measure_memory(run, layer, *common, count, seed)
        learners = [train.Learner(run, layer, *common, seed) for run, layer in sides]
        progress = Progress("training", steps, sys.stderr) if self._is_first_process() else None
        train.train(learners, *common, steps, seed, progress)
        for learner in learners:
            train.evaluate(learner.run, learner.model, self.corpus)
        self.sample = model.generate(learners[-1].model, self.corpus.letters, PROMPT, SAMPLE, seed)

    def _report(self, check: report.CurveCheck, interrupted: bool) -> None:
        runs = [self.theirs, self.ours]
        out = self.options.out
        self._make_folder()
        report.write_json(out / "result.json", self._result(check, interrupted))
        written = [str(out / "result.json")]
        missing = None
        if self.theirs.loss:
            size = f"{model.LAYERS} × {model.HIDDEN}"
            title = f"{self.options.cell.upper()} character model, {size}: torch.nn and rnnkit from the same seed"
            try:
                report.plot(out / "curves.png", self.theirs, self.ours, check, title)
                written.append(str(out / "curves.png"))
            except ImportError:
                missing = report.NO_PLOTS
        if interrupted:
            print(f"stopped by Ctrl-C after {len(self.theirs.loss)} and {len(self.ours.loss)} steps; so far:\n")
        print(report.table(runs), "", report.footnotes(runs), "", sep="\n")
        speed = report.speed(self.theirs, self.ours)
        if speed is not None:
            print(f"{speed}\n")
        if self.sample is not None:
            print(f"rnnkit's model writes (temperature {model.TEMPERATURE}):\n\n{self.sample}\n")
        print(check)
        print("written:", ", ".join(written))
        if missing:
            print(missing)
        sys.stdout.flush()

    def _result(self, check: report.CurveCheck, interrupted: bool) -> dict[str, Any]:
        options, corpus = self.options, self.corpus
        return {
            "interrupted": interrupted,
            "gate": {
                "steps": check.steps,
                "max_difference": check.max_difference,
                "tolerance": check.tolerance,
                "passed": check.passed,
            },
            "unit": "bits per character",
            "times_as_fast": None if (speed := report.speed(self.theirs, self.ours)) is None else speed._asdict(),
            "runs": {run.name: run.to_dict() for run in (self.theirs, self.ours)},
            "sample": self.sample,
            "config": {
                "cell": options.cell,
                "steps": options.steps,
                "seed": options.seed,
                "backend": options.backend,
                "layers": model.LAYERS,
                "hidden": model.HIDDEN,
                "embedding": model.LETTER_SIZE,
                "batch": text.BATCH,
                "window": text.WINDOW,
                "optimizer": "Adam",
                "learning_rate": train.LEARNING_RATE,
                "clip": train.CLIP,
            },
            "text": {
                "source": corpus.source,
                "sha256": corpus.sha256,
                "train_characters": len(corpus.train),
                "held_out_characters": len(corpus.held_out),
                "vocabulary": corpus.letters,
            },
            "versions": versions(),
            "device": _device(self.where),
            "threads": torch.get_num_threads(),
            "processes": self.where.world,
        }

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def check_out(folder: Path) -> None:
    """Raise InputError where nothing can be written to `folder`, without making it."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write to {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {folder}: no permission in {existing}")


def _complain(error: Exception | str, code: int) -> int:
    """One line on stderr, once where there are several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"rnnkit demo: {error}", file=sys.stderr)
    return code


def _device(where: train.ProcessInfo) -> str:
    cpu = f"cpu, {instruction_set.WORDS[instruction_set.in_use()]}"
    name = torch.cuda.get_device_name(where.device) if where.device.type == "cuda" else cpu
    return f"{name}, {where.world} processes" if where.world > 1 else name


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {value!r}") from None


def _positive(value: str) -> int:
    number = _whole(value)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def seed_option(value: str) -> int:
    """A seed on the command line."""
    number = _whole(value)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must lie in [0, 2^63), got {number}")
    return number
