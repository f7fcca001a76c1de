"""Backends that have a name and a place in the table, and no kernels in this version: they say so when named."""

from __future__ import annotations

from .problem import Problem
from .products import Backend


class Planned(Backend):
    def __init__(self, name: str, what: str) -> None:
        self.name = name
        self.what = what

    def available(self) -> str | None:
        return f"this version of rnnkit has no {self.what} yet"

    def unsupported(self, problem: Problem) -> list[str]:
        return [f"this version of rnnkit has no {self.what} yet"]
