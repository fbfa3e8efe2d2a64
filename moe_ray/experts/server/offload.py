"""What of a replica's layers stays in the host's memory, and that it keeps to its budget on the card."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_ray.core import ExpertKey
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.offload import BUFFERS, streamed
from moe_ray.experts.server.expert_memory import ExpertMemory
from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.card_memory import check_budget
from moe_ray.model.compute.compute import Compute

if TYPE_CHECKING:
    from moe_ray.model.compute.torch.streamed import LayerStreams

logger = logging.getLogger(__name__)


class CardBuffers:
    """The buffers on one process's card through which layers in the host's memory go: of one expert, or of several.

    Made when the first of them comes.
    """

    def __init__(self, compute: Compute, sharers: int = 1) -> None:
        """`sharers`: how many experts keep some of their layers in the host's memory."""
        self.compute, self.sharers = compute, sharers
        self._streams: LayerStreams[Any] | None = None

    @property
    def streams(self) -> LayerStreams[Any]:
        if self._streams is None:
            from moe_ray.model.compute.torch.copy_engine import copies_to
            from moe_ray.model.compute.torch.streamed import LayerStreams

            self._streams = LayerStreams(copies_to(self.compute.torch_device))
        return self._streams

    def expect(self, key: ExpertKey) -> None:
        """Copy the layer that is called next while another is computed; from the thread that calls."""
        if self._streams is not None:
            self._streams.expect(key)

    def close(self) -> None:
        """Copy no layer any more. Idempotent."""
        if self._streams is not None:
            self._streams.close()


class Offload:
    """Settles each layer of a replica as it is loaded: on the card, or in the host's memory. From one thread."""

    def __init__(
        self,
        name: str,
        keys: Sequence[ExpertKey],
        memory: ExpertMemory,
        compute: Compute,
        buffers: CardBuffers | None = None,
    ) -> None:
        """`buffers`: those that it shares with other experts of this process; None: it has its own."""
        self._name, self._keys, self._memory, self._compute = name, keys, memory, compute
        self._streamed: tuple[ExpertKey, ...] | None = None
        self._buffers = buffers or CardBuffers(compute)
        self.card_bytes = 0
        """Weights on the card so far, and buffers that were made for this replica."""

    def settle(self, key: ExpertKey, ffn: FFN) -> FFN:
        """What serves a layer that was loaded as `ffn`.

        Raises `OverBudget` where it, or all layers of its size, do not fit the budget; `ConfigError` where an offload
        is asked for and cannot be had.
        """
        if self._streamed is None:
            self._decide(ffn.nbytes)
        assert self._streamed is not None, "decided by now"
        if key not in self._streamed:
            self._add(ffn.nbytes)
            return ffn
        from moe_ray.model.compute.torch.streamed import Movable, StreamedFFN

        if not isinstance(ffn, Movable):
            raise ConfigError(
                f"experts.cpu_offload_gib: {self._compute.backend.experts} kernels compute the experts of this process "
                f"on {self._compute.device}, on weights where they are; allowed there: 0"
            )
        streams, tensors = self._buffers.streams, ffn.tensors()
        if not streams.has(tensors):
            self._add(BUFFERS * ffn.nbytes)
        return StreamedFFN(key, ffn, streams.of(tensors))

    def close(self) -> None:
        """Copy no layer any more. Idempotent."""
        self._buffers.close()

    def _decide(self, layer_bytes: int) -> None:
        memory = self._memory
        load = memory.load_of(self._keys)
        self._streamed = streamed(self._keys, layer_bytes, memory.offload_bytes, load, self._buffers.sharers)
        on_card = len(self._keys) - len(self._streamed) + (BUFFERS if self._streamed else 0)
        check_budget(f"{self._name}, {on_card} layers on the card", on_card * layer_bytes, memory.budget_bytes)
        if self._streamed:
            logger.info(
                "%s: %d of %d layers stay in the host's memory and are copied when they are called, which is slower",
                *(self._name, len(self._streamed), len(self._keys)),
            )
            if self._compute.device == "cpu":
                logger.warning("%s: the device is a CPU: experts.cpu_offload_gib saves nothing there", self._name)

    def _add(self, nbytes: int) -> None:
        check_budget(self._name, self.card_bytes + nbytes, self._memory.budget_bytes)
        self.card_bytes += nbytes
