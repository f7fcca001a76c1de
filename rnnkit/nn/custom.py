"""`Custom`: a recurrent layer of a user's own cell, with everything that the built-in layers have."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, init
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from ..custom import choose, stack
from ..custom.declare import Cell, Init, cell_of, spec_of
from ..custom.stack import Piece, Settings


class Custom(nn.Module):
    r"""A recurrent layer of any cell that is written as one step, an :class:`rnnkit.Cell`.

    T steps, B rows, I = input_size, H = hidden_size, L = num_layers, D = 2 if bidirectional else 1.

    Args:
        cell: a subclass of :class:`rnnkit.Cell`, or an instance, which has options.
        input_size, hidden_size: I and H.
        num_layers: L, layers stacked on one another.
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]; states are not concerned.
        dropout: probability with which each output of every layer but the last is zeroed in training.
        bidirectional: a second set of weights runs from the end.
        device, dtype: of the parameters.
        backend: ``'auto'``, ``'cpu'``, ``'triton'`` or ``'reference'``; a named one runs or raises with its reasons.
        recompute: keep less for the backward, which makes it again.
        heads: n blocks of H/n: the recurrent weights are block-diagonal, [blocks·H, H/n].

    Inputs: ``input, hx, *, lengths, reset, reset_state, return_all_states`` as in :func:`rnnkit.functional.lstm`, and
    by keyword what the cell declares by ``rnnkit.per_step``: [T, B, H] or [T, B] in the layout of the input, one
    tensor for every layer and direction or [L·D, ...] with one each; T = 1 is the same at every step. hx and
    reset_state are a tensor [L·D, B, H] for a cell with one state, else a tuple of such.

    Outputs: ``output [T, B, D·H], states``, and with return_all_states ``all_states [L·D, T, B, H]``; a tensor for a
    cell with one state, else a tuple in the order of the cell's states.

    Errors: TypeError and ValueError where the cell, its step or what the call brings does not fit; what the step
    itself raises; NotImplementedError where a named backend cannot run it.

    Source: none; the cell's author gives it.
    """

    def __init__(
        self,
        cell: type[Cell] | Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        recompute: bool = False,
        heads: int = 1,
    ) -> None:
        super().__init__()
        self.cell, self._spec = cell_of(cell), spec_of(cell)
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "heads": heads}
        for name, v in sizes.items():
            checks.expect_count(v, name, 0 if name == "input_size" else 1)
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "recompute": recompute}
        for name, flag in flags.items():
            checks.expect_bool(flag, name)
        checks.probability(dropout)
        choose.expect_known(backend)
        if hidden_size % heads:
            raise ValueError(f"hidden_size = {hidden_size} must be a multiple of heads = {heads}")
        if dropout and num_layers == 1:
            warnings.warn(f"dropout={dropout} acts between layers, and num_layers is 1: it does nothing", stacklevel=2)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.backend, self.recompute, self.heads = bidirectional, backend, recompute, heads
        self._names: list[list[str]] = []
        """Of each layer and direction its parameters, as `Piece` orders them."""
        self._module_names: list[dict[str, str]] = []
        for k in range(num_layers):
            for suffix in ("", "_reverse")[: 1 + bidirectional]:
                self._add(k, f"_l{k}{suffix}", device, dtype)
        self._draw_parameters()  # modules come as their makers left them

    def _add(self, k: int, suffix: str, device: Any, dtype: torch.dtype | None) -> None:
        """The parameters of one layer and direction."""
        spec, h = self._spec, self.hidden_size
        width = self.input_size if k == 0 else h * (1 + self.bidirectional)
        weights = {n if n != "w_hh" else "weight_hh": (m * h, h // self.heads) for n, m in spec.weights}
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (spec.gates * h, width)}
        if spec.recurrent:
            shapes["weight_hh"] = weights["weight_hh"]
        biases = (["bias_ih", "bias_hh"] if spec.recurrent else ["bias_ih"]) if self.bias else []
        shapes.update({name: (spec.gates * h,) for name in biases})
        shapes.update(weights)
        shapes.update({name: (h,) for name in spec.units})
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._names.append([name + suffix for name in ("weight_ih", *biases, *weights, *spec.units)])
        for name, made in spec.modules.items():
            found = made.make(spec.gates, h)
            if not isinstance(found, nn.Module):
                raise TypeError(f"{spec.name}.{name}: make(gates, hidden) must give an nn.Module, got {found!r}")
            self.add_module(name + suffix, found.to(device=device, dtype=dtype))
        self._module_names.append({name: name + suffix for name in spec.modules})

    def reset_parameters(self) -> None:
        """Draw the parameters anew: as the cell declares, else uniform in ±1/√H as torch's layers. Its modules do so
        by their own `reset_parameters`; where one has none, those in it by theirs."""
        self._draw_parameters()
        for made in self.children():
            _reset(made)

    def _draw_parameters(self) -> None:
        """Those of the layer itself."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, v in self._parameters.items():
            if v is not None:
                _fill(v, self._spec.inits.get(name.rpartition("_l")[0]), bound)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction."""
        return [[getattr(self, name) for name in names] for names in self._names]

    def flatten_parameters(self) -> None:
        """For programs that call it on every recurrent layer. Nothing has to be done."""

    def extra_repr(self) -> str:
        """The arguments that are not the defaults, as torch's layers print them."""
        said = f"{self.cell!r}, {self.input_size}, {self.hidden_size}"
        defaults: dict[str, Any] = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "backend": "auto",
            "recompute": False,
            "heads": 1,
        }
        changed = {name: getattr(self, name) for name, v in defaults.items() if getattr(self, name) != v}
        return said + "".join(f", {name}={v!r}" for name, v in changed.items())

    def _pieces(self) -> list[Piece]:
        """The parameters of this moment. One that a parametrization or a hook computes is not among the Parameters."""
        spec, held = self._spec, self._parameters
        first = 1 + ((1 + spec.recurrent) if self.bias else 0)
        last = first + len(spec.weights)
        found = []
        for names, modules in zip(self._names, self._module_names, strict=True):
            try:
                v: list[Any] = list(map(held.__getitem__, names))
            except KeyError:
                v = [getattr(self, name) for name in names]
            b_ih = v[1] if self.bias else None
            b_hh = v[2] if first == 3 else None
            own = {name: self._modules[full] for name, full in modules.items()}
            found.append(Piece(v[0], b_ih, b_hh, tuple(v[first:last]), tuple(v[last:]), own))  # type: ignore[arg-type]
        return found

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_state: Any = None,
        return_all_states: bool = False,
        **per_step: Any,
    ) -> Any:
        """Run the sequence; see the class."""
        settings = Settings(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            2 if self.bidirectional else 1,
            self.batch_first,
            self.dropout,
            self.heads,
            self.recompute,
            self.backend,
        )
        return stack.run(
            self.cell,
            self._spec,
            settings,
            self._pieces(),
            input,
            hx,
            self.training,
            lengths,
            reset,
            reset_state,
            return_all_states,
            per_step,
        )


def _reset(module: nn.Module) -> None:
    again = getattr(module, "reset_parameters", None)
    if callable(again):
        again()
        return
    for child in module.children():
        _reset(child)


def _fill(v: Tensor, how: Init, bound: float) -> None:
    with torch.no_grad():
        if how is None:
            init.uniform_(v, -bound, bound)
        elif callable(how):
            how(v)
        else:
            v.fill_(how)
