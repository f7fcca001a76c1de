"""What a cell says, as words that are the same in every process, and a digest of them.

A program that was saved names its cell by the digest: it finds the cell that computes as its own did, or none.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import numbers
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rnnkit.custom.errors import NotTraced
from rnnkit.custom.fingerprint import MISSING, WALK, contents, follow, is_torchs, known, reads

_PLAIN = (numbers.Number, str, bytes, type(None), type(...), torch.dtype, torch.device, enum.Enum)


def digest(*values: Any) -> str:
    """Another one where functions say something else, or read other functions and numbers. Of a tensor only its shape
    counts, of an object only its class."""
    return hashlib.sha256(repr(_words(values, {})).encode()).hexdigest()[:12]


def _words(value: Any, seen: dict[int, int]) -> Any:
    kind = type(value).__qualname__
    if isinstance(value, _PLAIN):
        return kind, repr(value)
    if isinstance(value, tuple):
        return kind, [_words(v, seen) for v in value]
    if isinstance(value, slice):
        return kind, [_words(v, seen) for v in (value.start, value.stop, value.step)]
    if isinstance(value, types.ModuleType):
        return kind, value.__name__
    if isinstance(value, Tensor):
        return kind, str(value.dtype), tuple(value.shape)
    if isinstance(value, torch.nn.Module):
        return kind, repr(value), value.training
    if isinstance(value, types.CodeType):
        return _of_code(value, seen)
    if isinstance(value, functools.partial):
        return kind, _words((value.func, value.args), seen), _words(value.keywords, seen)
    if isinstance(value, types.MethodType):
        return kind, _words((value.__func__, value.__self__), seen)
    if isinstance(value, staticmethod | classmethod):
        return kind, _words(value.__func__, seen)
    if isinstance(value, property):
        return kind, _words(value.fget, seen)
    if isinstance(value, set | frozenset):  # in no order of their own
        return kind, sorted((_words(v, dict(seen)) for v in value), key=repr)
    own = isinstance(value, types.FunctionType) and not is_torchs(value)
    own = own or (isinstance(value, type) and not known(value.__module__))
    if not own and not isinstance(value, list | dict):
        names = (getattr(value, k, None) for k in ("__module__", "__qualname__"))
        return kind, [name for name in names if isinstance(name, str)]
    if id(value) in seen:
        return "again", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, list):
        return kind, [_words(v, seen) for v in value]
    if isinstance(value, dict):
        return kind, [(_words(k, seen), _words(v, seen)) for k, v in value.items()]
    return _of_function(value, seen) if isinstance(value, types.FunctionType) else _of_class(value, seen)


def _of_code(code: types.CodeType, seen: dict[int, int]) -> Any:
    constants = [_words(c, seen) for c in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return code.co_code.hex(), constants, names


def _of_function(function: types.FunctionType, seen: dict[int, int]) -> Any:
    given = function.__code__, function.__defaults__, function.__kwdefaults__
    hung = [(k, _words(v, seen)) for k, v in sorted(vars(function).items()) if k != WALK]
    return _words(given, seen), hung, [(names, _words(v, seen)) for names, v in _read_by(function)]


def _read_by(function: types.FunctionType) -> Iterator[tuple[tuple[str, ...], Any]]:
    code = function.__code__
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    try:
        found = reads(code)
    except NotTraced:  # it runs by the reference; what it imports or changes stands in its code
        found = tuple((True, (name,)) for name in code.co_freevars)
    for closed, names in found:
        value = contents(cells[names[0]]) if closed else function.__globals__.get(names[0], MISSING)
        yield names, MISSING if value is MISSING else follow(value, names[1:])[0]


def _of_class(cls: type, seen: dict[int, int]) -> Any:
    """Without what a cell's class gathers."""
    bases = [base for base in cls.__mro__ if not known(base.__module__)]
    held = [(k, v) for base in bases for k, v in sorted(vars(base).items()) if k[:2] != "__" and k != "_specs"]
    return cls.__qualname__, [(k, _words(v, seen)) for k, v in held]
