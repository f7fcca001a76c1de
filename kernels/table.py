"""PLACEHOLDER"""
from typing import NamedTuple
class Plan(NamedTuple):
    regime: str
    block_b: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    precision: str
    reason: str
