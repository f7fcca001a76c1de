"""How a user writes a cell: a class with gates, states, parameters and a step; and that class read and checked.

`spec_of` turns a `Cell` into a `CellSpec`, which everything else works with. What does not fit is said here, in the
user's words: the class, the name, what to write instead.
"""

from __future__ import annotations

import inspect
import keyword
import numbers
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .digest import digest
from .errors import undeclared

Init = Callable[[Tensor], Any] | float | None
"""A function of torch.nn.init's kind, which fills a tensor in place, or a number; None: uniform as torch's layers."""


class Declared:
    """What `per_unit`, `weight`, `per_step`, `option` and `module` leave in a class."""


@dataclass(frozen=True)
class PerUnit(Declared):
    init: Init


@dataclass(frozen=True)
class Weight(Declared):
    blocks: int
    init: Init


@dataclass(frozen=True)
class PerStep(Declared):
    kind: str
    grad: bool


@dataclass(frozen=True)
class Option(Declared):
    default: Any


@dataclass(frozen=True)
class Module(Declared):
    make: Callable[[int, int], nn.Module]


def per_unit(init: Init = None) -> Any:
    """A parameter [H], one number per unit; in a step it is a tensor [H] under the name it is given in the class.

    init: fills it, as the functions of torch.nn.init do, or a number; else uniform in ±1/√H, as torch's layers.
    """
    _expect_init(init, "per_unit")
    return PerUnit(init)


def weight(blocks: int, init: Init = None) -> Any:
    """A parameter [blocks·H, H], for `F.linear(v, w)` in a step, v being a value [B, H].

    blocks: how many blocks of H outputs. init: as for `per_unit`.
    """
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise ValueError(f"rnnkit.weight(blocks): blocks must be an integer of at least 1, got {blocks!r}")
    _expect_init(init, "weight")
    return Weight(blocks, init)


def per_step(kind: str = "unit", grad: bool = True) -> Any:
    """An input of each step beside x, given by keyword at the call: masks, time gaps, attention.

    kind: "unit" for [T, B, H], which a step sees as [B, H]; "row" for [T, B], which a step sees as [B, 1].
    grad: whether a gradient for it may be wanted; False saves work.
    """
    if kind not in ("unit", "row"):
        raise ValueError(f'rnnkit.per_step(kind): kind must be "unit" ([T, B, H]) or "row" ([T, B]), got {kind!r}')
    if not isinstance(grad, bool):
        raise TypeError(f"rnnkit.per_step(grad): grad must be True or False, got {grad!r}")
    return PerStep(kind, grad)


def option(default: Any) -> Any:
    """A Python value that is fixed for a layer: a number, a string, a function such as an activation.

    `Custom(MyCell(name=value), ...)` sets it. A step that names it is handed it. Activations may be given by name:
    "tanh", "relu", ...
    """
    return Option(default)


def module(make: Callable[[int, int], nn.Module]) -> Any:
    """A torch module for each layer and direction, which the cell's `project` is handed.

    make: called with the number of gates and H.
    """
    if not callable(make):
        raise TypeError(f"rnnkit.module(make): make must be a function of gates and hidden size, got {make!r}")
    return Module(make)


def _expect_init(init: object, of: str) -> None:
    number = isinstance(init, int | float) and not isinstance(init, bool)
    if not (init is None or number or callable(init)):
        raise TypeError(f"rnnkit.{of}(init): init must be a number or a function that fills a tensor, got {init!r}")


def _linear(v: Tensor) -> Tensor:
    return v


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "celu": F.celu,
    "elu": F.elu,
    "exp": torch.exp,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu": torch.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
"""What a string stands for as an option."""


class _Specs:
    """What a class was read as, by its options. It lives as long as the class. A copy of it is empty: cloudpickle puts
    a class of a notebook's into a layer's pickle, with all that hangs on it."""

    def __init__(self) -> None:
        self.found: weakref.WeakValueDictionary[Any, CellSpec] = weakref.WeakValueDictionary()
        self.kept: dict[CellSpec, None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Specs, ()


class Cell:
    """A recurrent cell of one's own: subclass it, and make a layer of it with `rnnkit.Custom`.

    A subclass says `gates` (blocks of H in the projected input), `states` (names; the first is the output), and what
    else its step uses: `per_unit`, `weight`, `per_step`, `option`, `module`. `step` is a static method of torch
    operators on values [B, H]. It is handed what its arguments name: `a` = gx + gh, [B, gates·H], or its parts, `gx` =
    W_ih x + b_ih and `gh` = W_hh h + b_hh; the states; what is declared. It returns the new states in order.

    A cell has options where it declares some, and then an instance, `MyCell(name=value)`, goes in the class's place.
    """

    gates: int
    states: tuple[str, ...]
    step: Callable[..., Any]
    _specs: _Specs
    _options: dict[str, Any]

    def __init__(self, *sizes: Any, **options: Any) -> None:
        if sizes:
            name = type(self).__name__
            raise TypeError(f"{name} is a cell, not a layer: write rnnkit.Custom({name}, input_size, hidden_size)")
        known = {name: v for name, v in _declared(type(self)) if isinstance(v, Option)}
        for name in options:
            if name not in known:
                have = f"has the options {', '.join(known)}" if known else "declares no rnnkit.option"
                raise TypeError(f"{type(self).__name__} got {name}={options[name]!r}, but {have}")
        given = {name: options.get(name, v.default) for name, v in known.items()}
        self.__dict__.update(given, _options=given)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_options", ()):
            raise AttributeError(f"the options of a cell are fixed: make a new one, {type(self).__name__}({name}=...)")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={_shown(v)}" for name, v in self._changed().items())
        return f"{type(self).__name__}({given})"

    def _changed(self) -> dict[str, Any]:
        """The options that are not as declared."""
        known = dict(_declared(type(self)))
        return {name: v for name, v in self._options.items() if not _same(v, known[name].default)}  # type: ignore[attr-defined]

    def draw(self, training: bool, steps: int, rows: int, hidden: int, like: Tensor) -> Mapping[str, Tensor]:
        """Inputs of each step that the call does not give: name to [T or 1, B, H], of a row [T or 1, B]; masks, from
        torch's generator. Called for each layer and direction. `like` has the dtype and the device."""
        return {}

    def enter(self, x: Tensor, training: bool) -> Tensor:
        """What a layer and direction makes of its input [T, B, I] before the projection."""
        return x

    def project(self, gx: Tensor, lengths: Tensor | None, training: bool, **modules: nn.Module) -> Tensor:
        """What becomes of the projected input [T, B, gates·H], all steps of it, before the first step."""
        return gx


@dataclass(frozen=True, eq=False)
class CellSpec:
    """A cell, read and checked."""

    name: str
    key: str
    """Names this spec in a compiled or exported program."""
    cell: Cell
    step: Callable[..., Any]
    arguments: tuple[str, ...]
    """What the step names, in order."""
    gates: int
    states: tuple[str, ...]
    units: tuple[str, ...]
    weights: tuple[tuple[str, int], ...]
    """Names and blocks; ("w_hh", gates) first where the step names a or gh."""
    steps: tuple[tuple[str, str, bool], ...]
    """Name, "unit" or "row", whether a gradient may be wanted."""
    options: dict[str, Any]
    """Values that the step is handed, activations as functions."""
    modules: dict[str, Module]
    inits: dict[str, Init]
    draws: bool
    enters: bool
    projects: bool
    met: dict[tuple[int, torch.dtype], Any] = field(default_factory=dict, repr=False)
    """What was found last of a hidden size and dtype: rnnkit/custom/check.py."""

    @property
    def recurrent(self) -> bool:
        """Whether there is a W_hh."""
        return self.weights[:1] == (("w_hh", self.gates),)

    def __deepcopy__(self, memo: dict[int, Any]) -> CellSpec:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return spec_of, (self.cell,)


_RESERVED = {"a", "gx", "gh", "x", "w_ih", "w_hh", "b_ih", "b_hh", "saved", "saved_row"}
_PARAMETERS = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
_CELL = {"draw", "enter", "project", "step", "gates", "states"}
_CALL = {"self", "input", "hx", "lengths", "reset", "reset_state", "return_all_states"}
_KEPT = 512
"""Specs that a class keeps alive. Options may be made anew at each call, a lambda say, and older ones then go as soon
as no layer has them."""
_by_key: weakref.WeakValueDictionary[str, CellSpec] = weakref.WeakValueDictionary()
_in_programs: set[CellSpec] = set()
_lock = threading.Lock()


def cell_of(cell: object) -> Cell:
    """A cell by its class or as it is."""
    if isinstance(cell, Cell):
        if "_options" not in cell.__dict__:
            raise TypeError(f"{type(cell).__name__}.__init__ must call super().__init__(**options)")
        return cell
    if isinstance(cell, type) and issubclass(cell, Cell):
        if cell is Cell:
            raise TypeError("rnnkit.Cell itself has no step: make a class of it, with gates, states and step")
        return cell()
    got = cell.__name__ if isinstance(cell, type) else type(cell).__name__
    raise TypeError(f"a cell must be a subclass of rnnkit.Cell, or an instance of one, got {got}")


def spec_of(cell: object) -> CellSpec:
    """The cell's specification; the same object for the same class with the same options."""
    cell = cell_of(cell)
    step = _step_of(type(cell))
    key = (step, *((name, _told(v)) for name, v in sorted(cell._options.items())))
    try:
        hash(key)
    except TypeError:  # a list, say: known by itself alone
        key = (step, id(cell))
    with _lock:
        cls = type(cell)
        if "_specs" not in cls.__dict__:
            cls._specs = _Specs()
        specs = cls._specs
        found = specs.found.get(key)
        if found is None:
            found = _read(cell, step)
            specs.found[key] = _by_key[found.key] = found
            while len(specs.kept) >= _KEPT:
                del specs.kept[next(iter(specs.kept))]
            specs.kept[found] = None
        return found


def keep_for_programs(spec: CellSpec) -> None:
    """Its key goes into a compiled or exported program, which may outlive every layer."""
    _in_programs.add(spec)


def spec_named(key: str) -> CellSpec:
    """Of a compiled or exported program."""
    spec = _by_key.get(key)
    if spec is None:
        raise RuntimeError(
            f"this program runs the custom cell {key}, of which this process has no layer: import its class and make "
            "rnnkit.Custom(cell, ...) before the program runs"
        )
    return spec


def _declared(cls: type) -> Iterator[tuple[str, Declared]]:
    """Names and declarations, base classes first. One that a subclass replaces by something else is gone."""
    names: dict[str, None] = {}
    for base in reversed(cls.__mro__):
        names.update((name, None) for name, v in vars(base).items() if isinstance(v, Declared))
    for name in names:
        v = inspect.getattr_static(cls, name)
        if isinstance(v, Declared):
            yield name, v


def _step_of(cls: type) -> Callable[..., Any]:
    found = inspect.getattr_static(cls, "step", None)
    if found is None:
        raise TypeError(f"{cls.__name__} has no step: write @staticmethod def step(...) that returns the new states")
    if not isinstance(found, staticmethod):
        raise TypeError(f"{cls.__name__}.step must be a static method: write @staticmethod above its def, without self")
    return found.__func__


def _read(cell: Cell, step: Callable[..., Any]) -> CellSpec:
    cls, name = type(cell), type(cell).__name__
    gates, states = getattr(cls, "gates", None), getattr(cls, "states", None)
    if not isinstance(gates, int) or isinstance(gates, bool) or gates < 1:
        raise TypeError(f"{name}.gates must be the number of blocks of H in the projected input, got {gates!r}")
    states = _states(name, states)
    declared = dict(_declared(cls))
    for each in declared:
        _expect_free(name, each, states)
    arguments = _arguments(name, step, states, declared)
    recurrent = "a" in arguments or "gh" in arguments
    weights = [("w_hh", gates)] if recurrent else []
    weights += [(n, v.blocks) for n, v in declared.items() if isinstance(v, Weight)]
    options = {n: _resolved(name, n, v, declared[n]) for n, v in cell._options.items()}
    spec = CellSpec(
        name=name,
        key=_new_key(cell, step),
        cell=cell,
        step=step,
        arguments=arguments,
        gates=gates,
        states=states,
        units=tuple(n for n, v in declared.items() if isinstance(v, PerUnit)),
        weights=tuple(weights),
        steps=tuple((n, v.kind, v.grad) for n, v in declared.items() if isinstance(v, PerStep)),
        options={n: v for n, v in options.items() if n in arguments},
        modules={n: v for n, v in declared.items() if isinstance(v, Module)},
        inits={n: v.init for n, v in declared.items() if isinstance(v, PerUnit | Weight)},
        draws=cls.draw is not Cell.draw,
        enters=cls.enter is not Cell.enter,
        projects=cls.project is not Cell.project,
    )
    if spec.modules and not spec.projects:
        raise TypeError(f"{name} declares the module {next(iter(spec.modules))}, which only its `project` could use")
    return spec


def _states(name: str, states: object) -> tuple[str, ...]:
    if not isinstance(states, tuple | list) or not states or not all(isinstance(s, str) for s in states):
        way = f'; write ("{states}",)' if isinstance(states, str) else ""
        raise TypeError(f'{name}.states must be a tuple of names, such as ("h", "c"), got {states!r}{way}')
    for s in states:
        if not s.isidentifier() or keyword.iskeyword(s) or s in _RESERVED:
            raise ValueError(f"{name}.states: {s!r} is taken or is no name; choose another")
    if len(set(states)) != len(states):
        raise ValueError(f"{name}.states must differ from one another, got {tuple(states)}")
    return tuple(states)


def _expect_free(name: str, declared: str, states: tuple[str, ...]) -> None:
    taken = {*_RESERVED, *_PARAMETERS, *_CELL, *_CALL, *states, *(p + s for s in states for p in ("new_", "d_"))}
    if declared in taken:
        raise ValueError(f"{name}.{declared}: this name has a meaning already; choose another")


def _arguments(
    name: str, step: Callable[..., Any], states: tuple[str, ...], declared: dict[str, Declared]
) -> tuple[str, ...]:
    known = {"a", "gx", "gh", *states, *(n for n, v in declared.items() if not isinstance(v, Module))}
    found = inspect.signature(step).parameters
    for argument in found.values():
        if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
            raise TypeError(f"{name}.step({argument}): its arguments are handed over by name; name each")
        if argument.name not in known:
            if isinstance(declared.get(argument.name), Module):
                raise TypeError(f"{name}.step names {argument.name}, a module; only `project` is handed modules")
            raise TypeError(undeclared(name, argument, states))
    if "a" not in found and "gx" not in found:
        raise TypeError(f"{name}.step must name a (= gx + gh) or gx, or it never sees the input")
    for n, v in declared.items():
        if n not in found and isinstance(v, PerUnit | Weight | PerStep):
            raise TypeError(f"{name} declares {n}, but step does not name it: add it to step's arguments, or remove it")
    return tuple(found)


def _resolved(cell: str, name: str, value: Any, declared: Declared) -> Any:
    """An option's value; activations by their name."""
    if not isinstance(value, str):
        return value
    if value in ACTIVATIONS:
        return ACTIVATIONS[value]
    default = getattr(declared, "default", None)
    if callable(default) or default in ACTIVATIONS:
        raise ValueError(f"{cell}({name}=...): no activation is called {value!r}; known: {', '.join(ACTIVATIONS)}")
    return value


def _told(value: Any) -> Any:
    """Equal only for what is the same to a step: -0.0 is not 0.0, and 1 neither 1.0 nor True, inside of a tuple too."""
    if isinstance(value, numbers.Number):
        return type(value), repr(value)
    if isinstance(value, tuple):
        return type(value), *map(_told, value)
    return type(value), frozenset(map(_told, value)) if isinstance(value, frozenset) else value


def _same(a: object, b: object) -> bool:
    return a is b or (isinstance(a, int | float | str) and isinstance(b, int | float | str) and _told(a) == _told(b))


def _new_key(cell: Cell, step: Callable[..., Any]) -> str:
    """The class, its options, and a digest of what the step says and reads: a saved program finds no other cell."""
    cls = type(cell)
    given = ", ".join(f"{name}={_shown(v)}" for name, v in cell._changed().items())
    key = f"{cls.__module__}.{cls.__qualname__}" + (f"({given})" if given else "")
    shape = getattr(cls, "gates", None), getattr(cls, "states", None)
    key += "@" + digest(step, cell._options, shape)
    number = 1
    while key in _by_key:
        number += 1
        key = f"{key.partition('#')[0]}#{number}"
    return key


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
