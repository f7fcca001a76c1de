"""What is compared: every implementation that can do a job, and every peer it is held against.

An implementation is a module and a function that runs it and returns y, then the last states. All of a job have the
same weights and get the same input. Peers are what a user would do without rnnkit: torch.nn; for resets, splitting
every row at its resets and packing the pieces, or a loop over torch's cell; for lengths, packing; ONNX Runtime for
inference on a CPU. A plain run is the implementation itself on the same job without resets or lengths. What torch
cannot run on this processor is asked by running it, left out and named.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnkit
from rnnkit.backends import BY_NAME, REFERENCE, LayerInputs, LayerOptions, LayerSpec, record

from .bench_cases import CUSTOM, GATES, BadInput, BenchJob

TORCH, ORT, COMPILE, WITHOUT = "torch.nn", "onnxruntime", "torch.compile", "without"
SPLIT, STEPWISE, PACKED = "torch.nn, split", "torch.nn, cells", "torch.nn, packed"
NAMES = ("auto", *BY_NAME)
COMPILED_STEPS = 32  # torch.compile unrolls the reference's loop: a minute of compiling soon after

Run = Callable[[Any, Tensor], tuple[Tensor, ...]]


@dataclass
class Implementation:
    """What does the job: of rnnkit or a peer."""

    name: str
    module: Any
    run: Run
    ran: str = ""
    """The backend of rnnkit that does the work; empty where it is none."""
    weights: tuple[str, ...] = ()
    """The parameters in torch's order, by name, where the module's own order may be another."""
    on_host: bool = False
    """Whether it waits for what the device computes, so that no CUDA graph can hold it."""

    def work(self, x: Tensor, train: bool) -> Callable[[], object]:
        """What is timed: a forward without a graph, or a forward and a backward to the input and every weight."""
        if train:
            own = x.clone().requires_grad_()

            def forward_and_backward() -> None:
                self.run(self.module, own)[0].sum().backward()

            return forward_and_backward

        def forward() -> object:
            with torch.inference_mode():
                return self.run(self.module, x)

        return forward

    def numbers(self, x: Tensor, train: bool) -> list[Tensor]:
        """What the accuracy check compares: y and the last states; in training also the gradients of Σ y²."""
        if not train:
            with torch.inference_mode():
                return list(self.run(self.module, x))
        own = x.clone().requires_grad_()
        outputs = self.run(self.module, own)
        weights = [self.module.get_parameter(name) for name in self.weights] or self.module.parameters()
        gradients = torch.autograd.grad(outputs[0].square().sum(), [own, *weights])
        return [*(v.detach() for v in outputs), *gradients]

    def double(self) -> Implementation:
        """The same in float64."""
        return Implementation(self.name, copy.deepcopy(self.module).double(), self.run)


@dataclass
class Setup:
    """A job made ready: the input, the implementations, and the peers of each."""

    x: Tensor
    baseline: Implementation
    """torch's layer: its float64 is the truth, its error in the job's dtype sets the budget."""
    reference: Callable[[], Implementation]
    """Makes the one that sets the budget where torch cannot run the job in its dtype on this processor."""
    ours: list[Implementation] = field(default_factory=list)
    peers: list[Implementation] = field(default_factory=list)
    plain_run: dict[str, Implementation] = field(default_factory=dict)
    """By name of an implementation: itself without the job's resets or lengths."""
    cannot: list[str] = field(default_factory=list)
    """What was asked for by name and cannot do this job, with the reason."""
    failed: list[str] = field(default_factory=list)
    """What says that it can, and raised."""
    unable: list[str] = field(default_factory=list)
    """What a peer cannot do on this processor, with what it raised."""
    compile_seconds: dict[str, float] = field(default_factory=dict)
    """By name of a peer that was compiled for this job: what that took."""

    def baseline_numbers(self, train: bool) -> list[Tensor]:
        """The numbers that set the budget."""
        try:
            return self.baseline.numbers(self.x, train)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no primitive for this dtype on this processor, say
            self.unable.append(f"{self.baseline.name}'s error is unknown, the reference's counts: {first_line(error)}")
            return self.reference().numbers(self.x, train)


def incapable(backends: Sequence[str], jobs: Sequence[BenchJob], device: str) -> str | None:
    """Why none of these backends does any of the jobs, None where one does one. Resets, lengths and custom cells are
    asked later."""
    if "auto" in backends:
        return None
    reasons: dict[str, list[str]] = {}
    for name in backends:
        for job in jobs:
            if job.case.group in CUSTOM:
                return None  # asked when the job is set up
            case, cell = job.case, "rnn_tanh" if job.cell == "RNN" else job.cell.lower()
            sizes = (case.steps, case.batch, case.inputs, case.hidden, 0)
            spec = LayerSpec(cell, device, getattr(torch, job.dtype), *sizes, bias=True, train=job.train)
            found = BY_NAME[name].unsupported(spec)
            if not found:
                return None
            reasons.setdefault(name, found)
    said = [f"backend {name!r} has nothing to do on {device}: {'; '.join(found)}" for name, found in reasons.items()]
    return ". ".join(said) or None


def setup(
    job: BenchJob, device: str, threads: int, backends: tuple[str, ...], compiled: bool, module: str | None
) -> Setup:
    """Weights, input, implementations and peers of a job. backends: names of rnnkit's; what cannot run is left out."""
    case = job.case
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, job.dtype)
    theirs = _layer(nn, job).to(device, dtype)
    x = torch.randn(case.steps, case.batch, case.inputs, device=device).to(dtype)
    run, peers = _peers(job, theirs, device)

    def reference() -> Implementation:
        return Implementation(REFERENCE.name, _ours(job, theirs, REFERENCE.name, x), run)

    found = Setup(x, peers[0], reference, peers=peers)
    for name in backends:
        ours = Implementation(name, _ours(job, theirs, name, x), run)
        try:
            ours.ran = _backend(ours, x, job.train)
        except NotImplementedError as error:
            found.cannot.append(str(error))
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers of kernels have errors of their own
            found.failed.append(failure(name, error))
            continue
        found.ours.append(ours)
        if case.group in ("resets", "lengths"):
            found.plain_run[name] = Implementation(WITHOUT, ours.module, _plain)
    if case.group in ("resets", "lengths", "step"):
        return found
    if module is not None:
        try:
            other = custom(module, job)
            if other is not None:
                other.to(device, dtype).load_state_dict(theirs.state_dict())
                names = tuple(name for name, _ in theirs.named_parameters())
                found.ours.append(Implementation(module, other, _plain, weights=names))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # somebody's code, and weights of other names or shapes
            found.failed.append(failure(module, error))
    if compiled and case.steps <= COMPILED_STEPS and case.layers * case.directions == 1:
        found.ours.append(Implementation(COMPILE, torch.compile(_Reference(job, theirs)), _plain))
    plain = device == "cpu" and dtype == torch.float32 and not job.train and case.group not in ("scan", "stacks")
    if plain and importlib.util.find_spec("onnxruntime"):
        try:
            found.peers.append(_onnxruntime(theirs, x, threads))
        except Exception as error:  # the exporter or the session: both have errors of their own
            found.unable.append(unable(ORT, error))
    return found


def failure(name: str, error: Exception) -> str:
    """What is said of an implementation that raised."""
    return f"{name} FAILED, it raised {first_line(error)}"


def unable(name: str, error: Exception) -> str:
    """What is said of a peer that raised. Nothing is wrong with what is measured."""
    return f"{name} cannot run here and is left out: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What an error says before it goes into detail."""
    said, _, rest = str(error).strip().partition("\n")
    if said.endswith(":"):  # torch's heading of a list
        said += f" {rest.strip().partition(chr(10))[0].strip()}"
    return f"{type(error).__name__}: {said}"


def custom(path: str, job: BenchJob) -> nn.Module | None:
    """A module given as my.package:Class, made and called as torch.nn's layers are; None where it is another cell.

    Its weights must bear torch's names; how many gates they have says which cell it is. Raises BadInput.
    """
    place, _, name = path.partition(":")
    try:
        make = getattr(importlib.import_module(place), name)
        module = make(
            job.case.inputs, job.case.hidden, num_layers=job.case.layers, bidirectional=job.case.directions > 1
        )
        gates = module.weight_hh_l0.shape[0] // job.case.hidden
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise BadInput(
            f"--module {path}: {error}. Expected my.package:Class, a class that is made as nn.LSTM is, "
            "Class(input_size, hidden_size, num_layers=, bidirectional=), with torch's parameter names"
        ) from error
    return module if job.case.group not in CUSTOM and gates == GATES[job.cell] else None


def _layer(library: Any, job: BenchJob, **how: Any) -> nn.Module:
    case = job.case
    if case.group == "step":
        return getattr(library, f"{job.cell}Cell")(case.inputs, case.hidden, **how)
    make = getattr(library, job.cell)
    return make(case.inputs, case.hidden, case.layers, bidirectional=case.directions > 1, **how)


def _ours(job: BenchJob, theirs: nn.Module, backend: str, x: Tensor) -> nn.Module:
    """rnnkit's layer by a backend, with torch's weights."""
    ours = _layer(rnnkit, job, backend=backend).to(x.device, x.dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours


def _peers(job: BenchJob, theirs: nn.Module, device: str) -> tuple[Run, list[Implementation]]:
    """How rnnkit runs the job, and the peers made of torch's module."""
    case = job.case
    if case.group == "step":
        h = torch.randn(case.batch, case.hidden, device=device)

        def step(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            state = h.to(x.dtype)
            last = m(x[0], (state, state) if job.cell == "LSTM" else state)
            return last if isinstance(last, tuple) else (last,)

        return step, [Implementation(TORCH, theirs, step)]
    if case.group == "resets":
        reset = torch.rand(case.steps, case.batch, device=device) < case.resets
        cell = getattr(nn, f"{job.cell}Cell")(case.inputs, case.hidden).to(device, getattr(torch, job.dtype))
        cell.load_state_dict({name.removesuffix("_l0"): v for name, v in theirs.state_dict().items()})
        return (
            lambda m, x: _flat(m(x, reset=reset)),
            [
                Implementation(SPLIT, theirs, lambda m, x: _split(m, x, reset), on_host=True),
                Implementation(STEPWISE, cell, lambda m, x: _by_steps(m, x, reset)),
            ],
        )
    if case.group == "lengths":
        lengths = torch.randint(1, case.steps + 1, (case.batch,))
        lengths[0] = case.steps  # so that both return T steps
        there = lengths.to(device)
        return (
            lambda m, x: _flat(m(x, lengths=there)),
            [Implementation(PACKED, theirs, lambda m, x: _packed(m, x, lengths), on_host=True)],
        )
    return _plain, [Implementation(TORCH, theirs, _plain)]


def _flat(result: Any) -> tuple[Tensor, ...]:
    y, last = result
    return (y, *last) if isinstance(last, tuple) else (y, last)


def _plain(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return _flat(module(x))


def _packed(module: nn.Module, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Lengths as torch does them."""
    y, *last = _flat(module(pack_padded_sequence(x, lengths, enforce_sorted=False)))
    return (pad_packed_sequence(y)[0], *last)  # type: ignore[arg-type]


def _split(module: nn.Module, x: Tensor, reset: Tensor) -> tuple[Tensor, ...]:
    """Resets as torch can do them all at once: every piece between two resets is a row of its own, all packed.

    x [T, B, I], reset [T, B] bool; the state before step 0 is zeros, so that a reset there changes nothing.
    """
    steps, rows, _ = x.shape
    starts = reset.clone()
    starts[0] = True
    by_row = starts.T.reshape(-1)  # [B·T]
    piece = by_row.cumsum(0) - 1  # of each step
    begin = by_row.nonzero()[:, 0]
    step = torch.arange(steps * rows, device=x.device) - begin[piece]  # within its piece
    lengths = torch.bincount(piece)
    padded = x.new_zeros(int(lengths.max()), len(begin), x.shape[2])
    padded = padded.index_put((step, piece), x.transpose(0, 1).reshape(-1, x.shape[2]))
    y, *last = _flat(module(pack_padded_sequence(padded, lengths.cpu(), enforce_sorted=False)))
    assert isinstance(y, PackedSequence)
    whole = pad_packed_sequence(y)[0][step, piece].view(rows, steps, -1).transpose(0, 1)
    ends = piece[steps - 1 :: steps]  # the last piece of each row
    return (whole, *(v[:, ends] for v in last))


def _by_steps(cell: nn.RNNCellBase, x: Tensor, reset: Tensor) -> tuple[Tensor, ...]:
    """Resets as reinforcement learning does them: a loop over torch's cell."""
    pair = isinstance(cell, nn.LSTMCell)
    h = x.new_zeros((x.shape[1], cell.hidden_size))
    state: Any = (h, h) if pair else h
    ys = []
    for x_t, keep in zip(x, (~reset).to(x.dtype).unsqueeze(-1), strict=True):
        state = cell(x_t, tuple(s * keep for s in state) if pair else state * keep)
        ys.append(state[0] if pair else state)
    return (torch.stack(ys), *(s[None] for s in (state if pair else (state,))))


def _backend(ours: Implementation, x: Tensor, train: bool) -> str:
    """The backends of rnnkit that run it, by one call that also raises what a named backend raises."""
    with record() as met, torch.set_grad_enabled(train):
        ours.run(ours.module, x)
    return "+".join(dict.fromkeys(backend for _, _, backend in met))


class _Reference(nn.Module):
    """The reference's formulas on a torch layer's weights, for torch.compile to work on."""

    def __init__(self, job: BenchJob, layer: nn.Module) -> None:
        super().__init__()
        self.cell = {"RNN": "rnn_tanh"}.get(job.cell, job.cell.lower())
        for name, weight in copy.deepcopy(layer).named_parameters():
            self.register_parameter(name, weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        w_ih, w_hh, b_ih, b_hh = self.parameters()
        h = x.new_zeros((x.shape[1], w_hh.shape[1]))
        c = h if self.cell == "lstm" else None
        t = LayerInputs(x, h, c, w_ih, w_hh, b_ih, b_hh, None, None, None, None, None)
        y, h_n, c_n, _ = REFERENCE.forward(self.cell, t, LayerOptions(), train=False).outputs
        return y, h_n[None] if c_n is None else (h_n[None], c_n[None])


def _onnxruntime(layer: nn.Module, x: Tensor, threads: int) -> Implementation:
    """ONNX Runtime. Its idle threads stop when a call ends: by default they spin on, on the cores that the threads
    of what comes next want, and make it up to twice as slow. Inside of a call they spin as they do for everybody."""
    import onnxruntime

    file = io.BytesIO()
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the older one, and that B is fixed: both are meant
        torch.onnx.export(layer, (x,), file, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    logging.getLogger("torch.onnx").setLevel(level)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    feed = {name: x.numpy()}

    def run(session: Any, given: Tensor) -> tuple[Tensor, ...]:
        return tuple(session.run(None, feed))  # arrays, and the input is always the job's

    return Implementation(ORT, session, run)
