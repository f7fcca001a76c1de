"""A custom layer as one opaque operator, for torch.compile, torch.export and dispatch modes: T is never unrolled.

`rnnkit::custom_forward` and `rnnkit::custom_backward` name the cell by its key. Tensors that there may be go as a list
of those there are, and a list of which. Results are a list: the outputs, then what the backend keeps for its backward
where it says of what shapes that is; another backend runs its forward again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import no_autocast
from .choose import Asked, Choice, backend_named, choose
from .declare import CellSpec, keep_for_programs, spec_named
from .derivative import differentiable_backward
from .inputs import CellInputs, CellOptions, CellOutputs, count_outputs, outputs_of, unflat

_HOW = "str cell, str backend, bool reverse, bool all_states, bool recompute, int heads"
_LIBRARY = torch.library.Library("rnnkit", "FRAGMENT")
_LIBRARY.define(
    f"custom_forward({_HOW}, bool train, bool[] there, Tensor[] tensors) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"custom_backward({_HOW}, bool[] there, bool[] needs, bool[] arrived, Tensor[] tensors, Tensor[] results, "
    "Tensor[] grads) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def forward(spec: CellSpec, backend: str, t: CellInputs, o: CellOptions, train: bool) -> CellOutputs:
    """The layer by its operator."""
    flat = t.flat()
    there = [v is not None for v in flat]
    tensors = [v for v in flat if v is not None]
    found = torch.ops.rnnkit.custom_forward(spec.key, backend, *o, train, there, tensors)
    return outputs_of(spec, o, found)


def _spread(there: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    """A list with None for what is not there."""
    left = iter(values)
    return [next(left) if here else None for here in there]


def _choice(spec: CellSpec, backend: str, t: CellInputs, o: CellOptions) -> Choice:
    return choose(spec, Asked(int(t.states[0].shape[-1]), t.x.device.type, t.x.dtype, o), backend)


def _keeps(backend: str, train: bool) -> bool:
    """Whether what is kept for the backward goes through the operator."""
    return train and hasattr(backend_named(backend), "saved_shapes")


def _forward(cell: str, backend: str, *rest: Any) -> list[Tensor]:
    *options, train, there, tensors = rest
    spec, o = spec_named(cell), CellOptions(*options)
    t, keeps = unflat(spec, _spread(there, tensors)), _keeps(backend, train)
    with no_autocast(t.x.device.type):
        chosen = _choice(spec, backend, t, o)
        (y, last, every), saved = chosen.backend.forward(chosen.plan, t, o, keeps)
    return _alone([y, *last, *every, *(saved if keeps else ())], tensors)


def _alone(found: Sequence[Tensor], given: Sequence[Tensor] = ()) -> list[Tensor]:
    """An operator's results are contiguous, and no two of them, nor one and an argument, are one tensor."""
    results: list[Tensor] = []
    for v in found:
        shared = any(v is other or v.data_ptr() == other.data_ptr() for other in (*results, *given) if v.numel())
        results.append(v.clone(memory_format=torch.contiguous_format) if shared else v.contiguous())
    return results


def _backward(cell: str, backend: str, *rest: Any) -> list[Tensor]:
    *options, there, needs, arrived, tensors, results, grads = rest
    spec, o = spec_named(cell), CellOptions(*options)
    t = unflat(spec, _spread(there, tensors))
    given = outputs_of(spec, o, _spread(arrived, grads))
    with no_autocast(t.x.device.type):
        chosen = _choice(spec, backend, t, o)
        if _keeps(backend, True):
            y, saved = results[0], results[count_outputs(spec, o) :]
        else:
            (y, _, _), saved = chosen.backend.forward(chosen.plan, t, o, True)
        found = chosen.backend.backward(chosen.plan, t, o, y, saved, given, needs)
    return _alone([v for v in found if v is not None], (*tensors, *grads))


_LIBRARY.impl("custom_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("custom_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rnnkit::custom_forward", lib=_LIBRARY)
def _fake_forward(cell: str, backend: str, *rest: Any) -> list[Tensor]:
    *options, train, there, tensors = rest
    spec, o = spec_named(cell), CellOptions(*options)
    keep_for_programs(spec)  # whoever asks for shapes alone makes one
    t = unflat(spec, _spread(there, tensors))
    state = t.states[0].shape
    every = [t.x.new_empty((t.x.shape[0], *state)) for _ in spec.states[1:] if o.all_states]
    found = [t.x.new_empty((t.x.shape[0], *state)), *(t.x.new_empty((1, *state)) for _ in spec.states), *every]
    if _keeps(backend, train):
        chosen = _choice(spec, backend, t, o)
        found += [t.x.new_empty(size, dtype=dtype) for size, dtype in chosen.backend.saved_shapes(chosen.plan, t, o)]  # type: ignore[attr-defined]
    return found


@torch.library.register_fake("rnnkit::custom_backward", lib=_LIBRARY)
def _fake_backward(cell: str, backend: str, *rest: Any) -> list[Tensor]:
    there, needs, _, tensors = rest[4:8]
    wanted = zip(_spread(there, tensors), needs, strict=True)
    return [v.new_empty(v.shape) for v, need in wanted if need and v is not None]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    *how, _, there, tensors = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.how, ctx.there, ctx.count = how, there, len(tensors)
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, grads: list[Tensor | None]) -> tuple:
    cell, _, *options = ctx.how
    spec, o, there = spec_named(cell), CellOptions(*options), ctx.there
    tensors, results = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
    needs = [bool(need) for need in _spread(there, ctx.needs_input_grad[8])]
    own = list(grads[: count_outputs(spec, o)])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        t = unflat(spec, _spread(there, tensors))
        with no_autocast(t.x.device.type):
            every = differentiable_backward(spec, t, o, outputs_of(spec, o, own), needs)  # type: ignore[arg-type]
    else:
        arrived = [g is not None for g in own]
        given = [g for g in own if g is not None]
        found = iter(torch.ops.rnnkit.custom_backward(*ctx.how, there, needs, arrived, tensors, results, given))
        every = [next(found) if need else None for need in needs]
    return (None,) * 8 + ([g for g, here in zip(every, there, strict=True) if here],)


torch.library.register_autograd("rnnkit::custom_forward", _derivative, setup_context=_setup_context, lib=_LIBRARY)


def compiling_a_transform() -> bool:
    """Whether torch.compile traces this call inside of a transform of torch.func, which needs formulas that it can
    differentiate. Dynamo guards on the transforms, so the answer holds as long as the compiled code does."""
    return torch._C._functorch.maybe_current_level() is not None


# As torch.compiler.assume_constant_result does, which would import the compiler with the package.
compiling_a_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
