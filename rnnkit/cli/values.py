"""Values of options that several commands take, for argparse."""

from __future__ import annotations

import argparse


def names(value: str) -> list[str]:
    """Names with commas between them."""
    return [name for name in value.split(",") if name]


def seconds(value: str) -> float:
    """A time above 0."""
    number = float(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {value}")
    return number
