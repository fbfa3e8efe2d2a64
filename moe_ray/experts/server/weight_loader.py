"""How a replica comes by its weights: the first layer at once, the others while it serves, from disk or from a peer.

The checkpoint is read a layer at a time; meanwhile a thread looks for a replica that holds the same. If there is one, a
layer is taken from its memory, and from then on each comes from where the last one came faster.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final, Literal

from moe_ray.core import ExpertKey, ReplicaInfo, WeightLayout
from moe_ray.errors import CallRefused, MoeRayError, TransportError
from moe_ray.experts.server.expert_memory import NO_LIMITS, ExpertMemory
from moe_ray.experts.server.offload import Offload
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.compute import Compute
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.weight_transfer import WeightsLink

logger = logging.getLogger(__name__)

CARRIER: Final = "weights"
"""Under which name `ReplicaInfo.addresses` has the address of a replica's `WeightsServer`."""
CLOSE_S: Final = 5.0
Source = Literal["checkpoint", "peer"]
FindPeers = Callable[[], Sequence[ReplicaInfo]]
"""Asks, for a second or so, who serves the same keys. Raises a `MoeRayError` when it cannot be known."""


class FasterSource:
    """Which source to take the next key from: each is tried once, then the one whose last key came faster."""

    def __init__(self) -> None:
        self._rates: dict[Source, float] = {}  # bytes/s

    def next(self, has_peer: bool) -> Source:
        """Choose; `has_peer`: whether there is a peer to ask."""
        if not has_peer:
            return "checkpoint"
        untried: list[Source] = [source for source in ("checkpoint", "peer") if source not in self._rates]
        return untried[0] if untried else max(self._rates, key=lambda source: self._rates[source])

    def took(self, source: Source, nbytes: int, seconds: float) -> None:
        """Note that a key of so many bytes came in this time."""
        self._rates[source] = nbytes / max(seconds, 1e-9)


def peer_of(found: Sequence[ReplicaInfo], replica_id: str, node_id: str, keys: Collection[ExpertKey]) -> str | None:
    """Return where to ask for the weights of `keys`: of another replica that has them all, on this node if any."""
    able = [
        info
        for info in found
        if info.replica_id != replica_id and not info.loading and CARRIER in info.addresses and info.keys >= set(keys)
    ]
    near = [info for info in able if info.node_id == node_id] or able
    return random.choice(near).addresses[CARRIER] if near else None


class WeightLoader:
    """Loads one replica: the first layer in the constructor, the others on a thread of its own, from `start` on."""

    def __init__(
        self,
        name: str,
        reader: ExpertReader,
        hidden_size: int,
        compute: Compute,
        native_dir: Path | None = None,
        memory: ExpertMemory = NO_LIMITS,
    ) -> None:
        """Load the first layer. `reader` is used by this object alone from now on. Raises `CheckpointError`.

        `native_dir` as in `ExpertWorker`. Raises `OverBudget` where the layers would take more than `memory` says.
        """
        self._began = time.perf_counter()
        self._name, self._reader = name, reader
        self._offload = Offload(name, reader.keys, memory, compute)
        self._source = FasterSource()
        self._prints: dict[ExpertKey, bytes] = {}
        self._ended, self._closed = threading.Event(), threading.Event()
        self._peer: WeightsLink | None = None
        self.bytes_from_peers = 0
        self.failure: Exception | None = None
        """Why loading ended before it was done."""
        first = [key for key in reader.keys if key[0] == reader.keys[0][0]]
        ffn = ExpertFFN({key: self._offload.settle(key, self._read(key)) for key in first})
        self.worker = ExpertWorker(ffn, hidden_size, compute, reader.keys, native_dir=native_dir)
        self._first_s = time.perf_counter() - self._began
        self._thread = threading.Thread(target=self._run, name="expert-arrival", daemon=True)

    @property
    def loading(self) -> bool:
        """Whether more keys are to be expected."""
        return not self._ended.is_set()

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the checkpoint."""
        return self._reader.bytes_read

    @property
    def num_keys(self) -> int:
        """Keys that the replica holds in the end."""
        return len(self._reader.keys)

    def start(self, find: FindPeers, replica_id: str, node_id: str, options: LinkOptions) -> None:
        """Load the other layers in the background, while `find` looks for a peer on a thread of its own."""

        def search() -> None:
            try:
                address = peer_of(find(), replica_id, node_id, self._reader.keys)
                if address is not None and self.loading:
                    self._peer = WeightsLink(address, options)
                if not self.loading:
                    self._drop_peer()
            except MoeRayError as error:
                logger.info("%s: no peer to take weights from: %s", self._name, error)

        if self.num_keys > len(self.worker.keys):
            threading.Thread(target=search, name="peer-search", daemon=True).start()
        self._thread.start()

    def offer(self, key: ExpertKey, layout: WeightLayout, fingerprint: bytes) -> list[memoryview]:
        """`transport.weight_transfer.Offer` of what is loaded."""
        if layout != self._reader.layout:
            raise CallRefused(f"held as {self._reader.layout}, not as {layout}")
        if key not in self.worker.keys:
            raise CallRefused(f"layer {key[0]} expert {key[1]} is not held by this replica")
        if fingerprint != self._prints[key]:
            raise CallRefused(f"layer {key[0]} expert {key[1]} is of another checkpoint here")
        return self.worker.buffers(key)

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is loading any more; False after `timeout_s`."""
        return self._ended.wait(timeout_s)

    def stop(self) -> None:
        """Load no more; what is loaded is served on. Waits for nothing. Idempotent."""
        self._closed.set()
        self._drop_peer()

    def close(self) -> None:
        """`stop`, and wait until the layer that is being read is there. Idempotent."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        self._offload.close()

    def _run(self) -> None:
        try:
            for key in self._reader.keys:
                if self._closed.is_set():
                    break
                if key not in self.worker.keys:
                    self.worker.add(key, self._offload.settle(key, self._load(key)))
        except Exception as error:  # whatever it is: `failure` tells Serve, which replaces this replica
            self.failure = error
            logger.exception("%s: loading ended after %d of %d keys", self._name, len(self.worker.keys), self.num_keys)
        finally:
            self._ended.set()
            self._drop_peer()
            self._reader.close()
        logger.info(
            "%s: %d of %d keys after %.2f s, the first layer's after %.2f s: read %d bytes of the checkpoint (its own "
            "tensors only) and %d of a peer's memory",
            *(self._name, len(self.worker.keys), self.num_keys, time.perf_counter() - self._began, self._first_s),
            *(self.bytes_read, self.bytes_from_peers),
        )

    def _load(self, key: ExpertKey) -> FFN:
        peer = self._peer
        if peer is not None and self._source.next(has_peer=True) == "peer":
            try:
                return self._ask(peer, key)
            except TransportError as error:
                self._drop_peer()
                logger.warning("%s: the rest is read from the checkpoint: %s", self._name, error)
        return self._read(key)

    def _drop_peer(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.close()  # wakes the loading thread, if it waits for it

    def _read(self, key: ExpertKey) -> FFN:
        began = time.perf_counter()
        ffn = self._reader.read(key)
        self._source.took("checkpoint", ffn.nbytes, time.perf_counter() - began)
        self._prints[key] = self._reader.fingerprint(key)
        return ffn

    def _ask(self, peer: WeightsLink, key: ExpertKey) -> FFN:
        fingerprint = self._reader.fingerprint(key)
        began = time.perf_counter()
        blank = self._reader.blank(key)
        peer.read(key, self._reader.layout, fingerprint, blank.buffers)
        ffn = blank.make()
        self._source.took("peer", ffn.nbytes, time.perf_counter() - began)
        self._prints[key] = fingerprint
        self.bytes_from_peers += ffn.nbytes
        return ffn
