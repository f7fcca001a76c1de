"""What the layers and the cells share: parameters that pass for torch.nn's, and calls that end in `functional`.

Layers derive from `nn.RNNBase` and cells from `nn.RNNCellBase`, so initialisation, names, `state_dict`, pickling
and printing are torch's own. Nothing is cached: weights are read at every call. Where torch itself has to take
over (tracing, ONNX export, scripting, the words of an exception that a program may expect), a torch layer that
holds the same parameters does; `as_torch` makes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils.rnn import PackedSequence

from .. import checks, functional
from ..backends import check_name

# torch's classes as they were before `patch_torch` put ours in their place.
TORCH: dict[str, type[nn.Module]] = {
    name: getattr(torch_rnn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
}
OURS = ("backend", "recompute", "reset_after")
KEYWORDS = ("lengths", "reset", "reset_state", "return_all_states")
CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Recurrent(nn.Module):
    """What every layer and cell has beside torch's parameters."""

    TORCH_NAME = ""
    backend = "auto"
    reset_after = True

    def _set_backend(self, backend: str) -> None:
        check_name(backend)
        if backend != "auto":
            self.backend = backend

    def _like_torch(self) -> bool:
        """Whether torch has a layer that computes the same."""
        return self.reset_after

    def extra_repr(self) -> str:
        extra = super().extra_repr()
        if not self.reset_after:
            extra += ", reset_after=False"
        if self.backend != "auto":
            extra += f", backend={self.backend!r}"
        return extra

    def _torch_twin(self) -> nn.Module:
        """A torch layer that computes with this one's weights of this moment, for one call."""
        twin = TORCH[self.TORCH_NAME].__new__(TORCH[self.TORCH_NAME])
        twin.__dict__.update({k: v for k, v in self.__dict__.items() if k not in OURS})
        return twin

    def _weights(self, names: Sequence[str]) -> list[Tensor | None]:
        """The weights of this moment. One that a parametrization or a hook computes is not among the Parameters."""
        held = self._parameters
        try:
            return list(map(held.__getitem__, names))  # in half the time of a comprehension
        except KeyError:
            return [getattr(self, name, None) for name in names]

    def _through_torch(self, weight: Tensor | None, *plain: object) -> bool:
        """Whether this call goes to torch's own operator: so that a trace or an ONNX graph is the one it makes, and for
        torch's per-sample gradients, whose ExpandedWeight knows the operators of torch's layers alone."""
        onnx = torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
        if not (onnx or torch.jit.is_tracing() or type(weight).__name__ == "ExpandedWeight"):
            return False
        return self._like_torch() and not any(value is not None and value is not False for value in plain)

    def _fx_node(self, *args: Any, **kwargs: Any) -> fx.Proxy | None:
        """One node for this module in a graph that torch.fx traces, as for torch's layers; None outside of tracing."""
        found = [v for v in (*args, *kwargs.values()) for v in (v if isinstance(v, tuple | list) else (v,))]
        proxy = next((v for v in found if isinstance(v, fx.Proxy)), None)
        if proxy is None:
            return None
        given = {k: v for k, v in kwargs.items() if v is not None and v is not False}
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, given)

    def _raise_torch_error(self, error: Exception, *args: Any) -> None:
        """Raise what torch raises for these arguments, or else `error`."""
        self._torch_twin().forward(*args)
        raise error

    def __prepare_scriptable__(self) -> nn.Module:
        if not self._like_torch():
            raise NotImplementedError(
                f"torch.jit.script needs a layer that torch knows, and {self.TORCH_NAME}(reset_after=False) is not "
                "one; use torch.jit.trace or torch.export"
            )
        warnings.warn(
            f"torch.jit.script replaces rnnkit.{self.TORCH_NAME} by torch.nn.{self.TORCH_NAME} with the same "
            "parameters, in the eager model too; rnnkit.convert(model) puts it back",
            stacklevel=2,
        )
        return as_torch(self)


def as_torch(module: Recurrent) -> nn.Module:
    """A torch.nn layer that holds the same Parameters, hooks and mode."""
    twin = module._torch_twin()
    for key in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[key] = dict(module.__dict__[key])
    if isinstance(twin, nn.RNNBase):
        twin._init_flat_weights()
    return twin


class RecurrentLayer(Recurrent, nn.RNNBase):
    """What RNN, LSTM and GRU share."""

    recompute = False

    def _set_up(self, backend: str, recompute: bool) -> None:
        self._set_backend(backend)
        checks.expect_bool(recompute, "recompute")
        if recompute:
            self.recompute = True

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The weights of this moment, in torch's order."""
        return self._weights(self._flat_weights_names)

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        """torch writes what the names mean already. Nothing is cached, so another tensor would be lost."""
        current = self._flat_weights
        if len(value) != len(current) or any(a is not b for a, b in zip(value, current, strict=True)):
            raise AttributeError(
                "rnnkit reads its weights at every call and keeps no _flat_weights to write to; set the attribute "
                f"instead, such as layer.{self._flat_weights_names[1]} = ..."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({k: v for k, v in state.items() if k != "_flat_weights"})

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        """How torch calls `forward` while it traces. Its older ONNX exporter fills in keyword-only defaults by place,
        and makes a tensor of a bool."""
        named = dict(zip(KEYWORDS, input[2:], strict=False))
        if isinstance(named.get("return_all_states"), Tensor):
            named["return_all_states"] = named["return_all_states"].tolist()
        return super()._slow_forward(*input[:2], **named, **kwargs)

    def _torch_twin(self) -> nn.Module:
        twin = super()._torch_twin()
        twin.__dict__["_flat_weights"] = list(self._flat_weights)
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
        weights = self._weights(self._flat_weights_names)
        bare = lengths is None and reset is None and reset_state is None and return_all_states is False
        states = hx if type(hx) is tuple else (hx,)
        if not (bare and checks.is_plain_eager(input, weights[0], *states)):
            extras = {"lengths": lengths, "reset": reset, "reset_state": reset_state}
            node = self._fx_node(input, hx, **extras, return_all_states=return_all_states)
            if node is not None:
                return node
            if self._through_torch(weights[0], *extras.values(), return_all_states):
                return self._torch_twin().forward(input, hx)
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
        return self._raise_torch_error(error, input, hx)


class RecurrentCell(Recurrent, nn.RNNCellBase):
    """What RNNCell, LSTMCell and GRUCell share."""

    def _torch_twin(self) -> nn.Module:
        twin = super()._torch_twin()
        for name in CELL_WEIGHTS:  # also those that a parametrization computes
            twin.__dict__[name] = getattr(self, name)
        return twin

    def _run(self, cell: str, input: Tensor, hx: Any) -> Any:
        weights = self._weights(CELL_WEIGHTS)
        states = hx if type(hx) is tuple else (hx,)
        if not checks.is_plain_eager(input, weights[0], *states):
            node = self._fx_node(input, hx)
            if node is not None:
                return node
            if self._through_torch(weights[0]):
                return self._torch_twin().forward(input, hx)
        if weights[2] is None or weights[3] is None:
            del weights[2:]
        try:
            if isinstance(input, Tensor) and input.dim() == 2:
                return functional.step(cell, input, hx, weights, self.backend)  # type: ignore[arg-type]
            rows, state = checks.cell_rows(input, hx, self.TORCH_NAME)
            new = functional.step(cell, rows, state, weights, self.backend)  # type: ignore[arg-type]
            return tuple(v.squeeze(0) for v in new) if isinstance(new, tuple) else new.squeeze(0)
        except checks.BadInput as mistake:
            error = mistake
        return self._raise_torch_error(error, input, hx)
