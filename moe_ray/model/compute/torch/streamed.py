"""Layers of an expert that are in the host's memory, and are copied to the card for the calls that need them."""

from __future__ import annotations

import threading
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, runtime_checkable

import torch

from moe_ray.core import AdapterRows, ExpertKey
from moe_ray.errors import EngineError
from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.torch.copy_engine import CopyEngine, Mark
from moe_ray.model.compute.torch.expert import bytes_of
from moe_ray.model.lora.parts import ExpertPart

MOST_EXPECTED: Final = 4096
"""Calls that a stream remembers to be told of; those before are forgotten."""
IN_ORDER: Final = 3
"""Calls one after the other in ascending order from which on a stream that is told of calls guesses by order, too."""


@runtime_checkable
class Movable(FFN, Protocol):
    """A network whose weights may be elsewhere: networks of equal layout compute on each other's memory."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of its weights, as they are on its device."""
        ...

    def over(self, tensors: Sequence[torch.Tensor]) -> Movable:
        """A network of this kind without adapters over other memory of the layout of `tensors`."""
        ...


def layout_of(tensors: Sequence[torch.Tensor]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    """Shapes and dtypes: layers of one layout go through the same buffers."""
    return tuple((each.shape, each.dtype) for each in tensors)


def following(order: Sequence[ExpertKey], key: ExpertKey) -> ExpertKey:
    """The key that is fetched while `key` is computed: the next in the order, after the last the first.

    >>> following([(1, 0), (3, 0), (7, 0)], (7, 0))
    (1, 0)
    """
    return order[(order.index(key) + 1) % len(order)]


def buffer_for(held: Sequence[ExpertKey | None], keep: ExpertKey | None) -> int:
    """The buffer that is copied over next: the first that does not hold `keep`."""
    return next(number for number, key in enumerate(held) if key is None or key != keep)


@dataclass(slots=True)
class _Buffer(Generic[Mark]):
    """Memory on the card for one layer's weights."""

    tensors: tuple[torch.Tensor, ...]
    copied: Mark
    """The end of the last copy into it..."""
    read: Mark
    """...and of the last product with it."""
    key: ExpertKey | None = None
    """What it holds, once `copied` is reached."""


class LayerStream(Generic[Mark]):
    """Two buffers on a card through which layers go, of one expert or of several.

    While one layer is computed, another is copied: that of the next call it was told of (`expect`), else the one that
    follows in ascending order, after the last the first. A stream that is told of calls copies by order only where
    calls came in that order, as those of many rows do: of few rows the guess would be wrong, and a wrong copy holds up
    the right one. Callable from any thread, one call at a time.
    """

    def __init__(self, engine: CopyEngine[Mark], like: Sequence[torch.Tensor]) -> None:
        """`like`: the weights of one layer on the card, of which all others have shape and dtype."""
        self._engine = engine
        self._order: list[ExpertKey] = []
        self._expected: deque[ExpertKey] = deque(maxlen=MOST_EXPECTED)
        self._told = False
        self._last: ExpertKey | None = None
        self._in_order = 0
        """How many calls until now came in ascending order."""
        self._host: dict[ExpertKey, tuple[torch.Tensor, ...]] = {}
        self._lock = threading.Lock()
        self._closed = False
        now = engine.mark()
        self._buffers = tuple(_Buffer(tuple(map(torch.empty_like, like)), now, now) for _ in range(2))
        self.copies = 0
        """Layers copied to the card so far; more than `calls` where another was called than was expected."""
        self.calls = 0

    @property
    def buffers(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """The memory that layers are computed from."""
        return tuple(buffer.tensors for buffer in self._buffers)

    def take(self, key: ExpertKey, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Hold one more layer in the host's memory; `tensors` may go."""
        assert layout_of(tensors) == layout_of(self._buffers[0].tensors), f"{key} goes through buffers of others"
        held = self._engine.hold(tensors)
        with self._lock:
            self._host[key] = held
            insort(self._order, key)
        return held

    def expect(self, key: ExpertKey) -> None:
        """Be told of a call, of one of these layers or another, that will come after those that it was told of."""
        with self._lock:
            self._told = True
            if key in self._host:
                self._expected.append(key)

    def run(self, key: ExpertKey, compute: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """What `compute(buffer)` makes of a layer, once it is in that buffer; meanwhile the next one is copied.

        Raises `EngineError` after `close`.
        """
        with self._lock:
            if self._closed:
                raise EngineError("layers are not copied to the card any more: this replica is ending")
            self.calls += 1
            number = self._fetched(key, keep=None)
            self._engine.wait(self._buffers[number].copied)
            if (after := self._upcoming(key)) is not None:
                self._fetched(after, keep=key)
            try:
                return compute(number)
            finally:  # where it failed half way, a card may still read
                self._buffers[number].read = self._engine.mark()

    def refuse(self) -> None:
        """Take no more calls; returns when none is under way. Idempotent."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Copy no more; returns when no copy is under way. Idempotent."""
        self.refuse()
        self._engine.close()

    def _upcoming(self, key: ExpertKey) -> ExpertKey | None:
        """The layer to be copied while `key` is computed; None: nothing speaks for one of them."""
        if key in self._expected:  # calls before it were given up
            while self._expected.popleft() != key:
                pass
        in_order = self._last is not None and following(self._order, self._last) == key
        self._in_order = self._in_order + 1 if in_order else 1
        self._last = key
        told = next((each for each in self._expected if each != key), None)
        guessed = following(self._order, key) if not self._told or self._in_order >= IN_ORDER else None
        return told or guessed

    def _fetched(self, key: ExpertKey, keep: ExpertKey | None) -> int:
        """The buffer that holds a layer or is about to; a copy is started where none does."""
        held = [buffer.key for buffer in self._buffers]
        if key in held:
            return held.index(key)
        number = buffer_for(held, keep)
        buffer = self._buffers[number]
        buffer.copied = self._engine.start(self._host[key], buffer.tensors, buffer.read)
        buffer.key = key
        self.copies += 1
        return number


class LayerStreams(Generic[Mark]):
    """The streams of one process to one card: layers that are held alike share two buffers, whosever they are."""

    def __init__(self, engine: CopyEngine[Mark]) -> None:
        self._engine = engine
        self._streams: dict[tuple[tuple[torch.Size, torch.dtype], ...], LayerStream[Mark]] = {}
        self._lock = threading.Lock()

    def has(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether there are buffers for layers of the shapes and dtypes of `tensors`."""
        return layout_of(tensors) in self._streams

    def of(self, tensors: Sequence[torch.Tensor]) -> LayerStream[Mark]:
        """The stream for layers of the shapes and dtypes of `tensors`; its buffers are made with the first of them."""
        layout = layout_of(tensors)
        with self._lock:
            if layout not in self._streams:
                self._streams[layout] = LayerStream(self._engine, tensors)
            return self._streams[layout]

    def expect(self, key: ExpertKey) -> None:
        """`LayerStream.expect`, for whichever of them has the layer."""
        for stream in self._streams.values():
            stream.expect(key)

    @property
    def buffer_bytes(self) -> int:
        """On the card."""
        return sum(each.nbytes for stream in self._streams.values() for each in sum(stream.buffers, ()))

    def close(self) -> None:
        """Copy no more; returns when no copy is under way. Idempotent."""
        for stream in self._streams.values():
            stream.refuse()
        self._engine.close()


class StreamedFFN(Generic[Mark]):
    """`expert.FFN` of one layer in the host's memory."""

    def __init__(self, key: ExpertKey, network: Movable, stream: LayerStream[Mark]) -> None:
        """Take the weights of `network` off the card: it must not be used any more."""
        self._key, self._stream = key, stream
        self._views = tuple(map(network.over, stream.buffers))
        self._host = stream.take(key, network.tensors())
        self.nbytes = network.nbytes
        """In the host's memory; those of the buffers are not counted."""

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        """As `FFN.forward`, after the layer is copied where it was not expected."""
        return self._stream.run(self._key, lambda buffer: self._views[buffer].forward(rows, weights, adapters))

    def add_adapter(self, adapter_id: int, part: ExpertPart) -> None:
        for view in self._views:
            view.add_adapter(adapter_id, part)

    def remove_adapter(self, adapter_id: int) -> None:
        for view in self._views:
            view.remove_adapter(adapter_id)

    def has_adapter(self, adapter_id: int) -> bool:
        return all(view.has_adapter(adapter_id) for view in self._views)

    @property
    def adapter_bytes(self) -> int:
        return sum(view.adapter_bytes for view in self._views)

    def adapter_handle(self, adapter_id: int) -> int | None:
        return self._views[-1].adapter_handle(adapter_id)

    def buffers(self) -> list[memoryview]:
        return [bytes_of(each) for each in self._host]

    def entry(self) -> None:
        """None: it is computed through the interpreter."""
        return
