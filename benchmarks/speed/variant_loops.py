"""Jobs of the groups `variants` and `compiled`: a custom cell against a Python loop of torch operators.

The loop is what somebody writes who has no kernels and knows torch: the input is projected for all steps at once, and
where a step wants the sum of both products alone, one call adds them. It has the same weights and calls the cell's own
step. Masks are drawn by both sides in every call. In float64 it is the truth.
"""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rnnkit
from rnnkit.custom import facts
from rnnkit.custom.scan import dense

from . import variant_cells
from .bench_cases import BenchJob
from .implementations import Implementation, Setup, failure, unable

LOOP, COMPILED_LOOP, BUILT_IN = "loop", "compiled loop", "built-in"
SEED = 1


class Loop(nn.Module):
    """A custom layer's step by step twin; `drawn` is the dtype in which masks are drawn, whatever it computes in."""

    def __init__(self, layer: rnnkit.Custom, drawn: torch.dtype) -> None:
        super().__init__()
        self.layer, self.drawn = copy.deepcopy(layer), drawn
        self.cell, self.spec, self.heads = layer.cell, layer._spec, layer.heads
        self.projected = "a" in self.spec.arguments and not {"gx", "gh"} & {*self.spec.arguments}
        """Whether the step wants gx and gh only as their sum."""

    def _named(self, name: str) -> Any:
        return getattr(self.layer, f"{name}_l0", None)

    def _inputs(self, x: Tensor, given: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
        """Of each step what the cell is handed beside x and the states, in the spec's order."""
        steps, rows, found = x.shape[0], x.shape[1], []
        if self.spec.steps and len(given) < len(self.spec.steps):
            given = given | self.cell.draw(self.training, steps, rows, self.layer.hidden_size, x.to(self.drawn))
        for name, kind, _ in self.spec.steps:
            v = given[name].to(x.dtype)
            v = v if kind == "unit" else v.unsqueeze(-1)
            found.append(v.expand(steps, *v.shape[1:]).unbind(0))
        return list(zip(*found, strict=True)) if found else [()] * steps

    def forward(self, x: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        """y [T, B, H], then each state [1, B, H] after the last step."""
        spec, named = self.spec, self._named
        inputs = self._inputs(x, given)
        names = [name for name, _, _ in spec.steps]
        w_hh = dense(named("weight_hh"), self.heads) if spec.recurrent else None
        b_ih, b_hh = named("bias_ih"), named("bias_hh")
        fold = self.projected and b_hh is not None
        x = self.cell.enter(x, self.training)
        gx = F.linear(x, named("weight_ih"), b_ih + b_hh if fold and not spec.projects else b_ih)
        if spec.projects:
            gx = self.cell.project(gx, None, self.training, **{name: named(name) for name in spec.modules})
            gx = gx + b_hh if fold else gx
        weights = {name: dense(named(name), self.heads) for name, _ in spec.weights[spec.recurrent :]}
        step = functools.partial(spec.step, **spec.options, **weights, **{name: named(name) for name in spec.units})
        takes = [(k, name) for k, name in enumerate(spec.states) if name in spec.arguments]
        zeros = x.new_zeros((x.shape[1], self.layer.hidden_size))
        states: tuple[Tensor, ...] = (zeros,) * len(spec.states)
        ys = []
        for gx_t, now in zip(gx.unbind(0), inputs, strict=True):
            handed = dict(zip(names, now, strict=True))
            handed.update([(name, states[k]) for k, name in takes])
            if self.projected:
                handed["a"] = torch.addmm(gx_t, states[0], w_hh.t())  # type: ignore[union-attr]
            else:
                gh = F.linear(states[0], w_hh, b_hh) if w_hh is not None else None
                every = {"gx": gx_t, "gh": gh, "a": gx_t + gh if "a" in spec.arguments and gh is not None else None}
                handed.update((name, v) for name, v in every.items() if name in spec.arguments)
            new = step(**handed)
            states = new if isinstance(new, tuple) else (new,)
            ys.append(states[0])
        return (torch.stack(ys), *(v[None] for v in states))


class Seeded(Implementation):
    """One whose masks are those of a seed when its numbers are compared; on the clock they are drawn as they come."""

    def numbers(self, x: Tensor, train: bool) -> list[Tensor]:
        """As of every implementation."""
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(SEED)
            return super().numbers(x, train)

    def double(self) -> Implementation:
        """The same in float64."""
        return Seeded(self.name, copy.deepcopy(self.module).double(), self.run)


def setup(
    job: BenchJob, device: str, threads: int, backends: tuple[str, ...], compiled: bool, module: str | None
) -> Setup:
    """As implementations.setup: the layer by these backends, the loop, and where there are such the built-in layer and
    the compiled loop. `threads` and `module` say nothing here."""
    case = job.case
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, job.dtype)
    layer = variant_cells.layer(job.cell, case.inputs, case.hidden).to(device, dtype).train(job.train)
    x = torch.randn(case.steps, case.batch, case.inputs, device=device).to(dtype)
    given = {}
    if not layer._spec.draws:  # attention, a decay: between 0 and 1
        for name, kind, grad in layer._spec.steps:
            shape = (case.steps, case.batch, *((case.hidden,) if kind == "unit" else ()))
            given[name] = torch.rand(shape, device=device).to(dtype).requires_grad_(grad and job.train)

    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        y, *last = m(x, **{name: v.to(x.dtype) for name, v in given.items()})
        return (y, *(last[0] if isinstance(last[0], tuple) else last))

    loop = Seeded(LOOP, Loop(layer, dtype).train(job.train), run)

    def reference() -> Implementation:
        return Seeded("reference", _by(layer, "reference"), run)

    found = Setup(x, loop, reference, peers=[loop])
    for name in backends:
        ours = Seeded(name, _by(layer, name), run)
        try:
            with facts.record() as met, torch.set_grad_enabled(job.train):
                run(ours.module, x)
        except (NotImplementedError, ValueError) as error:  # a backend of the built-in layers alone
            found.cannot.append(str(error))
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers of kernels have errors of their own
            found.failed.append(failure(name, error))
            continue
        ours.ran = "+".join(dict.fromkeys(one.backend for one in met))
        found.ours.append(ours)
    if job.cell in variant_cells.BUILT_IN:
        built_in = getattr(rnnkit, job.cell)(case.inputs, case.hidden).to(device, dtype)
        built_in.load_state_dict(layer.state_dict())
        found.peers.append(Implementation(BUILT_IN, built_in, run))
    if compiled and case.group == "compiled":
        _compile(found, loop, job)
    return found


def _by(layer: rnnkit.Custom, backend: str) -> rnnkit.Custom:
    ours = copy.deepcopy(layer)
    ours.backend = backend
    return ours


def _compile(found: Setup, loop: Seeded, job: BenchJob) -> None:
    """The loop under torch.compile, for this shape alone, and what compiling it took."""
    torch.compiler.reset()  # else the eighth cell would run uncompiled: all share one forward
    module: Any = torch.compile(loop.module, dynamic=False)
    try:
        from torch._inductor.utils import fresh_cache  # the time is that of a first run

        begin = time.perf_counter()
        with fresh_cache(), torch.inference_mode(not job.train):
            loop.run(module, found.x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C++ compiler here, say
        found.unable.append(unable(COMPILED_LOOP, error))
        return
    found.compile_seconds[COMPILED_LOOP] = time.perf_counter() - begin
    found.peers.append(Seeded(COMPILED_LOOP, module, loop.run))
