"""Recurrent layers for PyTorch: torch.nn's RNN, LSTM and GRU with lengths, resets, all states and full autodiff.

Replace `nn.LSTM` by `rnnkit.LSTM`, or call `rnnkit.convert(model)`; everything else stays as it is.
"""

import importlib as _importlib
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING

if not (_Path(__file__).parent / "benchmarks").exists():  # a clone that runs as it is: they lie beside this folder
    __path__.append(str(_Path(__file__).parent.parent))

from . import functional, ops
from .backends import use_backend
from .convert import convert, patch_torch, revert
from .custom.declare import Cell, module, option, per_step, per_unit, weight
from .explain import explain
from .nn import GRU, LSTM, RNN, Custom, GRUCell, LSTMCell, RNNCell
from .version import __version__ as __version__

if _TYPE_CHECKING:
    from . import diagnostics as diagnostics
    from . import sequence as sequence
    from . import variants as variants
else:

    def __getattr__(name: str) -> _ModuleType:
        """`rnnkit.diagnostics`, `rnnkit.sequence` and `rnnkit.variants` are imported when they are first asked for."""
        if name in ("diagnostics", "sequence", "variants"):
            return _importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "Custom",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "convert",
    "explain",
    "functional",
    "module",
    "ops",
    "option",
    "patch_torch",
    "per_step",
    "per_unit",
    "revert",
    "use_backend",
    "weight",
]
