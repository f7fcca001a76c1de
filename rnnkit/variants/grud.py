"""GRU-D for series with gaps: the cell, and the module that makes its inputs of values, marks and times.

Nothing of the decays depends on the state. So they are made for all steps at once, outside of the recurrence: the
input that has decayed towards its mean joins the marks in x, and the hidden decay is an input of each step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..custom.declare import per_step, weight
from .base import Activated, Activation


class GRUD(Activated):
    """The GRU whose state decays with the time since its inputs were seen.

        h^ = decay h
        r, z = σ(x_r + U_r h^), σ(x_z + U_z h^)     x_· = W_ih [x^, m] + b_ih, which holds the paper's W x^ + V m + b
        n = φ(x_n + U_n (r h^))
        h' = (1 - z) h^ + z n

    `features, decay = GRUDInputs(I, H)(x, observed, gaps)` makes what it is given: `Custom(GRUD, 2 * I, H)` is called
    as `layer(features, decay=decay)`, decay [T, B, H], with gradients. `w_rz` holds U_r and U_z, `w_n` is U_n. z lets
    the new in. Gaps look back, so one direction is meant.

    Args:
        activation: φ.
        recurrent_activation: σ.

    Source: Z. Che, S. Purushotham, K. Cho, D. Sontag, Y. Liu, "Recurrent neural networks for multivariate time series
    with missing values", Scientific Reports 8, 2018, arXiv 1606.01865.
    """

    gates, states = 3, ("h",)
    w_rz, w_n = weight(2), weight(1)
    decay = per_step("unit")

    @staticmethod
    def step(
        gx: Tensor,
        h: Tensor,
        w_rz: Tensor,
        w_n: Tensor,
        decay: Tensor,
        activation: Activation,
        recurrent_activation: Activation,
    ) -> Tensor:
        h = decay * h
        x_r, x_z, x_n = gx.chunk(3, -1)
        h_r, h_z = F.linear(h, w_rz).chunk(2, -1)
        r, z = recurrent_activation(x_r + h_r), recurrent_activation(x_z + h_z)
        n = activation(x_n + F.linear(r * h, w_n))
        return (1 - z) * h + z * n


class GRUDInputs(nn.Module):
    """What `GRUD` is given: inputs that decay towards their mean while they are not seen, and the state's decay.

        decay_x = exp(-max(0, w_x gap + b_x))       a weight and a bias for each variable
        x^ = m x + (1 - m) (decay_x x_last + (1 - decay_x) mean)
        decay = exp(-max(0, W_h gap + b_h))

    x_last is the last value that was seen, the mean where there was none.

    Args:
        input_size: I, how many variables.
        hidden_size: H of the layer.
        mean: [I], of each variable over the training set; zeros, as for standardised data, where None.
        batch_first: everything is [B, T, ·] instead of [T, B, ·].
        device, dtype: of the parameters.
    """

    mean: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        mean: Tensor | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.weight_x = nn.Parameter(torch.empty(input_size, device=device, dtype=dtype).uniform_(-1, 1))
        self.bias_x = nn.Parameter(torch.zeros(input_size, device=device, dtype=dtype))
        self.hidden = nn.Linear(input_size, hidden_size, device=device, dtype=dtype)
        start = torch.zeros(input_size) if mean is None else mean.detach().clone()
        if start.shape != (input_size,):
            raise ValueError(f"mean must be [I] = [{input_size}], a number for each variable, got {list(start.shape)}")
        self.register_buffer("mean", start.to(device=device, dtype=dtype or torch.get_default_dtype()))

    def forward(self, x: Tensor, observed: Tensor, gaps: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features and decay.

        Args:
            x: [T, B, I], values; what is not observed may be anything, NaN too.
            observed: [T, B, I] bool.
            gaps: [T, B, I], the time since each variable was seen; `time_gaps` makes them, of the same reset.
            reset: [T, B] bool; where a sequence begins in mid-row, what was seen before it is forgotten.

        Returns:
            features [T, B, 2·I] and decay [T, B, H].
        """
        for name, v in (("observed", observed), ("gaps", gaps)):
            if v.shape != x.shape:
                raise ValueError(f"{name} must have the shape of x, {list(x.shape)}, got {list(v.shape)}")
        if reset is not None:
            reset = _reset_of(reset, observed, self.batch_first)
        time = 1 if self.batch_first else 0
        seen = observed.bool()
        x = x.masked_fill(~seen, 0)
        last = _last_seen(seen, None if reset is None else reset.unsqueeze(-1), time)
        kept = torch.where(last >= 0, x.gather(time, last.clamp(min=0)), self.mean)
        decay_x = torch.exp(-torch.relu(self.weight_x * gaps + self.bias_x))
        inputs = torch.where(seen, x, decay_x * kept + (1 - decay_x) * self.mean)
        return torch.cat([inputs, seen.to(x.dtype)], -1), torch.exp(-torch.relu(self.hidden(gaps)))


def time_gaps(times: Tensor, observed: Tensor, batch_first: bool = False, *, reset: Tensor | None = None) -> Tensor:
    """The time since each variable was last seen before a step, 0 at the first; since the first, if it never was.

    Args:
        times: [T, B], when each step is; [B, T] with batch_first.
        observed: [T, B, I] bool.
        batch_first: as in the layer.
        reset: [T, B] bool; where a sequence begins in mid-row, its first step has gaps of 0, and what was seen before
            counts no more.

    Returns:
        gaps [T, B, I].
    """
    if reset is not None:
        reset = _reset_of(reset, observed, batch_first)
    time = 1 if batch_first else 0
    last = _last_seen(observed.bool(), None, time)
    before = last.narrow(time, 0, max(last.shape[time] - 1, 0))  # an observation at the step itself closes no gap
    before = torch.cat([before.new_full(observed.narrow(time, 0, min(1, last.shape[time])).shape, 0), before], time)
    before = before.clamp(min=0) if reset is None else before.maximum(_begun(reset.unsqueeze(-1), time))
    each = times.unsqueeze(-1).expand(observed.shape)
    return each - each.gather(time, before)


def _reset_of(reset: Tensor, observed: Tensor, batch_first: bool) -> Tensor:
    """As bool, its shape checked."""
    if reset.shape != observed.shape[:2]:
        lead = f"{'[B, T]' if batch_first else '[T, B]'} = {list(observed.shape[:2])}"
        raise ValueError(f"reset must be {lead}, as observed is, got {list(reset.shape)}")
    return reset.bool()


def _steps(like: Tensor, time: int) -> Tensor:
    """The number of each step, in dimension `time`."""
    return torch.arange(like.shape[time], device=like.device).view([-1 if d == time else 1 for d in range(like.dim())])


def _begun(reset: Tensor, time: int) -> Tensor:
    """The step at which the sequence began that each step is in."""
    return torch.where(reset, _steps(reset, time), 0).cummax(time).values


def _last_seen(seen: Tensor, reset: Tensor | None, time: int) -> Tensor:
    """The step at which each variable was last seen, this one included; -1 where it never was, since the reset."""
    last = torch.where(seen, _steps(seen, time), -1).cummax(time).values
    return last if reset is None else torch.where(last >= _begun(reset, time), last, -1)
