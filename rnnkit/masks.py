"""Which steps a row has, and before which its state is replaced: lengths and resets as boolean tensors.

Shapes: T steps, B rows. `lengths` is [B], `reset` [T, B] bool. Used by the reference scan and by the products
around every kernel; kernels themselves compare indices instead.
"""

from __future__ import annotations

import torch
from torch import Tensor


def valid_mask(lengths: Tensor | None, steps: int, device: torch.device) -> Tensor | None:
    """[T, B, 1]: step t belongs to row b, t < lengths[b]. None where every step does."""
    if lengths is None:
        return None
    return (torch.arange(steps, device=device)[:, None] < lengths).unsqueeze(-1)


def reset_mask(reset: Tensor | None, valid: Tensor | None, reverse: bool) -> Tensor | None:
    """[T, B, 1]: the state is replaced before step t is processed. None where it never is.

    A reset at step t separates t - 1 from t. Backwards, t - 1 is processed after t, so the cut comes before t - 1,
    and a reset at 0 separates nothing. A reset at or beyond the row's length does nothing.
    """
    if reset is None:
        return None
    at = reset.unsqueeze(-1)
    if valid is not None:
        at = at & valid
    if reverse:
        at = torch.cat([at[1:], torch.zeros_like(at[:1])])
    return at


def replace(state: Tensor, where: Tensor, by: Tensor | None) -> Tensor:
    """`state` with the rows chosen by `where` taken from `by`, zeros where None. Selects, so NaN does not spread."""
    return state.masked_fill(where, 0) if by is None else torch.where(where, by, state)


def previous(
    states: Tensor, first: Tensor, lengths: Tensor | None, at: Tensor | None, by: Tensor | None, reverse: bool
) -> Tensor:
    """[T, B, N]: the state that each step started from.

    `states` [T, B, N] after each step, `first` [B, N] the initial one, `at` what `reset_mask` returned, `by` [B, N] the
    state at a cut. Backwards a row starts at its own last valid step.
    """
    if not reverse:
        before = torch.cat([first[None], states[:-1]]) if states.shape[0] else states
    elif states.shape[0]:
        before = torch.cat([states[1:], first[None]])
        if lengths is not None:
            start = torch.arange(states.shape[0], device=states.device)[:, None] == lengths - 1
            before = torch.where(start.unsqueeze(-1), first, before)
    else:
        before = states
    return before if at is None else replace(before, at, by)
