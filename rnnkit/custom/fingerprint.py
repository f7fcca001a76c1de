"""What a step reads besides its arguments: numbers and functions from closures and globals, as a key for the cache.

A program is made once from a step, so that a number that changes later must give another program. Whatever could
change unseen (lists, dicts, tensors, objects) is refused by name.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import operator
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from rnnkit.custom.errors import NO_GRAD, NotTraced

_ROOTS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
_KNOWN_MODULES = ("torch", "math", "operator", "builtins", "typing", "functools", "collections", "numpy", "rnnkit")
"""Their own variables are not read: what they hold is taken for fixed."""
_MODES = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_default_dtype", "get_num_threads"}
_AROUND = ("getattr", "globals", "locals", "vars", "eval", "exec", "open", "__import__", "setattr", "input")
"""Of Python's own functions those that reach values without a name in the step's code."""
_WAYS = {id(way) for way in (*(getattr(builtins, n) for n in _AROUND), operator.attrgetter, operator.methodcaller)}
_INSIDES = {"__globals__", "__builtins__", "__dict__", "f_globals", "f_locals"}
_AUTOCAST = "put torch.autocast around the call of the layer instead"
_PAST = "past which values could change unseen: name them"


@functools.lru_cache(maxsize=1024)
def known(module: str) -> bool:
    return module.split(".")[0] in _KNOWN_MODULES


@functools.lru_cache(maxsize=1024)
def reads(code: types.CodeType) -> tuple[tuple[bool, tuple[str, ...]], ...]:
    """Names that a function takes from outside: whether from its closure, and the name with the attributes behind it,
    as (False, ("config", "scale")) for config.scale."""
    found: dict[tuple[bool, tuple[str, ...]], None] = {}
    chain: list[str] = []
    closed = False
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME" and not known(instruction.argval):
            raise NotTraced(f"the step imports {instruction.argval}, which could change unseen: import it outside")
        if instruction.opname in (*_ROOTS, "LOAD_ATTR", "LOAD_METHOD") and instruction.argval in _INSIDES:
            raise NotTraced(f"the step reads {instruction.argval}, {_PAST}")
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
            instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars
        ):
            raise NotTraced(f"the step changes the variable {instruction.argval}, which is outside it")
        if chain and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(instruction.argval)
            continue
        if chain and instruction.opname not in ("PUSH_NULL", "CACHE"):
            found[closed, tuple(chain)] = None
            chain = []
        if instruction.opname in _ROOTS and (
            "DEREF" not in instruction.opname or instruction.argval in code.co_freevars
        ):
            chain, closed = [instruction.argval], "DEREF" in instruction.opname
    for constant in code.co_consts:  # functions written inside
        if isinstance(constant, types.CodeType):
            for is_closed, names in reads(constant):
                if not is_closed or names[0] in code.co_freevars:
                    found[is_closed, names] = None
    return tuple(found)


class _Walk:
    """What has been met on the way: functions, and where each value was read, so that the next time a look says whether
    it still stands there. It hangs on the step; a copy of it is empty, for cloudpickle copies the step so."""

    def __init__(self) -> None:
        self.step: Callable[..., Any] | None = None
        self.found: Hashable = None
        self.seen: set[int] = set()
        self.read: list[tuple[Any, str, Any]] = []
        """A function's globals or a closure's cell, the name, the value; or a function, "", and what it is made of."""
        self.loose = False
        """Whether a value that stands where it stood may be another than it was: its attributes may have changed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Walk, ()

    def unchanged(self) -> bool:
        for place, name, value in self.read:
            if type(place) is dict:
                same = place.get(name, MISSING) is value
            elif name:
                same = contents(place) is value
            else:
                made = place.__code__, place.__defaults__, place.__kwdefaults__
                same = all(map(operator.is_, made, value))
            if not same:
                return False
        return True


MISSING = object()
WALK = "_rnnkit_walk"
"""Where a step's own `__dict__` has what was found last."""


def contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # deleted since
        return MISSING


def _walked(step: Callable[..., Any]) -> _Walk:
    """With the step itself, whose life it shares, is kept what was found last."""
    kept = getattr(step, "__dict__", {})
    last: _Walk | None = kept.get(WALK)
    if last is not None and last.step is step and last.unchanged():  # functools.wraps copies it to other functions
        return last
    walk = _Walk()
    walk.found = _of(step, "step", walk)
    if not walk.loose and isinstance(step, types.FunctionType):
        walk.step = step
        kept[WALK] = walk
    return walk


def fingerprint(step: Callable[..., Any]) -> Hashable:
    """Equal for a step that would be traced alike."""
    return _walked(step).found


def of_value(value: Any, name: str) -> Hashable:
    """Of an option's value."""
    return _of(value, name, _Walk())


def fingerprints(step: Callable[..., Any], options: Mapping[str, Any]) -> tuple[Hashable, tuple[_Walk, ...] | None]:
    """Of a step and its options; and what says by `unchanged()` that they have it still, or None where only another
    fingerprint could tell."""
    walks = [_walked(step)]
    for name, value in sorted(options.items()):
        walk = _Walk()
        walk.found = name, _of(value, name, walk)
        walks.append(walk)
    return tuple(walk.found for walk in walks), None if any(walk.loose for walk in walks) else tuple(walks)


def _of(value: Any, name: str, walk: _Walk) -> Hashable:
    if value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum)
    ):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value
    if isinstance(value, (tuple, frozenset, slice)):
        parts = (value.start, value.stop, value.step) if isinstance(value, slice) else tuple(value)
        return type(value), tuple(_of(x, name, walk) for x in parts)
    if isinstance(value, (functools.partial, types.MethodType, torch.nn.Module, type)):
        walk.loose = True
    if isinstance(value, functools.partial):
        words = tuple((k, _of(v, name, walk)) for k, v in sorted(value.keywords.items()))
        return "partial", _of(value.func, name, walk), _of(value.args, name, walk), words
    if isinstance(value, (staticmethod, classmethod)):
        return _of(value.__func__, name, walk)
    if isinstance(value, types.ModuleType):
        if not known(value.__name__):
            raise NotTraced(f"the module {name}, which the step holds as a whole, could change unseen: name its values")
        return "module", value.__name__
    _expect_fixed(value, name)
    if isinstance(value, types.FunctionType):
        return _of_function(value, walk)
    if isinstance(value, type) and not known(value.__module__):
        return _of_class(value, name, walk)
    if isinstance(value, type) or _is_known(value):
        return "known", id(value)
    if isinstance(value, types.MethodType):
        return _of(value.__func__, name, walk), _of(value.__self__, name, walk)
    if isinstance(value, torch.nn.Module):
        empty = not any(True for _ in value.parameters()) and not any(True for _ in value.buffers())
        if empty and type(value).__module__.startswith("torch.nn.modules."):
            return type(value), value.training, value.extra_repr()
        raise NotTraced(f"the module {name} ({type(value).__name__}) holds state: declare its parameters")
    if isinstance(value, Tensor):
        raise NotTraced(
            f"the tensor {name} comes from outside the step: declare it (per_unit, weight, per_step) and take it as an "
            "argument"
        )
    if type(value).__module__ == "torch.autograd.grad_mode":  # above a function that the step calls
        raise NotTraced(NO_GRAD)
    if isinstance(value, torch.autocast):
        raise NotTraced(f"torch.autocast inside the step: {_AUTOCAST}")
    raise NotTraced(
        f"{name} ({type(value).__name__}), which the step reads, could change unseen: use numbers, tuples or "
        "functions, or an option"
    )


def _of_class(value: type, name: str, walk: _Walk) -> Hashable:
    """A class of the user's, by what it and its bases hold."""
    if id(value) in walk.seen:
        return "again", value.__qualname__
    walk.seen.add(id(value))
    parts: list[Hashable] = [id(value)]
    for base in value.__mro__:
        if known(base.__module__):
            continue
        for key, held in sorted(vars(base).items()):
            if key.startswith("__") or isinstance(held, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                continue
            if type(held).__module__ in ("_collections", "collections"):  # a field of a named tuple
                continue
            inner = held.fget if isinstance(held, property) else held
            parts.append((key, _of(inner, f"{name}.{key}", walk)))
    return tuple(parts)


def _expect_fixed(value: Any, name: str) -> None:
    """Refuses what is known and yet not fixed, whatever it is called in the step."""
    if isinstance(value, types.ModuleType):
        if value.__name__.startswith("numpy.random"):
            raise NotTraced(f"the step draws random numbers ({name}): draw masks outside, per_step")
        module, own = value.__name__, ""
    elif isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        module, own = value.__module__ or "", value.__name__
    else:
        return
    if id(value) in _WAYS:
        raise NotTraced(f"the step calls {name}, {_PAST}")
    if module.split(".")[0] != "torch":
        return
    if own == "inference_mode":
        raise NotTraced(NO_GRAD)
    if own in _MODES:
        raise NotTraced(f"the step asks torch for {own}, which may be another at the next call")
    if "autocast" in own or "amp" in module.split("."):
        raise NotTraced(f"{name} inside the step: {_AUTOCAST}")


@functools.lru_cache(maxsize=1024)
def _expect_fixed_in(module: types.ModuleType, names: tuple[str, ...]) -> None:
    """Of all on the way from a known module, which the step calls names[0]."""
    value: Any = module
    _expect_fixed(value, ".".join(names))
    for name in names[1:]:
        value = getattr(value, name, None)
        _expect_fixed(value, ".".join(names))


def _is_known(value: Any) -> bool:
    """A function of torch or Python that is fixed: written in C, or torch's own."""
    if isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
        owner = getattr(value, "__self__", None)
        return owner is None or isinstance(owner, (types.ModuleType, type)) or _fixed(owner)
    return type(value).__module__ in ("torch._ops", "torch._jit_internal", "torch.jit", "torch.jit._script")


def _fixed(owner: Any) -> bool:
    return isinstance(owner, (str, bytes, int, float, tuple, frozenset)) or "torch._C" in type(owner).__module__


def is_torchs(function: types.FunctionType, above: tuple[Any, ...] = ()) -> bool:
    """Written by torch or Python. `functools.wraps` gives a helper of the user's another's __module__, and a decorator
    of torch's may hold such a helper."""
    written = function.__globals__.get("__name__") or ""
    if not (known(written) and known(function.__module__ or "")) or written.split(".")[0] == "rnnkit":
        return False
    above = (*above, function)
    held = [contents(cell) for cell in function.__closure__ or ()]
    own = [value for value in held if isinstance(value, types.FunctionType) and value not in above]
    return all(is_torchs(value, above) for value in own)


def _of_function(function: types.FunctionType, walk: _Walk) -> Hashable:
    if is_torchs(function):
        return "known", id(function)
    if id(function) in walk.seen:
        return "again", function.__qualname__
    walk.seen.add(id(function))
    code, given, named = made = function.__code__, function.__defaults__, function.__kwdefaults__
    walk.read.append((function, "", made))
    parts: list[Hashable] = [code]
    for key, held in sorted(function.__dict__.items()):
        if key != WALK:
            walk.loose = True
            parts.append((key, _of(held, f"{function.__name__}.{key}", walk)))
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    for closed, names in reads(code):
        root, dotted = names[0], ".".join(names)
        if closed:
            try:
                value = cells[root].cell_contents
            except ValueError:
                walk.loose = True
                continue  # not yet set: the step raises of itself
            walk.read.append((cells[root], root, value))
        else:
            value = function.__globals__.get(root, MISSING)
            walk.read.append((function.__globals__, root, value))
            if value is MISSING:
                if root in _AROUND:
                    raise NotTraced(f"the step calls {root}, {_PAST}")
                continue  # Python's own, or nothing of this name, so that the step raises of itself
        if isinstance(value, types.ModuleType) and known(value.__name__):
            _expect_fixed_in(value, names)
            parts.append(value.__name__)
            continue
        walk.loose = walk.loose or len(names) > 1
        value, rest = follow(value, names[1:])
        if rest and isinstance(value, types.ModuleType):  # a known one, through one of the user's
            _expect_fixed_in(value, (".".join(names[: -len(rest)]), *rest))
        parts.append((dotted, rest, _of(value, dotted, walk)))
    defaults = (*(given or ()), *(named or {}).values())
    parts += [_of(x, f"a default of {function.__name__}", walk) for x in defaults]
    return tuple(parts)


def follow(value: Any, names: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Attributes of modules, classes and objects, down to what is itself a value; a method of a value is left."""
    for k, name in enumerate(names):
        if isinstance(value, types.ModuleType) and known(value.__name__):
            return value, names[k:]
        if isinstance(value, (Tensor, int, float, str, tuple, types.FunctionType)) and not hasattr(value, "_fields"):
            return value, names[k:]
        if not hasattr(value, name):
            return value, names[k:]
        value = getattr(value, name)
    return value, ()
