"""A second stream of a GPU, on which a layer's reverse direction runs beside its forward one.

`side.work()` launches beside the stream that was current, after all that was launched there before; `side.join()` has
that stream, `main`, wait. So to everybody else it is as if `main` had done it. Autograd runs a node's backward on the
stream of its forward, and makes that stream wait for what it is given and others for what it gives; `ops` joins again
at the end of the node's backward, for the reason below. All of it is recorded by a CUDA graph as a fork and a join.

Memory. torch's allocator gives a block to whoever asks next on the stream that it was made for, and knows nothing of
other streams that use it. What `main` made and `side` reads (x, states, weights) is held by the caller until the join
of the forward, and by autograd until that of the backward: what gets the block after that is launched on `main` after
the join. Without the second join it could be freed between the two, and written while `side` still reads. What `side`
made and `main` reads (outputs, and gradients that the user gets) comes to `side` again only for work after the next
fork, or after gradients that came from `main`: after all that `main` was given while the block was in use. That needs
a side for each `main`, and for each thread, whose forks come when others are between theirs and their use; and streams
that no user has: torch hands out the same 32 of a priority in turn, so they are of the high one. `record_stream` would
do too, but such a block is free only when the GPU has come to its end of use, and a host that runs ahead takes another.

What runs on both does not wait for the other to get multiprocessors, or two might wait for one another for ever. So a
backend says whether it may (`Backend.overlaps`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


class Side:
    """A stream beside `main`, and the two events by which they meet; kept, since making them takes longer."""

    def __init__(self, main: torch.cuda.Stream) -> None:
        self.main = main
        self.stream = torch.cuda.Stream(main.device, priority=-1)
        self._begun, self._done = torch.cuda.Event(), torch.cuda.Event()

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """What is launched and made in this block and thread is the side's; it begins after what `main` was given."""
        self._begun.record(self.main)
        self.stream.wait_event(self._begun)
        _thread.here = self
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            _thread.here = None

    def join(self) -> None:
        """What `main` is given from now on begins after what the side was given."""
        self._done.record(self.stream)
        self.main.wait_event(self._done)


class _Thread(threading.local):
    here: Side | None = None

    def __init__(self) -> None:
        self.sides: dict[tuple[int | None, int], Side] = {}  # by device and main stream


_thread = _Thread()


def on_gpu(v: Tensor) -> bool:
    """Whether it has streams."""
    return v.is_cuda


def beside(v: Tensor) -> Side:
    """The side of the current stream of a tensor's device."""
    main = torch.cuda.current_stream(v.device)
    key = (v.device.index, main.stream_id)
    side = _thread.sides.get(key)
    if side is None:
        side = _thread.sides[key] = Side(main)
    return side


def here() -> Side | None:
    """The side that this thread launches on at the moment."""
    return _thread.here
