"""`convert` and `revert` turn torch.nn's recurrent layers into ours and back; `patch_torch` does so for a program.

An object keeps its identity, its Parameters, hooks, mode and name; only its class changes.
"""

from __future__ import annotations

import copyreg
import types
import warnings
import weakref
from typing import Any, ClassVar, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from .backends import check_name
from .libraries import warn_of_libraries
from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .nn.base import OURS, TORCH, Recurrent, RecurrentLayer
from .nn.flat_weights import init_flat_weights, take_flat_weights

ModuleType = TypeVar("ModuleType", bound=nn.Module)
RNNKIT: dict[str, type[Recurrent]] = {cls.TORCH_NAME: cls for cls in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
_TO_OURS: dict[type[nn.Module], type[nn.Module]] = {TORCH[name]: RNNKIT[name] for name in TORCH}
_TO_TORCH: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in _TO_OURS.items()}


def convert(module: ModuleType, *, backend: str = "auto", subclasses: bool = False) -> ModuleType:
    """Make every torch.nn recurrent layer and cell inside `module` (or `module` itself) one of rnnkit's, in place.

    Args:
        module: any module tree. Shared modules stay shared; Parameters, hooks, train/eval mode, requires_grad,
            device, dtype and parametrized weights are kept. Layers of complex weights are left alone and named in a
            warning.
        backend: for each converted layer.
        subclasses: also convert subclasses of torch's layers; `super()` in their methods then means ours, and
            isinstance keeps answering as before. Without it they are left alone and named in a warning.

    Returns:
        `module`.

    Raises:
        ValueError: an unknown backend; nothing is changed then.
        TypeError: not a module.
    """
    check_name(backend)
    _expect_module(module, "convert")
    plan: list[tuple[nn.Module, type[nn.Module]]] = []
    left: list[str] = []
    complex_weights: list[str] = []
    for name, child in module.named_modules():
        if isinstance(child, Recurrent):
            continue
        base = _base(child)
        if not any(isinstance(child, cls) for cls in TORCH.values()):
            continue
        if any(weight.is_complex() for weight in child.parameters()):
            complex_weights.append(name or "(itself)")
        elif base in _TO_OURS:
            plan.append((child, _rebased(child, _TO_OURS[base])))
        else:
            if subclasses:
                plan.append((child, _rebased(child, _above(base))))
            else:
                left.append(f"{name or '(itself)'} ({type(child).__module__}.{type(child).__qualname__})")
    for child, cls in plan:
        child.__class__ = cls
        if isinstance(child, RecurrentLayer):
            take_flat_weights(child)
        if backend != "auto":
            child.backend = backend  # type: ignore[assignment]
    if plan:
        warn_of_libraries("rnnkit.convert(model)", patched=False)
    if left:
        warnings.warn(
            f"rnnkit.convert left these subclasses of torch's layers alone: {', '.join(left)}; "
            "pass subclasses=True to convert them too",
            stacklevel=2,
        )
    if complex_weights:
        warnings.warn(
            f"rnnkit.convert left these layers torch's, since complex numbers are not supported: "
            f"{', '.join(complex_weights)}",
            stacklevel=2,
        )
    return module


def revert(module: ModuleType) -> ModuleType:
    """Make every rnnkit layer and cell inside `module` (or `module` itself) torch.nn's again, in place.

    Returns:
        `module`.

    Raises:
        ValueError: a layer that torch cannot express (reset_after=False, heads, a subclass of an rnnkit layer), by
            name; nothing is changed then.
        TypeError: not a module.
    """
    _expect_module(module, "revert")
    plan: list[tuple[nn.Module, type[nn.Module]]] = []
    stuck: list[str] = []
    for name, child in module.named_modules():
        if not isinstance(child, Recurrent):
            continue
        base = _base(child)
        original = base.__dict__.get("_rnnkit_from")
        if not child._like_torch():
            beyond = " and ".join(child._beyond_torch())
            stuck.append(f"{name or '(itself)'}: torch has no {child.TORCH_NAME} with {beyond}")
        elif original is not None:
            plan.append((child, _rebased(child, original)))
        elif base in _TO_TORCH:
            plan.append((child, _rebased(child, _TO_TORCH[base])))
        else:
            stuck.append(f"{name or '(itself)'}: {type(child).__qualname__} is a subclass of rnnkit.{child.TORCH_NAME}")
    if stuck:
        raise ValueError(f"rnnkit.revert changed nothing, since torch cannot express: {'; '.join(stuck)}")
    for child, cls in plan:
        written = child.__dict__.get("_weight_list")
        for key in OURS:
            child.__dict__.pop(key, None)
        child.__class__ = cls
        if isinstance(child, nn.RNNBase):
            init_flat_weights(child, written)
    return module


def _expect_module(module: object, what: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"rnnkit.{what} takes an nn.Module, got {type(module).__name__}")


def _base(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the one that torch's parametrize puts above it."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) and _made_by_parametrize(cls) else cls


def _made_by_parametrize(cls: type) -> bool:
    return cls.__name__.startswith("Parametrized") and len(cls.__bases__) == 1


def _rebased(module: nn.Module, base: type[nn.Module]) -> type[nn.Module]:
    """`base`, or for a parametrized module the same parametrized class over `base`."""
    cls = type(module)
    if cls is _base(module):
        return base
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base,), namespace)


class _Above(type):
    """Makes `class X(nn.LSTM)` find rnnkit's LSTM before torch's, so that X's own `super()` means ours."""

    def mro(cls) -> list[type]:
        order = super().mro()
        ours = cls.__dict__.get("_rnnkit_class")
        if ours is None:
            return order
        theirs = _TO_TORCH[ours]
        between = [c for c in ours.__mro__ if c not in theirs.__mro__]
        rest = [c for c in order if c not in between]
        at = rest.index(theirs)
        return rest[:at] + between + rest[at:]


_MADE: weakref.WeakValueDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakValueDictionary()


def _above(cls: type[nn.Module]) -> type[nn.Module]:
    """A class like `cls`, a subclass of one of torch's layers, that runs on ours."""
    if cls in _MADE:
        return _MADE[cls]
    ours = _TO_OURS[next(c for c in cls.__mro__ if c in _TO_OURS)]
    namespace = {
        "_rnnkit_class": ours,
        "_rnnkit_from": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
    }
    made: type[nn.Module] = _Above(cls.__name__, (cls,), namespace)  # type: ignore[assignment]
    _MADE[cls] = made
    return made


def _reduce(self: nn.Module, protocol: Any) -> tuple:
    """Pickled as its original class with our state on it: `_above` is made again on loading."""
    return _restore, (type(self)._rnnkit_from,), self.__getstate__()  # type: ignore[attr-defined]


def _restore(original: type[nn.Module]) -> nn.Module:
    return copyreg.__newobj__(_above(original))  # type: ignore[attr-defined]


class patch_torch:
    """Make torch.nn.RNN … torch.nn.GRUCell rnnkit's from here on; as a context manager, only inside the block.

    `patch = patch_torch()` and later `patch.undo()` do the same without a block.

    The names in torch.nn, torch.nn.modules and torch.nn.modules.rnn are set. torch.compile refuses full graphs for
    what those names mean unless told otherwise, so `torch._dynamo.config.allow_rnn` is set for as long as it holds.
    """

    _PLACES = (nn, nn.modules, nn.modules.rnn)
    _holding: ClassVar[list[patch_torch]] = []
    _before: ClassVar[list[tuple[Any, str, Any]]] = []  # what was there when the first of them came

    def __init__(self) -> None:
        import torch._dynamo.config as dynamo

        if not self._holding:
            self._before[:] = [(place, name, getattr(place, name)) for place in self._PLACES for name in RNNKIT]
            self._before.append((dynamo, "allow_rnn", dynamo.allow_rnn))
        self._holding.append(self)
        for place in self._PLACES:
            for name, cls in RNNKIT.items():
                setattr(place, name, cls)
        dynamo.allow_rnn = True
        warn_of_libraries("rnnkit.patch_torch()", patched=True)

    def __enter__(self) -> patch_torch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.undo()

    def undo(self) -> None:
        """Put back what the names meant before, once no other patch holds. A second time it does nothing."""
        if self not in self._holding:
            return
        self._holding.remove(self)
        if not self._holding:
            for place, name, value in self._before:
                setattr(place, name, value)


__all__ = ["convert", "patch_torch", "revert"]
