"""The paged KV cache: one K and one V tensor per layer, addressed by slot; of int8 with a scale for each row."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch

from moe_ray.model.compute.base import LayerCache
from moe_ray.model.model_config import ModelConfig

CACHE_LINE: Final = 64
"""Bytes that memory hands out together: a row that does not begin with them takes one more."""


class KVCache:
    """K and V of `num_blocks` blocks over all layers. The block allocator says which sequence has which block."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`dtype`: that of the rows, or int8."""
        self.num_blocks, self.block_size = num_blocks, block_size
        self.spare_slot = num_blocks * block_size
        rows = (config.num_hidden_layers, 2, self.spare_slot + 1, config.num_key_value_heads)
        self._store = _zeros((*rows, config.head_dim), dtype, device)
        self._scales = _zeros(rows, torch.float32, device) if dtype == torch.int8 else None
        self._layers = [self._of_layer(index) for index in range(config.num_hidden_layers)]

    def layer(self, index: int) -> LayerCache:
        """K and V of one layer."""
        return self._layers[index]

    def _of_layer(self, index: int) -> LayerCache:
        scales = (None, None) if self._scales is None else (self._scales[index, 0], self._scales[index, 1])
        return LayerCache(self._store[index, 0], self._store[index, 1], *scales)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._store.nbytes + (0 if self._scales is None else self._scales.nbytes)


def cache_dtype(configured: str, rows: torch.dtype) -> torch.dtype:
    """The dtype of the cache for `engine.kv_cache_dtype`, beside a trunk's rows."""
    return rows if configured == "auto" else torch.int8


def num_blocks_for(token_bytes: int, block_size: int, budget_bytes: int) -> int:
    """Return how many blocks of tokens that take `token_bytes` each fit `budget_bytes`."""
    return budget_bytes // (token_bytes * block_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Zeros, not empty: a padded gather reads slots that were never written, and NaN times a zero weight is NaN.
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # calloc'ed, unlike torch.zeros: pages get memory when they are first written.
    count = math.prod(shape) * dtype.itemsize
    memory = np.zeros(count + CACHE_LINE, dtype=np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[start : start + count]).view(dtype).view(shape)
