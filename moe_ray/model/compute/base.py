"""The interfaces behind which trunk and experts compute; each backend is a folder beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from moe_ray.core import AdapterRows, Batch
    from moe_ray.model.lora.adapter_file import Adapter
    from moe_ray.model.lora.parts import ExpertPart
    from moe_ray.model.moe import Routed
    from moe_ray.native.host import HostEntry


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """K and V of one layer: in the dtype of the rows, float8 (e4m3), or int8 with what one is worth.

    Latents are both: then `v` is `k`.
    """

    k: torch.Tensor  # [num_slots, kv_heads, head_dim]
    v: torch.Tensor
    k_scales: torch.Tensor | None = None  # float32 [num_slots, kv_heads], of int8
    v_scales: torch.Tensor | None = None


class HeldMatrix(Protocol):
    """A matrix [N, K] as a backend holds it: a tensor, or what the backend's own `hold` made."""

    @property
    def nbytes(self) -> int: ...


class KVCacheView(Protocol):
    """Where K and V live: per layer, one row per slot."""

    block_size: int
    spare_slot: int
    """One that no block has: what is written there is not read."""

    def layer(self, index: int) -> LayerCache:
        """K and V of one layer."""
        ...


class Pass(Protocol):
    """One batch on its way through the layers; holds the hidden states."""

    def route(self, layer: int) -> Routed | None:
        """Add the layer's self-attention to the hidden states; normalise and route them; None: it has no experts."""
        ...

    def add_shared(self, layer: int) -> None:
        """Add what the layer's shared expert makes of the rows normalised last, or what is in its experts' stead.

        Nothing where the model has neither. Between `route` and `combine`: while experts elsewhere compute.
        """
        ...

    def combine(self, routed: Routed, rows: torch.Tensor) -> None:
        """Add what the experts made of `routed`: rows [T * K, D] in its order."""
        ...

    def logits(self, rows: list[int]) -> torch.Tensor:
        """Logits float32 [len(rows), V] of these flat positions of the batch."""
        ...


class TrunkCompute(Protocol):
    """A trunk's weights, in the form that a backend's kernels want."""

    nbytes: int
    """Bytes of weights held in memory."""

    def begin(self, batch: Batch, cache: KVCacheView) -> Pass:
        """Look the batch's tokens up and plan its attention. Raises `AdapterNotHeld`."""
        ...

    def add_adapter(self, adapter: Adapter) -> None:
        """Read and hold what an adapter adds to the trunk; not while a pass is under way. Raises `AdapterError`."""
        ...

    def remove_adapter(self, adapter_id: int) -> None:
        """Hold it no more; not while a pass is under way. Idempotent."""
        ...

    @property
    def adapter_bytes(self) -> int:
        """Bytes of what adapters add."""
        ...

    @property
    def adapter_ids(self) -> frozenset[int]:
        """Of the adapters that are held."""
        ...


class FFN(Protocol):
    """One expert in one layer: its weights, in the form that a backend's kernels want."""

    nbytes: int
    """Bytes of weights held in memory."""

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32).

        `adapters`: which is added to its weights for which rows, as `ExpertCall.adapters`. Raises `AdapterNotHeld`.
        """
        ...

    def add_adapter(self, adapter_id: int, part: ExpertPart) -> None:
        """Hold what an adapter adds, for calls to name it from now on; while others compute, from one thread.

        Nothing where it is held already: an id is that of the content.
        """
        ...

    def remove_adapter(self, adapter_id: int) -> None:
        """Hold it no more. Calls of `forward` that have begun go on with it; a host must have removed it before."""
        ...

    def has_adapter(self, adapter_id: int) -> bool:
        """Whether calls may name this adapter."""
        ...

    @property
    def adapter_bytes(self) -> int:
        """Bytes of what adapters add."""
        ...

    def adapter_handle(self, adapter_id: int) -> int | None:
        """What `Host.add_adapter` is given for `entry`; valid until the adapter is removed. Raises `AdapterNotHeld`."""
        ...

    def buffers(self) -> list[memoryview]:
        """The bytes of its weights, in the order in which `ExpertReader.blank` takes them."""
        ...

    def entry(self) -> HostEntry | None:
        """What a host calls to compute this network without the interpreter; None: only `forward` computes it."""
        ...
