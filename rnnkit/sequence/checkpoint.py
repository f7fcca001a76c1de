"""The file that holds a training between two runs. It is written whole or not at all, and only the training that wrote
it may go on from it: beside its state stand facts, texts that say what the training is, and all of them must agree.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHOWN = 3
"""Differences that an error names; it counts the others."""


def expect_writable(file: Path) -> None:
    """Raises OSError where `file` cannot be written; leaves nothing behind."""
    new = _new(file)
    try:
        if file.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        new.open("wb").close()
        new.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint {file}: {error.strerror}; give a file in a folder that exists and can be "
            "written to"
        ) from error


def save(file: Path, facts: dict[str, str], state: dict[str, Any]) -> None:
    """What breaks off in between leaves the file as it was."""
    new = _new(file)
    try:
        torch.save({"facts": facts, "state": state}, new)
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def load(file: Path, facts: dict[str, str], device: torch.device) -> dict[str, Any]:
    """The state, on `device`. Raises ValueError: not such a file, or of a training with other facts."""
    remedy = "remove it, or resume=False"
    try:
        found = dict(torch.load(file, map_location=device, weights_only=True))
        there, state = dict(found["facts"]), dict(found["state"])
    except Exception as error:  # what a foreign file raises depends on what it is
        raise ValueError(
            f"{file} is no checkpoint of fit, or a damaged one ({type(error).__name__}); {remedy}"
        ) from error
    differ = [
        f"{name}: got {there.get(name, 'none')}, expected {facts.get(name, 'none')}"
        for name in there | facts
        if there.get(name) != facts.get(name)
    ]
    if differ:
        more = f"; and {len(differ) - SHOWN} more differences" if len(differ) > SHOWN else ""
        raise ValueError(f"{file} is of another training ({'; '.join(differ[:SHOWN])}{more}); {remedy}")
    return state


def series(x: Tensor, lengths: Tensor | None) -> str:
    """Shape, dtype and a digest of every value."""
    digest = hashlib.sha256()
    for values in (x,) if lengths is None else (x, lengths):
        here = values.detach().cpu().contiguous()
        digest.update(ctypes.string_at(here.data_ptr(), here.nbytes))
    return f"{_like(x)}{'' if lengths is None else ' with lengths'}, sha256 {digest.hexdigest()[:16]}"


def parameters(model: nn.Module) -> dict[str, str]:
    """The shape and dtype of each."""
    return {f"parameter {name}": _like(value) for name, value in model.state_dict().items()}


def algorithm(optimizer: Optimizer) -> dict[str, str]:
    """The optimizer's class, and its options in each group of parameters, the learning rate first."""
    groups = optimizer.param_groups
    names = ["lr", *(name for name in groups[0] if name not in ("lr", "params"))]
    options = {f"optimizer's {name}": "; ".join(repr(group.get(name)) for group in groups) for name in names}
    return {"optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", **options}


def _like(value: Tensor) -> str:
    return f"{list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _new(file: Path) -> Path:
    return file.with_name(file.name + ".new")
