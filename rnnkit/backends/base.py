"""The base class of every backend: what `ops.layer` asks of one."""

from __future__ import annotations

from torch import Tensor

from ..cells import CELLS
from .spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec, Result, StackOptions

Gradient = Tensor | None


def no_kernel(cell: str) -> str:
    """The reason of a backend that does not know a cell."""
    return f"has no kernel for the cell {cell!r}"


class Backend:
    """One way to run a layer. Knows plain tensors; nothing of autograd, stacks, packing or layouts."""

    name = ""
    stacks = False
    """Whether it has `stack_forward` and `stack_backward`."""
    takes_none_states = False
    """Whether it takes None for zeros of h_0 and c_0."""
    saves_narrow = False
    """Whether what it saves for a backward has the layer's dtype, where others save float32 or wider. With `recompute`
    it has in all."""

    concurrent_directions = False
    """Whether both directions of a layer may run at once, on two streams of a GPU: no kernel waits for blocks that may
    have no multiprocessor yet."""

    def available(self) -> str | None:
        """Why it cannot run anything on this machine; None where it can."""
        return None

    def unsupported(self, spec: LayerSpec) -> list[str]:
        """Why it cannot run this layer; empty where it can."""
        raise NotImplementedError(self.name)

    def auto_exclusion_reason(self, spec: LayerSpec) -> str | None:
        """Why `auto` leaves to others what this backend could run; None where it does not."""
        return None

    def detail(self, spec: LayerSpec) -> str | None:
        """How it runs this layer, for `explain`; None where there is one way only."""
        return None

    def forward(self, cell: str, t: LayerInputs, o: LayerOptions, *, train: bool, graph: bool = False) -> Result:
        """Run the layer. `train`: keep what `backward` needs; `graph`: an autograd graph may be kept for it."""
        raise NotImplementedError(self.name)

    def stack_forward(
        self, o: StackOptions, needs: bytes, tensors: tuple[Tensor | None, ...], masks: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """A whole call in the caller's layout: `o.outputs`, then what `stack_backward` wants kept, masks of dropout
        first.

        tensors: `StackInputs`, then the weights. needs: a byte each, 1 where a gradient is wanted; empty: nothing is
        kept. masks: those of an earlier call, else they are drawn. Raises Unfit for what it does not take.
        """
        raise NotImplementedError(self.name)

    def saved_bytes(self, spec: LayerSpec) -> int:
        """About what `stack_forward` keeps of a layer and direction for the backward, the output with it."""
        raise NotImplementedError(self.name)

    def stack_backward(
        self, o: StackOptions, needs: bytes, saved: tuple[Tensor | None, ...], grads: tuple[Gradient, ...]
    ) -> list[Gradient]:
        """The gradients of the tensors (None where not needed), given those of the results.

        saved: the tensors, then y where `o.reads_output`, then what `stack_forward` gave to be kept.
        """
        raise NotImplementedError(self.name)

    def backward(
        self,
        cell: str,
        t: LayerInputs,
        o: LayerOptions,
        y: Tensor,
        result: Result | None,
        grads: LayerOutputs,
        needs: list[bool],
    ) -> list[Gradient]:
        """Gradients of `t`, in its order (None where not needed), given those of the outputs (None: zeros)."""
        raise NotImplementedError(self.name)

    def kept(self, cell: str, t: LayerInputs, o: LayerOptions, result: Result | None) -> tuple[Tensor, ...]:
        """What the forward saved for `backward`: of its result, or, where it kept nothing, of a second one."""
        kind = CELLS[cell]
        saved = () if result is None else result.saved
        needed = kind.has_c if o.recompute else kind.saved
        return saved if saved or not needed else self.forward(cell, t, o, train=True).saved
