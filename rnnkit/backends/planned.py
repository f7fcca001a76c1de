"""Backends that have a name and a place in the table, and no kernels in this version: they say so when named."""

from __future__ import annotations

from .problem import Problem
from .products import Backend


class Planned(Backend):
    def __init__(self, name: str, what: str) -> None:
        self.name = name
        self.reason = f"this version of rnnkit has no {what} yet"

    def available(self) -> str | None:
        return self.reason

    def unsupported(self, problem: Problem) -> list[str]:
        return [self.reason]
