"""A second stream of a GPU, on which a layer's reverse direction runs beside its forward one.

`side.work()` launches beside the stream that was current, after all that was launched there before; `side.join()` has
that stream, `main`, wait. So to everybody else it is as if `main` had done it. Autograd runs a node's backward on the
stream of its forward, and makes that stream wait for what it is given and others for what it gives; `layer.autograd`
joins again at the end of the node's backward, for the reason below. All of it is recorded by a CUDA graph as a fork and
a join.

Memory. torch's allocator gives a block to whoever asks next on the stream that it was made for, and knows nothing of
other streams that use it. What `main` made and `side` reads (x, states, weights) is held by the caller until the join
of the forward, and by autograd until that of the backward: what gets the block after that is launched on `main` after
the join. Without the second join it could be freed between the two, and written while `side` still reads. What `side`
made and `main` reads (outputs, and gradients that the user gets) comes to `side` again only for work after the next
fork, or after gradients that came from `main`: after all that `main` was given while the block was in use. That needs
a side for each `main`, and for each thread, whose forks come when others are between theirs and their use (one that has
ended leaves its side to the next with this `main`); and a stream that nobody else has. torch hands out the same 32 of a
priority in turn: so they are of the high one, which few programs ask for, a stream is one side's for good, and where
none is left there is no side, and the directions go one after the other. `record_stream` would do too, but such a block
is free only when the GPU has come to its end of use, and a host that runs ahead takes another.

What runs on both does not wait for the other to get multiprocessors, or two might wait for one another for ever. So a
backend says whether it may (`Backend.concurrent_directions`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


class SideStream:
    """A stream beside `main`, and the two events by which they meet; kept, since making them takes longer."""

    def __init__(self, main: torch.cuda.Stream, stream: torch.cuda.Stream) -> None:
        self.main, self.stream, self.thread = main, stream, threading.current_thread()
        self._begun, self._done = torch.cuda.Event(), torch.cuda.Event()

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """What is launched and made in this block and thread is the side's; it begins after what `main` was given."""
        self._begun.record(self.main)
        self.stream.wait_event(self._begun)
        _thread.current = self
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            _thread.current = None

    def join(self) -> None:
        """What `main` is given from now on begins after what the side was given."""
        self._done.record(self.stream)
        self.main.wait_event(self._done)


Key = tuple[int | None, int]
"""Of a stream: its device's index, and its number there."""


class _Thread(threading.local):
    current: SideStream | None = None

    def __init__(self) -> None:
        self.sides: dict[Key, SideStream | None] = {}  # by the main stream; None: there is no stream left for one


_thread = _Thread()
_every: dict[Key, SideStream] = {}  # all threads' sides, by their own streams
_lock = threading.Lock()
_POOL = 32  # streams of a priority, on each device


def on_gpu(v: Tensor) -> bool:
    """Whether it has streams."""
    return v.is_cuda


def side_stream_of(v: Tensor) -> SideStream | None:
    """The side of the current stream of a tensor's device; None where no stream is left for one."""
    main = torch.cuda.current_stream(v.device)
    key = (v.device.index, main.stream_id)
    if key not in _thread.sides:
        with _lock:
            _thread.sides[key] = _claim_side_stream(key, main)
    return _thread.sides[key]


def _claim_side_stream(key: Key, main: torch.cuda.Stream) -> SideStream | None:
    """One that an ended thread has left, or a new one with the first stream that is nobody's."""
    if key in _every:  # a user has come by the stream of a side
        return None
    for (device, _), side in _every.items():
        if (device, side.main.stream_id) == key and not side.thread.is_alive():
            side.thread = threading.current_thread()
            return side
    for _ in range(_POOL):
        stream = torch.cuda.Stream(main.device, priority=-1)
        own = (key[0], stream.stream_id)
        if own != key and own not in _every:
            _every[own] = side = SideStream(main, stream)
            return side
    return None


def current_side_stream() -> SideStream | None:
    """The side that this thread launches on at the moment."""
    return _thread.current
