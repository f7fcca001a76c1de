"""What the layers and the cells share: parameters that pass for torch.nn's, and calls that end in `functional`.

Layers derive from `nn.RNNBase` and cells from `nn.RNNCellBase`, so initialisation, names, `state_dict`, pickling
and printing are torch's own. Weights are read at every call, unless a program wrote others to `_flat_weights`. Where
torch itself has to take over (tracing, ONNX export, scripting, inputs with a `__torch_function__` of their own, the
words of an exception that a program may expect), a torch layer that holds the same parameters does; `as_torch` makes
it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils.rnn import PackedSequence

from .. import checks, functional
from ..backends import check_name
from . import heads as blocks
from .flat_weights import WeightList, init_flat_weights

# torch's classes as they were before `patch_torch` put ours in their place.
TORCH: dict[str, type[nn.Module]] = {
    name: getattr(torch_rnn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
}
OURS = ("backend", "recompute", "reset_after", "heads", "_weight_list")
KEYWORDS = ("lengths", "reset", "reset_state", "return_all_states")
CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

Init = TypeVar("Init", bound=Callable[..., None])


def answered_by_torch(name: str) -> Callable[[Init], Init]:
    """For the `__init__` of torch's layer `name`: its parameters are what a reader, `inspect` and type checkers see;
    arguments that do not fit them are answered by torch's own `__init__`, which has `*args`."""

    def decorate(init: Init) -> Init:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            if name != "LSTM" and "proj_size" in kwargs:
                raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
            try:
                signature.bind(self, *args, **kwargs)
            except TypeError as error:
                TORCH[name](*args, **{k: v for k, v in kwargs.items() if k not in OURS})
                raise TypeError(f"{init.__qualname__}() {error}") from None
            init(self, *args, **kwargs)

        return __init__  # type: ignore[return-value]

    return decorate


class Recurrent(nn.Module):
    """What every layer and cell has beside torch's parameters."""

    TORCH_NAME = ""
    input_size: int
    hidden_size: int
    backend = "auto"
    reset_after = True
    heads = 1

    def _set_backend(self, backend: str) -> None:
        check_name(backend)
        if backend != "auto":
            self.backend = backend

    def _like_torch(self) -> bool:
        """Whether torch has a layer that computes the same."""
        return self.reset_after and self.heads == 1

    def _beyond_torch(self) -> list[str]:
        """The arguments for which torch has no such layer."""
        return ["reset_after=False"] * (not self.reset_after) + [f"heads={self.heads}"] * (self.heads != 1)

    def extra_repr(self) -> str:
        extra = ", ".join([super().extra_repr(), *self._beyond_torch()])
        if self.backend != "auto":
            extra += f", backend={self.backend!r}"
        return extra

    def _torch_twin(self, weights: Sequence[Tensor | None]) -> nn.Module:
        """A torch layer that computes with these weights, for one call."""
        twin = TORCH[self.TORCH_NAME].__new__(TORCH[self.TORCH_NAME])
        twin.__dict__.update({k: v for k, v in self.__dict__.items() if k not in OURS})
        return twin

    def _weights(self, names: Sequence[str]) -> list[Tensor | None]:
        """The weights of this moment. One that a parametrization or a hook computes is not among the Parameters."""
        held = self._parameters
        try:
            return list(map(held.__getitem__, names))  # in half the time of a comprehension
        except KeyError:
            return [getattr(self, name) for name in names]

    def _through_torch(self, weight: Tensor | None, input: object, hx: object, **extras: object) -> bool:
        """Whether this call goes to torch's own operator: so that a trace or an ONNX graph is the one it makes; for
        torch's per-sample gradients, whose ExpandedWeight knows the operators of torch's layers alone; and for objects
        that are no tensors, whose `__torch_function__` is given that operator."""
        foreign = _tensor_like(input, hx)
        onnx = torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
        if not (foreign or onnx or torch.jit.is_tracing() or type(weight).__name__ == "ExpandedWeight"):
            return False
        beyond = [key for key, value in extras.items() if value is not None and value is not False]
        beyond += self._beyond_torch()
        if foreign and beyond:
            raise TypeError(
                f"{foreign} is no torch.Tensor: its __torch_function__ is given torch's own operator, which has no "
                f"{', no '.join(beyond)}; pass tensors"
            )
        return not beyond

    def _fx_node(self, *args: Any, **kwargs: Any) -> fx.Proxy | None:
        """One node for this module in a graph that torch.fx traces, as for torch's layers; None outside of tracing."""
        found = [v for v in (*args, *kwargs.values()) for v in (v if isinstance(v, tuple | list) else (v,))]
        proxy = next((v for v in found if isinstance(v, fx.Proxy)), None)
        if proxy is None:
            return None
        given = {k: v for k, v in kwargs.items() if v is not None and v is not False}
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, given)

    def _check_parameters(self, cell: str, names: Sequence[str], weights: Sequence[Tensor | None]) -> None:
        """Of a call that cannot run: name the parameter that does not fit this module's sizes, where one does not.
        torch is not asked then: its oneDNN reads beyond the end of one that is too small."""
        proj_size, directions = getattr(self, "proj_size", 0), 2 if getattr(self, "bidirectional", False) else 1
        checks.parameters(cell, names, weights, self.input_size, self.hidden_size, proj_size, directions)

    def _raise_torch_error(self, error: Exception, weights: Sequence[Tensor | None], *args: Any) -> None:
        """Raise what torch raises for these weights and arguments, with the words of `error` added to it, or else
        `error`. A nested input torch's layers never take, so that what they raise would say nothing."""
        if isinstance(args[0], Tensor) and args[0].is_nested:
            raise error
        try:
            self._torch_twin(weights).forward(*args)
        except Exception as theirs:
            if torch.compiler.is_compiling() or str(theirs) == str(error):
                raise
            _add_words(theirs, error)
            raise
        raise error

    def __prepare_scriptable__(self) -> nn.Module:
        if not self._like_torch():
            raise NotImplementedError(
                f"torch.jit.script needs a layer that torch knows, and {self.TORCH_NAME}"
                f"({', '.join(self._beyond_torch())}) is not one; use torch.jit.trace or torch.export"
            )
        warnings.warn(
            f"torch.jit.script replaces rnnkit.{self.TORCH_NAME} by torch.nn.{self.TORCH_NAME} with the same "
            "parameters, in the eager model too; rnnkit.convert(model) puts it back",
            stacklevel=2,
        )
        return as_torch(self)


def _tensor_like(input: object, hx: object) -> str | None:
    """The type's name of what is no tensor and yet has a `__torch_function__`."""
    for v in (input, hx):
        for each in v if isinstance(v, tuple | list) else (v,):
            if not isinstance(each, Tensor) and hasattr(type(each), "__torch_function__"):
                return type(each).__name__
    return None


def _add_words(theirs: Exception, ours: Exception) -> None:
    """Our sentence below torch's in what a traceback shows; torch's type and text stay."""
    add_note = getattr(theirs, "add_note", None)
    if add_note is not None:
        add_note(f"rnnkit: {ours}")
    else:  # Python 3.10
        theirs.__cause__ = ours


def _paired_biases(weights: list[Any]) -> list[Any]:
    """A cell's weights with both biases or none: torch's cells take one alone, zeros stand for the other."""
    w_ih, w_hh, b_ih, b_hh = weights
    if b_ih is None and b_hh is None:
        return [w_ih, w_hh]
    return [
        w_ih,
        w_hh,
        torch.zeros_like(b_hh) if b_ih is None else b_ih,
        torch.zeros_like(b_ih) if b_hh is None else b_hh,
    ]


def as_torch(module: Recurrent) -> nn.Module:
    """A torch.nn layer that holds the same Parameters, hooks and mode."""
    weights = () if isinstance(module, nn.RNNBase) else module._weights(CELL_WEIGHTS)
    twin = module._torch_twin(weights)  # a layer's come below
    for key in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[key] = dict(module.__dict__[key])
    if isinstance(twin, nn.RNNBase):
        init_flat_weights(twin, module.__dict__.get("_weight_list"))
    return twin


class RecurrentLayer(Recurrent, nn.RNNBase):
    """What RNN, LSTM and GRU share."""

    recompute = False
    _weight_list: WeightList | None = None  # what `_flat_weights` gave out or was set to, once a program has asked

    def _take_heads(self, heads: int, hidden_size: int, proj_size: int, backend: str) -> None:
        """Before torch's `__init__`, which makes weights of one head, asks for their list, and fills them."""
        blocks.expect_fit(heads, hidden_size, proj_size, backend)
        if heads != 1:
            self.__dict__.update(heads=heads, _to_narrow=True)

    def _set_up(self, backend: str, recompute: bool) -> None:
        self._set_backend(backend)
        checks.expect_bool(recompute, "recompute")
        if recompute:
            self.recompute = True

    def extra_repr(self) -> str:
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    @property
    def _flat_weights(self) -> list[Any]:
        """The weights of this moment, in torch's order, in a list that may be written to."""
        held = self._weight_list
        if held is None:
            self.__dict__["_weight_list"] = held = WeightList.of(self)
            return held.items
        return held.read(self)

    @_flat_weights.setter
    def _flat_weights(self, value: Iterable[Any]) -> None:
        self.__dict__["_weight_list"] = WeightList.replaced(self, value, self._weight_list)

    def __setattr__(self, attr: str, value: Any) -> None:
        super(nn.RNNBase, self).__setattr__(attr, value)  # RNNBase's own would read the list
        held = self.__dict__.get("_weight_list")  # not by the class, which may be what was set
        if held is not None and attr in self._flat_weights_names:
            held.set(self, attr, value)

    def _init_flat_weights(self) -> None:
        """Forget what was written: torch does so after each move. No weight is computed for it."""
        if self.__dict__.pop("_to_narrow", False):
            blocks.narrow(self, self.heads)
        inherited = super()._init_flat_weights
        if inherited.__func__ is not nn.RNNBase._init_flat_weights:  # type: ignore[attr-defined]
            return inherited()  # of a class between ours and torch's
        self.__dict__.pop("_weight_list", None)
        self.flatten_parameters()
        return None

    def _weights_have_changed(self) -> bool:
        """torch's question. Its references are empty here, unless a program fills them."""
        filled = len(self._flat_weight_refs) == len(self._flat_weights_names)
        return filled and super()._weights_have_changed()

    def flatten_parameters(self) -> None:
        """Lay the Parameters out as cuDNN likes them. What is computed is new at every call, so no layout lasts."""
        if self.heads != 1:  # not cuDNN's
            return
        held = self._weight_list
        if all(name in self._parameters for name in self._flat_weights_names) and (held is None or not held.written()):
            super().flatten_parameters()
            self.__dict__["_weight_list"] = held

    def _replicate_for_data_parallel(self) -> RecurrentLayer:
        replica = super(nn.RNNBase, self)._replicate_for_data_parallel()  # RNNBase's own would copy the list
        replica.__dict__.pop("_weight_list", None)
        if self._flat_weight_refs:  # a program's own `_init_flat_weights` fills the replica's list at its call
            replica._flat_weights = [None] * len(self._flat_weights_names)
        return replica

    def __getstate__(self) -> dict[str, Any]:
        """torch's, without looking at the weights: a copy begins with nothing written."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_flat_weight_refs", "_weight_list")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({k: v for k, v in state.items() if k != "_flat_weights"})
        self.__dict__.pop("_weight_list", None)
        self._flat_weight_refs = []
        if self.heads != 1:
            blocks.prepare()
        fillers = [cls for cls in type(self).__mro__ if "_init_flat_weights" in cls.__dict__]
        if fillers != [RecurrentLayer, nn.RNNBase]:  # a program's own
            self._init_flat_weights()

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        """How torch calls `forward` while it traces. Its older ONNX exporter fills in keyword-only defaults by place,
        and makes a tensor of a bool."""
        named = dict(zip(KEYWORDS, input[2:], strict=False))
        if isinstance(named.get("return_all_states"), Tensor):
            named["return_all_states"] = named["return_all_states"].tolist()
        return super()._slow_forward(*input[:2], **named, **kwargs)

    def _torch_twin(self, weights: Sequence[Tensor | None]) -> nn.Module:
        twin = super()._torch_twin(weights)
        twin.__dict__["_flat_weights"] = weights
        twin.__dict__["_flat_weight_refs"] = [None] * len(self._flat_weights_names)
        return twin

    def _run(
        self,
        cell: str,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | None,
        reset: Tensor | PackedSequence | None,
        reset_state: Any,
        return_all_states: bool,
    ) -> Any:
        weights = self._weights(self._flat_weights_names) if self._weight_list is None else self._written(input, hx)
        bare = lengths is None and reset is None and reset_state is None and return_all_states is False
        states = hx if type(hx) is tuple else (hx,)
        if not (bare and checks.is_plain_eager(input, weights[0], *states)):
            extras = {"lengths": lengths, "reset": reset, "reset_state": reset_state}
            node = self._fx_node(input, hx, **extras, return_all_states=return_all_states)
            if node is not None:
                return node
            if self._through_torch(weights[0], input, hx, **extras, return_all_states=return_all_states):
                return self._torch_twin(weights).forward(input, hx)
        if self.heads != 1:
            return blocks.run(self, cell, weights, input, hx, lengths, reset, reset_state, return_all_states)
        try:
            return functional.stack(
                cell,
                input,
                hx,
                weights,  # type: ignore[arg-type]
                self.num_layers,
                self.bidirectional,
                self.batch_first,
                self.dropout,
                self.training,
                self.proj_size,
                lengths,
                reset,
                reset_state,
                return_all_states,
                self.backend,
                self.recompute,
            )
        except checks.BadInput as mistake:
            error = mistake
        self._check_parameters(cell, self._flat_weights_names, weights)
        return self._raise_torch_error(error, weights, input, hx)

    def _written(self, input: object, hx: object) -> list[Any]:
        """The weights of a call where there is a list: what was written, and for the others those of this moment."""
        if self._flat_weight_refs:  # a program's own: see `_weights_have_changed`
            self._update_flat_weights()
        held = self._weight_list
        if held is None:
            return self._weights(self._flat_weights_names)
        weights, names = list(held.read(self, calling=True)), self._flat_weights_names
        if len(weights) != len(names):
            wanted = f"{len(names)} items, {', '.join(names)}"
            error = checks.BadValue(f"_flat_weights must have {wanted}; got {len(weights)}")
            self._raise_torch_error(error, weights, input, hx)
        return weights


class RecurrentCell(Recurrent, nn.RNNCellBase):
    """What RNNCell, LSTMCell and GRUCell share."""

    def _torch_twin(self, weights: Sequence[Tensor | None]) -> nn.Module:
        twin = super()._torch_twin(weights)
        twin.__dict__.update(zip(CELL_WEIGHTS, weights, strict=False))
        return twin

    def _run(self, cell: str, input: Tensor, hx: Any) -> Any:
        weights = self._weights(CELL_WEIGHTS)
        states = hx if type(hx) is tuple else (hx,)
        if not checks.is_plain_eager(input, weights[0], *states):
            node = self._fx_node(input, hx)
            if node is not None:
                return node
            if self._through_torch(weights[0], input, hx):
                return self._torch_twin(weights).forward(input, hx)
        given: Any = _paired_biases(weights) if weights[2] is None or weights[3] is None else weights
        try:
            if isinstance(input, Tensor) and input.dim() == 2:
                return functional.step(cell, input, hx, given, self.backend)
            rows, state = checks.cell_rows(input, hx, self.TORCH_NAME)
            new = functional.step(cell, rows, state, given, self.backend)
            return tuple(v.squeeze(0) for v in new) if isinstance(new, tuple) else new.squeeze(0)
        except checks.BadInput as mistake:
            error = mistake
        self._check_parameters(cell, CELL_WEIGHTS, given)
        return self._raise_torch_error(error, weights, input, hx)
