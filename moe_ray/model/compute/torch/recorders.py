"""Records what a function launches on a device, to launch it again at once: CUDA graphs, or their contract on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

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


class Recorder(Protocol):
    """Records on one device."""

    def record(self, run: Callable[[], Tensors]) -> Recording:
        """Record `run`, which has run before and neither waits for the device nor depends on what is computed there.

        Raises `RuntimeError` for what cannot be recorded.
        """
        ...


class CudaRecorder:
    """CUDA graphs. They share one pool of memory: outputs have theirs for good, what lies between is used again.

    Callable from several threads; what they launch and replay goes to one stream.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """One capture at a time is all that torch allows a process."""
        self._first: torch.cuda.CUDAGraph | None = None
        """Whose pool all others use."""
        self._stream: torch.cuda.Stream | None = None

    def record(self, run: Callable[[], Tensors]) -> Recording:
        with self._lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            pool = None if self._first is None else self._first.pool()
            graph = torch.cuda.CUDAGraph()
            outputs = self._captured(graph, pool, self._stream, run)
            self._first = self._first or graph
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


class CallRecorder:
    """Where a device has no graphs: a replay calls the function again, and copies into the memory of the first call."""

    def record(self, run: Callable[[], Tensors]) -> Recording:
        return _Calls(run)


class _Calls:
    """`Recording` of a function."""

    def __init__(self, run: Callable[[], Tensors]) -> None:
        self._run = run
        self.outputs = tuple(torch.empty_like(each).fill_(_undefined(each)) for each in run())

    def replay(self) -> None:
        for held, made in zip(self.outputs, self._run(), strict=True):
            held.copy_(made)


def _undefined(like: torch.Tensor) -> float | int:
    """What nothing may go on computing with, as what a graph has not filled yet."""
    return float("nan") if like.is_floating_point() else -1
