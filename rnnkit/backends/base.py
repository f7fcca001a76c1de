"""The base class of every backend: what `ops.layer` asks of one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec, Result

Gradient = Tensor | None


class Backend:
    """One way to run a layer. Knows plain tensors; nothing of autograd, stacks, packing or layouts."""

    name = ""
    singles = False
    """Whether it has `single` and `single_backward`."""
    validates_inputs = False
    """Whether its operators check all that they are given: it then gets plain tensors unchecked, h_0 and c_0 None for
    zeros, and raises RuntimeError for what it does not take."""
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

    def single(
        self,
        cell: str,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        batch_first: bool,
        save: bool,
    ) -> list[Tensor] | None:
        """A module's only layer in the module's layouts, where `singles`: x and y [T, B, ·], or [B, T, ·] where
        batch_first, states [1, B, ·] or None for zeros -> y, h_n, c_n of an LSTM, and what is saved.

        None for tensors that are not plain. Raises RuntimeError for what it does not take.
        """
        raise NotImplementedError(self.name)

    def single_backward(
        self,
        cell: str,
        inputs: Sequence[Tensor | None],
        batch_first: bool,
        y: Tensor,
        saved: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: tuple[bool, ...],
    ) -> list[Gradient] | None:
        """Gradients of the seven `inputs` of `single`, given those of y, h_n and c_n; None as there."""
        raise NotImplementedError(self.name)

    def step(
        self,
        cell: str,
        x: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """One step of a cell without gradients: x [B, I], h and c [B, H] or None for zeros -> h and, for an LSTM, c.

        None where the backend has no shorter way than `forward`.
        """
        return None

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
