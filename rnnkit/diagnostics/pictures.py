"""Figures without a display, and the words where matplotlib is missing."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def figure(rows: int, columns: int, *, width: float = 6.4, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its axes, row by row; `height` in inches of each row."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install rnnkit[plots]") from error
    fig = Figure(figsize=(width * columns, max(3.0, height * rows + 0.8)), layout="constrained")
    return fig, list(fig.subplots(rows, columns, squeeze=False).flat)


def heat_map(fig: Any, axis: Any, values: Tensor, name: str, least: float, most: float) -> None:
    """values [T, H] in grey: units from top to bottom, time from left to right, beside it what a grey means."""
    shown = axis.imshow(
        values.T.numpy(force=True), aspect="auto", cmap="gray", vmin=least, vmax=most, interpolation="nearest"
    )
    axis.set_ylabel(f"{name}\nunit")
    axis.yaxis.get_major_locator().set_params(integer=True)
    fig.colorbar(shown, ax=axis)
