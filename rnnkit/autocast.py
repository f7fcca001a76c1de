"""What autocast asks of a layer: whether it is on, what torch.nn computes in and returns, and how to switch it off."""

from __future__ import annotations

import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "privateuseone")  # others raise when asked


def autocasting(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def layer_dtype(cell: str, device: str, state: torch.dtype, *, projected: bool, fused: bool) -> torch.dtype:
    """What torch.nn computes in, and returns, under autocast.

    On a GPU everything is cast. On a CPU the vanilla RNN and oneDNN's LSTM are; where torch runs a chain of small
    operators instead, the products are cast and the state's dtype promotes the result, which we compute in throughout.
    `fused` is false for cells, which have no fused operator.
    """
    dtype = torch.get_autocast_dtype(device)
    if device != "cpu" or cell.startswith("rnn_"):
        return dtype
    if (
        cell == "lstm" and fused and not projected and dtype == torch.bfloat16 and torch.backends.mkldnn.enabled
    ):  # Dynamo guards on it
        return dtype
    return torch.promote_types(state, dtype)


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
