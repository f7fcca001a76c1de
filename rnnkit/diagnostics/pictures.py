"""Figures without a display, and the words where matplotlib is missing."""

from __future__ import annotations

from typing import Any


def figure(rows: int, columns: int, *, width: float = 6.4, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its axes, row by row; `height` in inches of each row."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install rnnkit[plots]") from error
    fig = Figure(figsize=(width * columns, max(3.0, height * rows + 0.8)), layout="constrained")
    return fig, list(fig.subplots(rows, columns, squeeze=False).flat)
