"""The paged KV cache: one K and one V tensor per layer, addressed by slot."""

from __future__ import annotations

import math

import numpy as np
import torch

from moe_ray.model.model_config import ModelConfig


class KVCache:
    """K and V of `num_blocks` blocks over all layers. The block allocator says which sequence has which block."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.spare_slot = num_blocks * block_size
        shape = (config.num_hidden_layers, 2, self.spare_slot + 1, config.num_key_value_heads, config.head_dim)
        # Zeros, not empty: a padded gather reads slots that were never written, and NaN times a zero weight is NaN.
        if device.type == "cpu":
            # calloc'ed, unlike torch.zeros: pages get memory when they are first written.
            count = math.prod(shape) * dtype.itemsize
            self._store = torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
        else:
            self._store = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [num_slots, kv_heads, head_dim]."""
        return self._store[index, 0], self._store[index, 1]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._store.nbytes


def num_blocks_for(config: ModelConfig, block_size: int, dtype_bytes: int, budget_bytes: int) -> int:
    """Return how many blocks fit `budget_bytes`."""
    return budget_bytes // (config.kv_elements_per_token * dtype_bytes * block_size)
