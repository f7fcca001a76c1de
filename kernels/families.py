"""Which file has the formulas and kernels of a cell, by its name: what is not listed here has none."""

from __future__ import annotations

from typing import Any

from . import gru, lstm, rnn

FAMILIES: dict[str, Any] = {"rnn_tanh": rnn, "rnn_relu": rnn, "lstm": lstm, "gru": gru, "gru_reset_before": gru}
