"""Training in the demo: both sides in turn, alone or as one of several processes that torchrun started."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..cli.progress import Progress
from .memory import Peak
from .model import CharModel
from .text import BATCH, WINDOW, Corpus, InputError

LEARNING_RATE = 1e-2
CLIP = 1.0  # largest norm of a gradient


class NoDevice(RuntimeError):
    """There is no device for this process; the message is one line for the user."""


@dataclass(frozen=True)
class ProcessInfo:
    """Where this process runs, and which one of how many it is."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def mean(self, value: Tensor) -> float:
        """The mean over all processes of a number."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value.item() / self.world

    def synchronize(self) -> None:
        """Wait until the device has done what it was told, so that the clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Run:
    """What a run has reached so far."""

    name: str
    backends: list[str] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # bits per character, each step
    milliseconds: list[float] = field(default_factory=list)  # each step
    held_out_bits: float | None = None
    held_out_characters: int | None = None
    peak_mib: float | None = None
    peak_how: str | None = None
    rows: int = BATCH  # windows in a step, over all processes

    def ms_per_step(self) -> float | None:
        """Median over the later half, which no start-up costs reach."""
        return statistics.median(self.milliseconds[len(self.milliseconds) // 2 :]) if self.milliseconds else None

    def tokens_per_second(self) -> float | None:
        """Characters learnt in a second, over all processes."""
        ms = self.ms_per_step()
        return self.rows * WINDOW / ms * 1e3 if ms else None

    def to_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {**asdict(self), "ms_per_step": self.ms_per_step(), "tokens_per_second": self.tokens_per_second()}


def join_processes() -> ProcessInfo:
    """Join the other processes where torchrun started this one. Raises InputError, or NoDevice."""
    cuda = torch.cuda.is_available()
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return ProcessInfo(torch.device("cuda" if cuda else "cpu"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        raise NoDevice(f"process {local} on this machine has no GPU: there are {torch.cuda.device_count()}")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if cuda else "gloo")
    except (ValueError, RuntimeError) as error:
        raise InputError(f"RANK and WORLD_SIZE are set, but the processes do not find one another: {error}") from None
    return ProcessInfo(device, dist.get_rank(), dist.get_world_size())


class Learner:
    """One side: the model around its layer, made from `seed`, and its optimizer. `run` is filled as it goes, so that an
    interrupt loses nothing."""

    def __init__(
        self, run: Run, layer: Callable[..., nn.Module], corpus: Corpus, where: ProcessInfo, seed: int
    ) -> None:
        self.run, self.where = run, where
        torch.manual_seed(seed)
        self.model = CharModel(layer, len(corpus.letters)).to(where.device)
        self.learner: nn.Module = nn.parallel.DistributedDataParallel(self.model) if where.world > 1 else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, inputs: Tensor, targets: Tensor, peak: Peak | None = None) -> None:
        """Learn one batch, both [B, T] int64."""
        where, run = self.where, self.run
        where.synchronize()
        start = time.perf_counter()
        scores, _ = self.learner(inputs)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        if peak:
            peak.look()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        where.synchronize()
        run.milliseconds.append((time.perf_counter() - start) * 1e3)
        run.loss.append(where.mean(loss.detach()) / math.log(2))
        run.rows = len(inputs) * where.world


def measure_memory(
    run: Run, layer: Callable[..., nn.Module], corpus: Corpus, where: ProcessInfo, steps: int, seed: int
) -> None:
    """Into `run` the peak memory of a few steps alone: while both sides learn in turn, none has a peak of its own."""
    peak = Peak(where.device)
    learner = Learner(Run(run.name), layer, corpus, where, seed)
    for inputs, targets in corpus.batches(steps, seed, where.rank, where.world):
        learner.step(inputs, targets, peak)
    run.peak_mib = peak.mib()
    run.peak_how = f"{peak.how}; {steps} steps alone"
    if where.world > 1:
        run.peak_how += f"; of process 0 of {where.world}"


def train(
    learners: Sequence[Learner],
    corpus: Corpus,
    where: ProcessInfo,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Teach all of them, in turn at each step and on the same batch, the first and the last changing places: whatever
    else the machine does falls on all alike."""
    try:
        for step, (inputs, targets) in enumerate(corpus.batches(steps, seed, where.rank, where.world), 1):
            for learner in learners if step % 2 else reversed(learners):
                learner.step(inputs, targets)
            if progress:
                said = ", ".join(f"{learner.run.name} {learner.run.loss[-1]:.3f}" for learner in learners)
                progress.show(step, f"{said} bits per character")
    finally:
        if progress:
            progress.close()


@torch.no_grad()
def evaluate(run: Run, model: CharModel, corpus: Corpus) -> None:
    """Bits per character on the held-out text, read once from its start to its end in a few parallel rows."""
    text = corpus.held_out
    rows = max(1, min(BATCH, len(text) // (WINDOW + 1)))
    length = (len(text) - 1) // rows
    inputs = text[: rows * length].view(rows, length)
    targets = text[1 : rows * length + 1].view(rows, length)
    nats, state = 0.0, None
    for seen, wanted in zip(inputs.split(WINDOW, 1), targets.split(WINDOW, 1), strict=True):
        scores, state = model(seen.long(), state)
        nats += F.cross_entropy(scores.flatten(0, 1), wanted.flatten().long(), reduction="sum").item()
    run.held_out_bits = nats / targets.numel() / math.log(2)
    run.held_out_characters = targets.numel()
