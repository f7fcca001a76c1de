"""The layouts in which a sequence may come, and the way to time-major and back.

Time-major [T, B, I], batch_first [B, T, I], unbatched [T, I], PackedSequence, and nested tensors [B, j, I] of layout
torch.jagged. Inside, everything is time-major; a packed sequence and a nested tensor become a padded one with lengths,
the rows of a packed one in the packed (sorted) order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .checks import BadValue


class Layout:
    """How one input was laid out. `x` is [T, B, I]; `lengths` [B] where the input itself brought them."""

    def __init__(self, input: Tensor | PackedSequence, batch_first: bool) -> None:
        self.batch_first = batch_first
        self.packed = False
        self.lengths: Tensor | None = None
        self.index: Tensor | None = None
        if type(input) is not Tensor and isinstance(input, PackedSequence):
            self.packed = True
            self.source = input
            sizes = input.batch_sizes
            self.steps, self.rows = len(sizes), int(sizes[0])
            self.dims = 2
            if int(sizes[-1]) != self.rows:
                there = torch.arange(self.rows) < sizes[:, None]
                self.index = there.flatten().nonzero().squeeze(1).to(input.data.device)
                self.lengths = there.sum(0).to(input.data.device)
            self.x = self.pad(input.data)
        else:
            self.dims = input.dim()
            if self.dims == 2:
                self.x = input.unsqueeze(1)
            else:
                self.x = input.transpose(0, 1) if batch_first else input
            self.steps, self.rows, _ = self.x.shape

    def pad(self, data: Tensor) -> Tensor:
        """[sum of lengths, ...] -> [T, B, ...], zeros beyond each row's length."""
        if self.index is not None:
            blank = data.new_zeros((self.steps * self.rows, *data.shape[1:]))
            data = blank.index_copy(0, self.index, data)
        return data.view(self.steps, self.rows, *data.shape[1:])

    def _pack(self, y: Tensor) -> Tensor:
        y = y.flatten(0, 1)
        return y if self.index is None else y.index_select(0, self.index)

    def dropout(self, y: Tensor, p: float) -> Tensor:
        """Dropout between layers, drawn over the same elements in the same order as torch.nn draws it."""
        return self.pad(F.dropout(self._pack(y), p)) if self.packed else F.dropout(y, p)

    def expect_packed_alike(self, v: PackedSequence, name: str) -> None:
        """Of something that is packed as the input is."""
        if not torch.equal(v.batch_sizes, self.source.batch_sizes):
            raise ValueError(f"{name} must be packed with the input's lengths: its batch_sizes differ")
        orders = [s.sorted_indices for s in (self.source, v)]
        known = [order for order in orders if order is not None]
        if len(known) == 1 or (len(known) == 2 and not torch.equal(*known)):
            raise ValueError(f"{name} must be packed in the input's order of rows: its sorted_indices differ")

    def reset_mask(self, reset: Tensor | PackedSequence) -> Tensor:
        """`reset` in the input's layout as [T, B]."""
        if self.packed:
            if not isinstance(reset, PackedSequence):
                raise TypeError(f"with a PackedSequence, reset must be one too, got {type(reset).__name__}")
            self.expect_packed_alike(reset, "reset")
            return self.pad(_marks(reset.data))
        if not isinstance(reset, Tensor):
            way = "" if isinstance(reset, PackedSequence) else "; pass torch.as_tensor(reset)"
            raise TypeError(f"reset must be a tensor of 0 and 1 in the input's layout, got {type(reset).__name__}{way}")
        lead = 1 if self.dims == 2 else 2
        wanted: tuple[int, ...]
        if reset.dim() == lead + 1 and reset.shape[-1] == 1:
            reset = reset.squeeze(-1)
        if self.dims == 2:
            wanted, form = (self.steps,), "[T]"
        elif self.batch_first:
            wanted, form = (self.rows, self.steps), "[B, T]"
        else:
            wanted, form = (self.steps, self.rows), "[T, B]"
        if tuple(reset.shape) != wanted:
            raise ValueError(f"reset must be {form} = {list(wanted)} as the input, got {list(reset.shape)}")
        if self.dims == 2:
            return reset.unsqueeze(1)
        return reset.transpose(0, 1) if self.batch_first else reset

    def states_to_internal(self, state: Tensor | None) -> Tensor | None:
        """A state as the caller holds it -> [L·D, B, N] in our order of rows."""
        if state is None:
            return None
        if self.packed:
            order = self.source.sorted_indices
            return state if order is None else state.index_select(1, order)
        return state.unsqueeze(1) if self.dims == 2 else state

    def states_to_caller(self, state: Tensor) -> Tensor:
        """[L·D, B, N] in our order of rows -> as the caller holds it."""
        if self.packed:
            order = self.source.unsorted_indices
            return state if order is None else state.index_select(1, order)
        return state.squeeze(1) if self.dims == 2 else state

    def output(self, y: Tensor) -> Tensor | PackedSequence:
        """[T, B, N] -> the input's layout."""
        if self.packed:
            return PackedSequence(
                self._pack(y), self.source.batch_sizes, self.source.sorted_indices, self.source.unsorted_indices
            )
        if self.dims == 2:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def all_states(self, states: Tensor) -> Tensor:
        """[L·D, T, B, N] -> [L·D, B, T, N] with batch_first, [L·D, T, N] unbatched; packed: the caller's rows."""
        if self.dims == 2 and not self.packed:
            return states.squeeze(2)
        if self.packed and self.source.unsorted_indices is not None:
            states = states.index_select(2, self.source.unsorted_indices)
        return states.transpose(1, 2) if self.batch_first else states


class JaggedLayout(Layout):
    """A nested tensor [B, j, I] of layout torch.jagged: values [sum of lengths, I] and offsets [B + 1].

    Its ragged dimension says which one is time, so `batch_first` concerns the layout of `all_states` alone, as with a
    PackedSequence. The longest row is looked up, which waits for a GPU; the same look says whether each value lies in a
    row. Compiled code does not ask that: there a value outside touches nothing, and its output is zero.
    """

    def __init__(self, input: Tensor, batch_first: bool) -> None:
        self.batch_first, self.packed, self.dims = batch_first, False, 3
        self.offsets: Tensor = input.offsets()  # type: ignore[attr-defined]
        values: Tensor = input.values()
        lengths = self.offsets.diff()
        self.lengths, self.rows = lengths, lengths.shape[0]
        self.count = values.shape[0]
        self.shortest, self.longest = _extremes(lengths, self.offsets, self.count)
        self.steps = max(self.longest, 1)  # rows may all be empty
        place = torch.arange(self.count, device=values.device)
        row = torch.searchsorted(self.offsets, place, right=True) - 1
        self.index = (place - self.offsets[row]) * self.rows + row
        self.outside: Tensor | None = None  # [sum of lengths] of bool, where nobody has looked
        if torch.compiler.is_compiling():
            self.outside = (row < 0) | (row >= self.rows)
            self.index = self.index.where(~self.outside, self.steps * self.rows)
        self.x = self.pad(values)

    def pad(self, data: Tensor) -> Tensor:
        if self.outside is None:
            return super().pad(data)
        blank = data.new_zeros((self.steps * self.rows + 1, *data.shape[1:]))  # the last is for what lies outside
        return blank.index_copy(0, self.index, data)[:-1].view(self.steps, self.rows, *data.shape[1:])  # type: ignore[arg-type]

    def _pack(self, y: Tensor) -> Tensor:
        if self.outside is None:
            return super()._pack(y)
        return F.pad(y.flatten(0, 1), (0, 0, 0, 1)).index_select(0, self.index)  # type: ignore[arg-type]

    def dropout(self, y: Tensor, p: float) -> Tensor:
        """Drawn over the values, as for a PackedSequence."""
        return self.pad(F.dropout(self._pack(y), p))

    def reset_mask(self, reset: Tensor | PackedSequence) -> Tensor:
        """`reset`, nested as the input is, [B, j] or [B, j, 1], as [T, B]."""
        if not (isinstance(reset, Tensor) and reset.is_nested and reset.layout is torch.jagged):
            got = reset.layout if isinstance(reset, Tensor) else type(reset).__name__
            raise TypeError(f"with a nested input, reset must be nested too, of layout torch.jagged, got {got}")
        self.expect_nested_alike(reset, "reset")
        return self.pad(_marks(reset.values()))

    def expect_nested_alike(self, v: Tensor, name: str) -> None:
        """Of something that is nested as the input is."""
        if not torch.compiler.is_compiling() and not torch.equal(v.offsets(), self.offsets):  # type: ignore[attr-defined]
            raise ValueError(f"{name} must be nested with the input's lengths: its offsets differ")
        values: Tensor = v.values()
        if values.shape[0] != self.count:
            raise ValueError(f"{name} must have {self.count} values as the input, got {values.shape[0]}")

    def output(self, y: Tensor) -> Tensor:
        """[T, B, N] -> [B, j, N] with the input's offsets, so that it meets other tensors that have them."""
        values = self._pack(y)
        if self.shortest is None:
            return nested_tensor_from_jagged(values, self.offsets)
        return nested_tensor_from_jagged(values, self.offsets, min_seqlen=self.shortest, max_seqlen=self.longest)


def _extremes(lengths: Tensor, offsets: Tensor, count: int) -> tuple[int | None, int]:
    """The shortest length and the longest, in one look at the device, where each of `count` values lies in a row.
    Compiled code looks for the longest alone."""
    if torch.compiler.is_compiling():
        return None, int(lengths.max()) if lengths.shape[0] else 0
    shortest, longest = lengths.aminmax() if lengths.shape[0] else (lengths.sum(), lengths.sum())
    least, most, first, last = torch.stack([shortest, longest, offsets[0], offsets[-1]]).tolist()
    if first != 0 or last != count:
        raise BadValue(
            f"the offsets of a nested input must go from 0 to {count}, the number of its values, got {first} to "
            f"{last}; pass nested_tensor_from_jagged(values[offsets[0]:offsets[-1]], offsets - offsets[0])"
        )
    if least < 0:
        raise BadValue(f"the offsets of a nested input must not decrease, got a row of {least} steps")
    return (least, most) if lengths.shape[0] else (None, 0)


def layout_of(input: Tensor | PackedSequence, batch_first: bool) -> Layout:
    """How `input` is laid out."""
    nested = isinstance(input, Tensor) and input.is_nested
    return JaggedLayout(input, batch_first) if nested else Layout(input, batch_first)  # type: ignore[arg-type]


def _marks(data: Tensor) -> Tensor:
    """The values of a ragged `reset`, [sum of lengths] or [sum of lengths, 1], in a dtype that every operator knows,
    unlike float8 and uint16. They hold 0 and 1."""
    if data.dtype != torch.bool and not data.is_complex():
        data = data.float()
    return data.squeeze(-1) if data.dim() == 2 and data.shape[-1] == 1 else data
