"""The adapters that one engine holds: loaded when a request first needs them, given up when others need the room.

All methods belong to the engine's thread; files are read, and experts waited for, on threads beside it.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from moe_ray.core import AdapterRef
from moe_ray.errors import AdapterError, AdapterUnavailable, MoeRayError
from moe_ray.model.lora.adapter_file import Adapter, read_adapter
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.moe import Experts

logger = logging.getLogger(__name__)

LOADERS: Final = 4
"""Adapters that are loaded at a time."""


class AdapterHolder(Protocol):
    """The experts, as far as they hold parts of adapters."""

    def hold(self, adapter: AdapterRef) -> None:
        """Return once every key of the model has a replica that holds the adapter; it may take long.

        Raises `AdapterUnavailable`. From any thread.
        """
        ...

    def drop(self, adapter_id: int) -> None:
        """Have replicas forget an adapter, soon. From any thread; raises nothing."""
        ...


class HoldingExperts(Experts, AdapterHolder, Protocol):
    """Experts that hold their parts of adapters."""


class AdapterPlace(Protocol):
    """Where an engine puts the trunk's parts: `model.trunk.Trunk`."""

    config: ModelConfig

    def add_adapter(self, adapter: Adapter) -> None: ...
    def remove_adapter(self, adapter_id: int) -> None: ...


@dataclass(slots=True, eq=False)
class _Loading:
    ref: AdapterRef
    ready: Future[None]
    loaded: Future[Adapter] | None = None
    """None: it waits for room."""


class AdapterShelf:
    """At most `most` adapters, those that were not used for longest given up first."""

    def __init__(
        self,
        place: AdapterPlace,
        holder: AdapterHolder | None = None,
        most: int = 16,
        most_rank: int = 256,
        locate: Callable[[str], Path] = Path,
    ) -> None:
        """`holder`: None where adapters that touch experts are refused. `locate`: from a source to its directory."""
        self._place, self._holder, self._most = place, holder, most
        self._most_rank, self._locate = most_rank, locate
        self._held: OrderedDict[int, None] = OrderedDict()
        self._users: Counter[int] = Counter()
        self._loading: dict[int, _Loading] = {}
        self._waiting: deque[_Loading] = deque()
        self._unwanted: set[int] = set()
        """To be dropped once nobody uses them."""
        self._threads = ThreadPoolExecutor(LOADERS, thread_name_prefix="adapter-load")
        self._wake: Callable[[], None] = _nobody_waits

    @property
    def held(self) -> list[int]:
        """Ids of the adapters that can be computed with; callable from any thread."""
        return list(self._held)

    def use(self, adapter: AdapterRef) -> Future[None] | None:
        """Count a user of an adapter until `release`, and load it; None where it is there.

        The future ends when `settle` has put it in its place, or with a `MoeRayError`.
        """
        self._users[adapter.adapter_id] += 1
        self._unwanted.discard(adapter.adapter_id)
        if adapter.adapter_id in self._held:
            self._held.move_to_end(adapter.adapter_id)
            return None
        entry = self._loading.get(adapter.adapter_id)
        if entry is None:
            entry = self._loading[adapter.adapter_id] = _Loading(adapter, Future())
            self._waiting.append(entry)
            self._begin()
        return entry.ready

    def preload(self, adapter: AdapterRef) -> None:
        """Load an adapter that nobody uses yet, if there is room."""
        if len(self._held) + len(self._loading) < self._most:
            self.use(adapter)
            self.release(adapter.adapter_id)

    def release(self, adapter_id: int) -> None:
        """End one use."""
        self._users[adapter_id] -= 1
        if not self._users[adapter_id]:
            del self._users[adapter_id]
            if adapter_id in self._unwanted:
                self.drop(adapter_id)
            self._begin()

    def drop(self, adapter_id: int) -> None:
        """Forget an adapter, as soon as nobody uses it."""
        if self._users[adapter_id] or adapter_id in self._loading:
            self._unwanted.add(adapter_id)
            return
        self._unwanted.discard(adapter_id)
        if adapter_id in self._held:
            self._remove(adapter_id)
            self._begin()

    def settle(self) -> None:
        """Put what was loaded in its place. Between two steps."""
        for adapter_id, entry in list(self._loading.items()):
            if entry.loaded is None or not entry.loaded.done():
                continue
            del self._loading[adapter_id]
            try:
                self._place.add_adapter(entry.loaded.result())
            except MoeRayError as error:
                logger.warning("an adapter cannot be loaded: %s", error)
                entry.ready.set_exception(error)
            except Exception as error:
                logger.exception("an adapter cannot be loaded: an internal fault")
                entry.ready.set_exception(error)
            else:
                self._held[adapter_id] = None
                entry.ready.set_result(None)
                if adapter_id in self._unwanted:
                    self.drop(adapter_id)
        self._begin()

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, on any thread, whenever `settle` has something to do."""
        self._wake = wake

    @property
    def arriving(self) -> list[Future[Adapter]]:
        """What is being loaded; `settle` has something to do as soon as one of them is done."""
        return [entry.loaded for entry in self._loading.values() if entry.loaded is not None]

    def close(self) -> None:
        """Load no more. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        """Load those that wait for room, as far as there is some."""
        while self._waiting and self._has_room():
            entry = self._waiting.popleft()
            entry.loaded = self._threads.submit(self._read, entry.ref)
            entry.loaded.add_done_callback(lambda _: self._wake())

    def _has_room(self) -> bool:
        loading = sum(entry.loaded is not None for entry in self._loading.values())
        while len(self._held) + loading >= self._most:
            idle = next((each for each in self._held if not self._users[each]), None)
            if idle is None:
                return False
            self._remove(idle)
        return True

    def _remove(self, adapter_id: int) -> None:
        del self._held[adapter_id]
        self._place.remove_adapter(adapter_id)
        if self._holder is not None:
            self._holder.drop(adapter_id)

    def _read(self, ref: AdapterRef) -> Adapter:
        """On a thread of its own."""
        try:
            adapter = read_adapter(self._locate(ref.source), self._place.config, self._most_rank)
            if adapter.adapter_id != ref.adapter_id:
                raise AdapterError("its files have changed since it was registered")
            if any(map(adapter.touches_experts, range(self._place.config.num_hidden_layers))):
                if self._holder is None:
                    raise AdapterError("it changes experts, and those of this engine hold no adapters")
                self._holder.hold(ref)
        except AdapterError as error:
            raise AdapterUnavailable(f"adapter {ref.source}: {error}") from None
        return adapter


def _nobody_waits() -> None:
    """For an engine that is stepped by who submits."""
