"""The ways to run a layer: what one is asked (`spec`), what it has to bring (`base`), and which runs (`select`)."""

from .base import Backend
from .select import (
    BACKENDS,
    BY_NAME,
    NAMES,
    REFERENCE,
    basis,
    cached_backend,
    check_name,
    forget,
    measured_order,
    preference,
    record,
    recorded,
    select_backend,
    use_backend,
)
from .spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec, Result, describe

__all__ = [
    "BACKENDS",
    "BY_NAME",
    "NAMES",
    "REFERENCE",
    "Backend",
    "LayerInputs",
    "LayerOptions",
    "LayerOutputs",
    "LayerSpec",
    "Result",
    "basis",
    "cached_backend",
    "check_name",
    "describe",
    "forget",
    "measured_order",
    "preference",
    "record",
    "recorded",
    "select_backend",
    "use_backend",
]
