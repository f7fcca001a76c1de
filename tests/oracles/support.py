"""What the tests share: configurations of a layer, twins of it in torch.nn, and the budget that compares them.

The budget (`complaints`) is the only tolerance there is. Against torch.nn in float64, computed from the same
numbers, our error may be at most twice that of torch.nn at the dtype in question, plus a rounding band. An error is
the largest absolute difference within a tensor.

In float64 there is no wider type to measure by. Rounding errors are proportional to the unit roundoff, so torch's
own float64 error is taken to be its float32 error on the same numbers, scaled by the ratio of the two; since our
result is then compared with torch's, which is off by as much itself, thrice that is allowed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkit
from rnnkit.backends import BACKENDS, LayerSpec, record
from rnnkit.backends.cpu import extension
from rnnkit.benchmarks.speed.accuracy import BAND_ULPS, band, error

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
"""Cells that torch.nn knows."""
LAYOUTS = ("time_major", "batch_first", "unbatched", "packed", "packed_unsorted")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = ((5, 3, 4, 6), (1, 3, 5, 4), (4, 1, 2, 3), (3, 2, 3, 1), (2, 5, 1, 7), (7, 2, 9, 5), (1, 1, 1, 1))
"""T, B, I, H; a projection needs H > 1, see `Config.proj_size`."""

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """One problem for a layer: how it is made, and what it is called with."""

    cell: str = "lstm"
    layers: int = 1
    bidirectional: bool = False
    proj: bool = False
    bias: bool = True
    layout: str = "time_major"
    hx: bool = True
    dtype: torch.dtype = torch.float32
    size: tuple[int, int, int, int] = SIZES[0]
    through: tuple[int, ...] = (0, 1, 2)
    """The results that the loss reads: 0 output, 1 h_n, 2 c_n."""
    seed: int = 0

    @property
    def proj_size(self) -> int:
        hidden = self.size[3]
        return (1 if hidden == 4 else (hidden + 1) // 2) if self.proj and hidden > 1 else 0

    @property
    def samples(self) -> int:
        """Runs to pool, so that an initial state has 96 values: the largest error of a few numbers is luck."""
        _, rows, _, hidden = self.size
        return min(16, -(-96 // (rows * (self.proj_size or hidden))))

    @property
    def packed(self) -> bool:
        return self.layout.startswith("packed")

    @property
    def torch_name(self) -> str:
        return {"lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU"}.get(self.cell, "RNN")

    def kwargs(self) -> dict[str, Any]:
        """Arguments of the layer's constructor, torch.nn's and ours."""
        _, _, features, hidden = self.size
        kwargs = {
            "input_size": features,
            "hidden_size": hidden,
            "num_layers": self.layers,
            "bias": self.bias,
            "batch_first": self.layout == "batch_first",
            "bidirectional": self.bidirectional,
        }
        if self.cell.startswith("rnn_"):
            kwargs["nonlinearity"] = self.cell.removeprefix("rnn_")
        if self.proj_size:
            kwargs["proj_size"] = self.proj_size
        return kwargs


def configs(**fixed: Any) -> Iterator[Config]:
    """Every structure, layout and use of hx; sizes and the results that the loss reads take turns.

    A third layer adds nothing to what bias and hx mean, so there both are given.
    """
    sizes, through = itertools.cycle(SIZES), itertools.cycle(((0, 1, 2), (0,), (1,), (0, 2), (2,)))
    for layers, bidirectional, bias, layout, hx in itertools.product(
        (1, 2, 3), (False, True), (True, False), LAYOUTS, (True, False)
    ):
        if layers == 3 and not (bias and hx):
            continue
        config = Config(layers=layers, bidirectional=bidirectional, bias=bias, layout=layout, hx=hx, **fixed)
        read = next(through)
        yield replace(config, size=next(sizes), through=read if config.cell == "lstm" or read != (2,) else (0, 1))


# Twins: torch.nn's layer, and ours with the same weights.


def theirs(config: Config) -> nn.Module:
    """torch.nn's layer in float64, its weights exact in the narrow dtype (float32 for float64)."""
    torch.manual_seed(config.seed)
    module = getattr(nn, config.torch_name)(**config.kwargs())
    for p in module.parameters():
        p.data = _exact(p.data, config.dtype)
    return module


def ours(module: nn.Module, **extra: Any) -> nn.Module:
    """rnnkit's layer or cell of the same kind, with a copy of the same weights; `extra` to its constructor."""
    name = type(module).__name__
    if isinstance(module, nn.RNNBase):
        keys = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
        keys += ["proj_size"] if name == "LSTM" else []
    else:
        keys = ["input_size", "hidden_size", "bias"]
    kwargs = {key: getattr(module, key) for key in keys}
    if name.startswith("RNN"):
        kwargs["nonlinearity"] = module.nonlinearity
    twin = getattr(rnnkit, name)(**kwargs, **extra).to(next(module.parameters()).dtype)
    twin.load_state_dict(module.state_dict())
    return twin.train(module.training)


def _exact(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values that `dtype` holds exactly."""
    return values.to(torch.float32 if dtype == torch.float64 else dtype).double()


# A call: its arguments, what it gives, and the gradients of all of it.


@dataclass(frozen=True)
class Call:
    """Arguments in float64 that the narrow dtype holds exactly, and the seed of the cotangents."""

    input: Tensor
    state: tuple[Tensor, ...] | None
    lengths: Tensor | None
    config: Config

    def arguments(self, dtype: torch.dtype) -> tuple[Tensor | PackedSequence, Any, list[Tensor]]:
        """input and hx as the layer takes them, and the leaves that they were made of."""
        leaves = [v.to(dtype).requires_grad_() for v in (self.input, *(self.state or ()))]
        x, *state = leaves
        hx = None if not state else tuple(state) if self.config.cell == "lstm" else state[0]
        if self.lengths is None:
            return x, hx, leaves
        return pack_padded_sequence(x, self.lengths, enforce_sorted=self.config.layout == "packed"), hx, leaves


def call_of(config: Config) -> Call:
    steps, rows, features, hidden = config.size
    generator = torch.Generator().manual_seed(config.seed + 1)

    def draw(*shape: int) -> Tensor:
        return _exact(torch.randn(shape, generator=generator), config.dtype)

    lead = {"batch_first": (rows, steps), "unbatched": (steps,)}.get(config.layout, (steps, rows))
    batch = () if config.layout == "unbatched" else (rows,)
    count = config.layers * (2 if config.bidirectional else 1)
    sizes = (config.proj_size or hidden, hidden)[: 2 if config.cell == "lstm" else 1]
    state = tuple(draw(count, *batch, size) for size in sizes) if config.hx else None
    lengths = None
    if config.packed:
        lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
        lengths[torch.randint(rows, (1,), generator=generator)] = steps
        lengths = lengths.sort(descending=True).values if config.layout == "packed" else lengths
    return Call(draw(*lead, features), state, lengths, config)


def flat(result: Any) -> list[Tensor]:
    """A layer's or a cell's result as a list of tensors."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [v for item in result for v in flat(item)]


def named(outputs: Sequence[Tensor]) -> Values:
    return dict(zip(("output", "h_n", "c_n"), outputs, strict=False))


def gradients(
    outputs: Sequence[Tensor], leaves: Values, *, through: Sequence[int] = (0, 1, 2), seed: int = 0
) -> Values:
    """Gradients of all leaves under fixed random cotangents; zeros where a leaf is not reached."""
    generator = torch.Generator().manual_seed(seed + 2)
    cotangents = [torch.randn(v.shape, generator=generator).to(torch.bfloat16).to(v.dtype) for v in outputs]
    read = [k for k in through if k < len(outputs)]
    found = torch.autograd.grad(
        [outputs[k] for k in read], list(leaves.values()), [cotangents[k] for k in read], allow_unused=True
    )
    pairs = zip(leaves.items(), found, strict=True)
    return {f"grad of {name}": torch.zeros_like(v) if g is None else g for (name, v), g in pairs}


Forward = Callable[[nn.Module, Call, Any, Any, Tensor], Any]


def plain(module: nn.Module, call: Call, input: Any, hx: Any, x: Tensor) -> Any:
    """The call as torch.nn knows it."""
    return module(input, hx)


def by_lengths(module: nn.Module, call: Call, input: Any, hx: Any, x: Tensor) -> Any:
    """A packed call made on the padded input with `lengths`; to be compared with `plain`."""
    assert call.lengths is not None, "the configuration has to be a packed one"
    output, states = module(x, hx, lengths=call.lengths)
    return pack_padded_sequence(output, call.lengths, enforce_sorted=call.config.layout == "packed"), states


def by_reset(module: nn.Module, call: Call, input: Any, hx: Any, x: Tensor) -> Any:
    """A time-major call with a reset in the middle; to be compared with `in_two`."""
    return module(input, hx, reset=(torch.arange(x.shape[0]) == x.shape[0] // 2)[:, None].expand(x.shape[:2]))


def in_two(module: nn.Module, call: Call, input: Any, hx: Any, x: Tensor) -> Any:
    """The two halves of a time-major call one after the other, each for itself; in one direction."""
    first, _ = module(x[: x.shape[0] // 2], hx)
    second, states = module(x[x.shape[0] // 2 :])
    return torch.cat([first, second]), states


def run(module: nn.Module, call: Call, dtype: torch.dtype, forward: Forward = plain) -> Values:
    """Everything that one call gives: output, states, the gradient of each argument and each parameter."""
    module = module.to(dtype)
    input, hx, leaves = call.arguments(dtype)
    outputs = flat(forward(module, call, input, hx, leaves[0]))
    every = dict(zip(("input", "h_0", "c_0"), leaves, strict=False)) | dict(module.named_parameters())
    found = gradients(outputs, every, through=call.config.through, seed=call.config.seed)
    return named([v.detach() for v in outputs]) | found


# The budget, of errors and bands as the benchmark's gate knows them.


def complaints(got: Values, torch_gave: Values, truth: Values, dtype: torch.dtype) -> list[str]:
    """What lies outside the budget. `torch_gave` is torch.nn at `dtype`; for float64, at float32."""
    factor = 2.0
    if dtype == torch.float64:
        factor = 3.0 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    found = [] if list(got) == list(truth) else [f"gives {list(got)}, torch.nn {list(truth)}"]
    for name, value in got.items():
        if value.dtype != dtype:
            found.append(f"{name} is {value.dtype}, expected {dtype}")
        allowed = factor * error(torch_gave[name], truth[name]) + band(truth[name], dtype)
        off = error(value, truth[name])
        if not off <= allowed:
            found.append(f"{name} is off by {off:.3g}, allowed {allowed:.3g}")
    return found


def able(problems: Sequence[LayerSpec]) -> list[str]:
    return [b.name for b in BACKENDS if not any(b.unsupported(problem) for problem in problems)]


def backends_for(module: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Names of the backends that can run every layer inside `module` on these arguments."""
    return able([choice.problem for choice in rnnkit.explain(module, *args, **kwargs).choices])


def parity(
    config: Config, backends: Sequence[str] | None = None, how: Forward = plain, torch_how: Forward = plain
) -> list[str]:
    """Complaints about one configuration, on every backend that can run it (or on `backends`).

    `how` calls ours, `torch_how` torch.nn's.
    """
    narrow = torch.float32 if config.dtype == torch.float64 else config.dtype
    samples: dict[str, list[tuple[Values, Values, Values]]] = {}
    for seed in itertools.islice(seeds(config), config.samples):
        drawn = replace(config, seed=seed)
        reference, call = theirs(drawn), call_of(drawn)
        twin = ours(reference).to(config.dtype)
        truth = run(reference, call, torch.float64, torch_how)
        torch_gave = run(reference, call, narrow, torch_how)
        with record() as problems:
            input, hx, leaves = call.arguments(config.dtype)
            how(twin, call, input, hx, leaves[0])
        for backend in able([problem for problem, *_ in problems]) if backends is None else backends:
            twin.backend = backend
            got = run(twin, call, config.dtype, how)
            samples.setdefault(backend, []).append((got, torch_gave, truth))
    return [
        f"{backend}: {text} in {config}"
        for backend, triples in samples.items()
        for text in complaints(*(pooled(values) for values in zip(*triples, strict=True)), config.dtype)
    ]


def pooled(samples: Sequence[Values]) -> Values:
    """Several runs of one configuration as one."""
    if len(samples) == 1:
        return samples[0]
    return {name: torch.cat([sample[name].flatten() for sample in samples]) for name in samples[0]}


def seeds(config: Config) -> Iterator[int]:
    """Seeds from the configuration's own on, without those where rounding takes a relu over its kink.

    There the derivative in the narrow dtype is that of another function, and no budget says how far it is off. The
    engine rounds in places of its own where it multiplies bfloat16 as it is stored.
    """
    half = config.dtype in (torch.bfloat16, torch.float16)
    narrow = [("reference", config.dtype), *([("cpu", config.dtype)] if extension.available() else [])]
    for seed in range(config.seed, config.seed + 200):
        if config.cell == "rnn_relu" and half:
            drawn = replace(config, seed=seed)
            module, call = theirs(drawn), call_of(drawn)
            signs = []
            for backend, dtype in (("reference", torch.float64), *narrow):
                input, hx, _ = call.arguments(dtype)
                signs.append(ours(module, backend=backend).to(dtype)(input, hx, return_all_states=True)[2] > 0)
            if not all(torch.equal(signs[0], other) for other in signs[1:]):
                continue
        yield seed
    raise AssertionError(f"no seed where float64 and {config.dtype} agree on the signs of relu, in {config}")


def no_worse(theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """What ours gives for x is within the budget of torch.nn's error, both against float64."""
    exact = flat(copy.deepcopy(theirs).double()(x.double()))
    for u, v, truth in zip(flat(theirs(x)), flat(ours(x)), exact, strict=True):
        off = [(w.double() - truth).abs().max() for w in (u, v)]
        assert off[1] <= 2 * off[0] + BAND_ULPS * torch.finfo(x.dtype).eps * truth.abs().max()


def stoppable(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process that SIGINT interrupts, also where this one ignores it and would pass that on: behind nohup, or in the
    background of a shell."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@functools.cache
def lacks_onednn_lstm(half: torch.dtype) -> bool:
    """Whether oneDNN has no LSTM in `half` on this processor. torch.nn's raises then where x is float32, and takes its
    chain of small operators, with their dtypes, where x is in `half`."""
    try:
        with torch.autocast("cpu", half):
            nn.LSTM(2, 3)(torch.zeros(1, 1, 2))
    except RuntimeError as reason:
        assert "could not create a primitive descriptor" in str(reason)
        return True
    return False


def some(values: Iterable[Any], every: int = 8) -> list[Any]:
    """What a test is parametrized by where it asks the same of many: all but every n-th are left to `make test-all`."""
    return [pytest.param(v, marks=() if k % every == 0 else pytest.mark.long) for k, v in enumerate(values)]
