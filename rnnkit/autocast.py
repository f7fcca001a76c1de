"""What autocast asks of a layer: whether it is on, what torch.nn computes in and returns, and how to switch it off."""

from __future__ import annotations

import torch

from .backends.spec import LayerInputs


def autocasting(device: str) -> bool:
    """Whether autocast is on for this type of device; torch itself raises for one that cannot have it (meta)."""
    if not torch._C._is_any_autocast_enabled():  # the one question that a call outside of autocast pays for
        return False
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def layer_dtypes(cell: str, t: LayerInputs, *, fused: bool) -> tuple[torch.dtype, torch.dtype]:
    """What torch.nn computes in under autocast, and what it returns y and h_n in.

    float64 is left alone. On a GPU everything else is cast. On a CPU the vanilla RNN and oneDNN's LSTM are; where
    torch runs a chain of small operators instead, the products are cast and the dtype of the state that meets the
    gates promotes the result, which we compute in throughout; a projection is a product again. `fused` is false for
    cells, which have no fused operator.
    """
    device = t.x.device.type
    dtype = torch.get_autocast_dtype(device)
    if torch.float64 in (t.x.dtype, t.w_ih.dtype):
        return torch.float64, torch.float64
    if device != "cpu" or cell.startswith("rnn_"):
        return dtype, dtype
    onednn = torch.backends.mkldnn.enabled  # Dynamo guards on it
    if cell == "lstm" and fused and onednn and t.w_hr is None and dtype == torch.bfloat16:
        return dtype, dtype
    wide = torch.promote_types((t.h_0 if t.c_0 is None else t.c_0).dtype, dtype)
    return wide, wide if t.w_hr is None else dtype


class no_autocast:
    """Context manager: autocast off where it is on, for a layer has cast what it wanted to."""

    def __init__(self, device: str) -> None:
        self._off = torch.autocast(device, enabled=False) if autocasting(device) else None

    def __enter__(self) -> None:
        if self._off is not None:
            self._off.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._off is not None:
            self._off.__exit__(*error)
