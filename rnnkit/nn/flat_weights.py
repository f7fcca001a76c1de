"""The list behind `layer._flat_weights`, for programs that read it or write to it as torch.nn allows.

A layer keeps none until somebody asks: its weights are read by name at every call. From then on this list says which
of its items a program wrote. An item that is the very one the layer put there stands for the weight of this moment.
Any other was written, and is used until that weight is next set or moved. A weight that a parametrization computes is
new at every call, so what is written for it serves one.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn


class WeightList:
    """The list, one item for each of the layer's weights, and what is known of each."""

    __slots__ = ("before", "items", "lent", "own", "served", "sources")

    def __init__(self, layer: nn.RNNBase, items: list[Any], own: list[Any]) -> None:
        self.items = items  # the list that the program sees
        self.own = own  # what the layer put there, or would have
        self.sources = [_source(layer, name) for name in layer._flat_weights_names]  # what each weight was then
        self.served: dict[int, Any] = {}  # what was written for a computed weight and has had its call
        self.lent = True  # whether `items` is a list that the layer made
        self.before: WeightList | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a layer begins without one: copies of torch's layers forget what was written too."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @classmethod
    def of(cls, layer: nn.RNNBase) -> WeightList:
        """The weights of this moment, with nothing written."""
        items = [getattr(layer, name, None) for name in layer._flat_weights_names]
        return cls(layer, items, list(items))

    @classmethod
    def replaced(cls, layer: nn.RNNBase, value: Iterable[Any], before: WeightList | None) -> WeightList:
        """What stands after `layer._flat_weights = value`, where `before` stood."""
        if before is not None and value is before.items:
            return before
        if before is not None and before.before is not None and value is before.before.items:
            return before.before  # a program that puts back what it found, after one call with something else
        made = cls(layer, value if isinstance(value, list) else list(value), [])
        made.own = list(made.sources)
        if before is not None:
            for k, source in enumerate(made.sources):
                if isinstance(source, property):
                    made.own[k] = before.own[k]  # `value` may hold what was read from there
            before.before = None
        made.before, made.lent = before, False
        return made

    def written(self) -> dict[int, Any]:
        """What a program put there, by place."""
        return {k: a for k, (a, b) in enumerate(zip(self.items, self.own, strict=False)) if a is not b}

    def read(self, layer: nn.RNNBase, calling: bool = False) -> list[Any]:
        """The list, brought up to date with the weights of this moment. A call uses up what serves one."""
        names, held = layer._flat_weights_names, layer._parameters
        if len(self.items) != len(names):  # some program is in the middle of filling it
            return self.items
        if all(map(operator.is_, self.items, [held.get(name, self) for name in names])):
            return self.items  # read once and never written to, as most lists
        for k, name in enumerate(names):
            now = _source(layer, name)
            if self.items[k] is not self.own[k] and (now is None or now is self.sources[k]):
                if not isinstance(now, property):
                    continue
                if self.served.get(k) is not self.items[k]:
                    if calling:
                        self.served[k] = self.items[k]
                    continue
                if calling:
                    warnings.warn(
                        f"a parametrization computes {name} at every call: what was written to _flat_weights[{k}] "
                        "has served one call; write it before each",
                        stacklevel=4,
                    )
            value = getattr(layer, name, None) if isinstance(now, property) else now
            if value is not self.items[k]:
                self._own_items()[k] = value
            self.own[k], self.sources[k] = value, now
            self.served.pop(k, None)
        return self.items

    def set(self, layer: nn.RNNBase, name: str, value: Any) -> None:
        """The weight `name` was set to `value`."""
        k = layer._flat_weights_names.index(name)
        if k < len(self.items):
            self.items[k] = self.own[k] = value
            self.sources[k] = _source(layer, name)  # what is written from now on is written for this one

    def _own_items(self) -> list[Any]:
        """`items`, and where that is a list of the program's, a copy of it."""
        if not self.lent:
            self.items, self.lent = list(self.items), True
        return self.items


def _source(layer: nn.RNNBase, name: str) -> Any:
    """What this weight is now, without computing it: a tensor, the property that computes it, or None."""
    if name in layer._parameters:
        return layer._parameters[name]
    found = getattr(type(layer), name, None)
    return found if isinstance(found, property) else getattr(layer, name, None)


def take_flat_weights(layer: nn.RNNBase) -> None:
    """Of a layer that was torch's until now: what a program wrote to its list stays, where torch would have used it."""
    items = layer.__dict__.pop("_flat_weights", None)
    refs, layer._flat_weight_refs = layer._flat_weight_refs, []
    now = [_source(layer, name) for name in layer._flat_weights_names]
    if items is None or len(refs) != len(now):
        return
    pairs = zip(now, refs, strict=True)
    if any(isinstance(w, property) or (w is not None and ref is not None and ref() is not w) for w, ref in pairs):
        layer._init_flat_weights()  # as torch before its next call
    elif len(items) != len(now) or any(a is not b for a, b in zip(items, now, strict=True)):
        layer._flat_weights = items


def init_flat_weights(layer: nn.RNNBase, held: WeightList | None) -> None:
    """Of a layer that is torch's from now on: its own list, with what a program wrote to ours."""
    layer._init_flat_weights()
    for k, weight in ({} if held is None else held.written()).items():
        layer._flat_weights[k] = weight
