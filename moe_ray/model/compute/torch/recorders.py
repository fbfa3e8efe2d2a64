"""Records what a function launches on a device, to launch it again at once: CUDA graphs, or their contract on a CPU."""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch

logger = logging.getLogger(__name__)

Tensors = tuple[torch.Tensor, ...]


class Recording(Protocol):
    """What was recorded. The memory of its inputs and outputs stays the same."""

    @property
    def outputs(self) -> Tensors:
        """What the function returned: filled anew by each replay, and undefined before the first."""
        ...

    def replay(self) -> None:
        """Do it again, on what is in its inputs' memory by now. Returns before a card has finished."""
        ...

    def release(self) -> None:
        """Give the memory of the outputs back to the pool: what is recorded in it from now on may have the same.

        The outputs stay where they are, and are undefined again once such a one is replayed.
        """
        ...


class RecordingPool(Protocol):
    """Memory of recordings. A replay leaves undefined what was free in its pool when it was recorded."""

    @property
    def nbytes(self) -> int:
        """Bytes that it has taken so far."""
        ...


class Recorder(Protocol):
    """Records on one device."""

    def pool(self) -> RecordingPool:
        """A new one."""
        ...

    def record(self, run: Callable[[], Tensors], pool: RecordingPool | None = None) -> Recording:
        """Record `run`, which has run before and neither waits for the device nor depends on what is computed there.

        `pool`: of `pool()`; None: one of all such recordings, whose outputs have their memory for good. Raises
        `RuntimeError` for what cannot be recorded.
        """
        ...


class _CudaPool:
    """The pool of a CUDA graph, which all others have that are recorded in it."""

    def __init__(self) -> None:
        self.first: torch.cuda.CUDAGraph | None = None
        """Kept for as long as the pool is used: torch asks for a graph that is alive."""
        self.nbytes = 0


class CudaRecorder:
    """CUDA graphs. What lies between a graph's inputs and outputs is used again by all of its pool.

    Callable from several threads; what they launch and replay goes to one stream.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """One capture at a time is all that torch allows a process."""
        self._common = _CudaPool()
        self._stream: torch.cuda.Stream | None = None

    def pool(self) -> RecordingPool:
        return _CudaPool()

    def record(self, run: Callable[[], Tensors], pool: RecordingPool | None = None) -> Recording:
        taken = self._common if pool is None else pool
        assert isinstance(taken, _CudaPool), "a pool of another recorder"
        with self._lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            graph = torch.cuda.CUDAGraph()
            before = torch.cuda.memory_reserved()
            outputs = self._captured(graph, taken.first and taken.first.pool(), self._stream, run)
            taken.nbytes += max(0, torch.cuda.memory_reserved() - before)
            taken.first = taken.first or graph
        return _CudaGraph(graph, outputs)

    @staticmethod
    def _captured(
        graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream, run: Callable[[], Tensors]
    ) -> Tensors:
        """Not by `torch.cuda.graph`, which waits for the card and gives its free memory back each time."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # thread_local: other threads of the process (a copy of weights, say) may go on using the card meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                outputs = run()
            except BaseException:
                with suppress(RuntimeError):  # what went wrong in between is told, and not that this is no graph
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return outputs


class _CudaGraph:
    """`Recording` of a CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Tensors) -> None:
        self._graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        # Free for torch's allocator, which uses it for later captures of the pool alone: its graphs are alive.
        try:
            self.outputs = tuple(map(unowned, self.outputs))
        except (RuntimeError, TypeError) as error:  # then they keep it, and recordings take more
            logger.warning("recorded steps do not share the memory of their outputs (%s)", error)


class _Memory:
    """Bytes of a card, as libraries hand them to each other."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            **{"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3},
        }


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements in the same memory, which may be given to others meanwhile."""
    if not tensor.numel():
        return tensor
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    address, nbytes = tensor.data_ptr(), elements * tensor.itemsize
    if tensor.is_cuda:
        memory = torch.as_tensor(_Memory(address, nbytes), device=tensor.device)
    else:
        memory = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
    if memory.data_ptr() != address:
        raise RuntimeError("torch copies memory that it is to share")
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


class CallRecorder:
    """Where a device has no graphs: a replay calls the function again, and copies into the memory of the first call."""

    def pool(self) -> RecordingPool:
        return _CallPool()

    def record(self, run: Callable[[], Tensors], pool: RecordingPool | None = None) -> Recording:
        taken = _CallPool() if pool is None else pool
        assert isinstance(taken, _CallPool), "a pool of another recorder"
        return _Calls(run, taken)


class _CallPool:
    """`RecordingPool` of a CPU's memory."""

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []
        """uint8 arrays that no tensor has."""
        self._taken: list[np.ndarray] = []

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._taken)

    def empty_like(self, like: torch.Tensor) -> torch.Tensor:
        """In memory that is free again when the tensor, and all views of it, are gone."""
        if not like.nbytes:
            return torch.empty_like(like)
        fits = [at for at, each in enumerate(self.free) if each.nbytes >= like.nbytes]
        if fits:
            memory = self.free.pop(min(fits, key=lambda at: self.free[at].nbytes))
        else:
            memory = np.empty(like.nbytes, np.uint8)
            self._taken.append(memory)
        part = memory[: like.nbytes]
        weakref.finalize(part, self.free.append, memory)  # the tensor's storage keeps it
        return torch.from_numpy(part).view(like.dtype).view(like.shape)


class _Calls:
    """`Recording` of a function."""

    def __init__(self, run: Callable[[], Tensors], pool: _CallPool) -> None:
        self._run = run
        self.outputs = tuple(pool.empty_like(each) for each in run())
        self._scratch = list(pool.free)
        for each in self.outputs:
            each.view(-1).view(torch.uint8).fill_(UNDEFINED)

    def replay(self) -> None:
        for memory in self._scratch:
            memory.fill(UNDEFINED)
        for held, made in zip(self.outputs, self._run(), strict=True):
            held.copy_(made)

    def release(self) -> None:
        self.outputs = tuple(map(unowned, self.outputs))


UNDEFINED = 0xFF
"""Bytes of what nothing may go on computing with: of floats that are no numbers, and of -1."""
