"""How a gradient fares on its way back through time: ‖∂L/∂h_t‖ for every step and layer, from one backward.

In a vanilla RNN it is multiplied by W_hhᵀ diag(φ') at every step and so falls or grows exponentially; a gated cell has
a path beside that product. S. Hochreiter (1991); Y. Bengio, P. Simard, P. Frasconi, "Learning long-term dependencies
with gradient descent is difficult", IEEE Transactions on Neural Networks 5 (1994).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .pictures import figure
from .trace import Trace, recorded


@dataclass(frozen=True)
class GradientFlow:
    """‖∂L/∂h_t‖ over rows and units."""

    norms: dict[str, Tensor]
    """[T] for each layer, in the order of time. A layer has the name that it has in `gates`."""
    decay: dict[str, float]
    """For each layer the factor by which the norm changes with each step that the gradient travels.

    It belongs to the straight line through the norm's logarithm (least squares). Below 1 the gradient vanishes, above
    it explodes; NaN where fewer than two steps have a gradient.
    """

    def plot(self) -> Any:
        """A matplotlib figure: the norm, on a log axis, against the step."""
        fig, axes = figure(1, 1)
        (axis,) = axes
        styles = ["-", "--", ":", "-."]  # told apart in grey too
        for k, (name, norm) in enumerate(self.norms.items()):
            said = f"{name}: × {self.decay[name]:.3g} a step"
            axis.semilogy(range(1, len(norm) + 1), norm.clamp_min(1e-38).tolist(), styles[k % 4], label=said)
        axis.set(xlabel="step t", ylabel="‖∂L/∂h_t‖")
        axis.legend()
        return fig


def gradient_flow(
    module: nn.Module, input: Any, *args: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any
) -> GradientFlow:
    """Run `module(input, *args, **kwargs)` and the backward of a loss, and measure the gradient of every h_t.

    The gradient is the total one: through the output of the step and through all steps after it. Parameters' .grad
    stay as they are.

    Args:
        module: rnnkit's or torch.nn's recurrent layer or cell, or any module with some inside.
        loss: of the module's output. None: the sum of the last layer's last state for a recurrent module, of the
            output (or of the first of several) for any other.

    Raises:
        ValueError: no recurrent layer ran, or nothing in it requires a gradient.
    """
    with torch.enable_grad(), recorded(module) as traces:
        output = module(input, *args, **kwargs)
        if not traces:
            raise ValueError(f"no recurrent layer or cell ran in this {type(module).__name__}")
        value = _last(module, output) if loss is None else loss(output)
        states = [h for trace in traces.values() for h in trace.h]
        if not all(h.requires_grad for h in states) or not value.requires_grad:
            what = "its parameters, or the input, must ask for one"
            raise ValueError(f"no gradient reaches a recurrent layer's states: {what}")
        found = iter(torch.autograd.grad(value, states, allow_unused=True))
    norms = {}
    for name, trace in traces.items():
        every = [(h, next(found)) for h in trace.h]
        norms[name] = torch.stack([h.new_zeros(()) if g is None else g.norm() for h, g in every])
    return GradientFlow(norms, {name: _decay(norms[name], trace) for name, trace in traces.items()})


def _last(module: nn.Module, output: Any) -> Tensor:
    if isinstance(module, nn.RNNBase):
        state = output[1][0] if isinstance(output[1], tuple) else output[1]
        return state[-2 if module.bidirectional else -1 :].sum()
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise ValueError(f"give a loss: the output is {type(first).__name__}, which has no sum")
    return first.sum()


def _decay(norm: Tensor, trace: Trace) -> float:
    """exp of the slope of log norm over the steps that the gradient has travelled."""
    norm = norm if trace.reverse else norm.flip(0)
    steps = norm.nonzero().flatten()
    if len(steps) < 2:
        return math.nan
    x, y = steps.double(), norm[steps].double().log()
    x = x - x.mean()
    return float(((x * (y - y.mean())).sum() / (x * x).sum()).exp())
