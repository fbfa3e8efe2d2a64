"""Copies of weights from the host's memory to a device while it computes: streams on a card, a thread on a CPU.

All that is known of streams and events is here: `LayerStream` orders copies and products by marks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

Mark = TypeVar("Mark")
"""A point in what a device does, which is reached sooner or later."""


class CopyEngine(Protocol[Mark]):
    """Copies in the order in which they are started, beside what is computed."""

    def hold(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Copies of `tensors` in memory of the host from which they can be copied beside computing."""
        ...

    def start(self, source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], after: Mark) -> Mark:
        """Copy each of `source` over its `target` once `after` is reached; returns at once, the mark is its end."""
        ...

    def wait(self, mark: Mark) -> None:
        """Have all that this thread computes from now on come after `mark`."""
        ...

    def mark(self) -> Mark:
        """The end of all that this thread has computed until now."""
        ...

    def close(self) -> None:
        """Return when no copy is under way any more; those that have not begun may be left out. Idempotent."""
        ...


class CudaCopies:
    """Copies from pinned memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def hold(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(each.cpu().pin_memory() for each in tensors)

    def start(
        self, source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], after: torch.cuda.Event
    ) -> torch.cuda.Event:
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for host, card in zip(source, target, strict=True):
                card.copy_(host, non_blocking=True)
        return self._stream.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(mark)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream().record_event()

    def close(self) -> None:
        self._stream.synchronize()


class ThreadCopies:
    """Copies by a thread: on a CPU, where products are done when the call returns."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "layer-copies")

    def hold(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(each.clone() for each in tensors)

    def start(
        self, source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], after: Future[None]
    ) -> Future[None]:
        return self._thread.submit(self._copy, source, target, after)

    def wait(self, mark: Future[None]) -> None:
        mark.result()

    def mark(self) -> Future[None]:
        reached: Future[None] = Future()
        reached.set_result(None)
        return reached

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _copy(self, source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], after: Future[None]) -> None:
        after.result()
        for host, buffer in zip(source, target, strict=True):
            buffer.copy_(host)


def copies_to(device: torch.device) -> CopyEngine[torch.cuda.Event] | CopyEngine[Future[None]]:
    """What copies to this device."""
    return CudaCopies(device) if device.type == "cuda" else ThreadCopies()
