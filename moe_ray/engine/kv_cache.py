"""The paged KV cache: one K and one V tensor per layer, or one of latents; addressed by slot; int8 with scales."""

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
        """`dtype`: that of the rows, int8 or float8_e4m3fn."""
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, device
        self.spare_slot = num_blocks * block_size
        rows = (config.num_hidden_layers, config.kv_parts, self.spare_slot + 1, config.num_key_value_heads)
        self._store = _zeros((*rows, config.head_dim), dtype, device)
        self._scales = _zeros(rows, torch.float32, device) if dtype == torch.int8 else None
        self._layers = [self._of_layer(index) for index in range(config.num_hidden_layers)]

    def layer(self, index: int) -> LayerCache:
        """K and V of one layer."""
        return self._layers[index]

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block over all layers, scales included."""
        return sum(part.nbytes for part in self._parts(0))

    def copy_out(self, block: int, to: torch.Tensor) -> None:
        """Copy a block to `to`, uint8 [block_nbytes] on the host."""
        start = 0
        for part in self._parts(block):
            to[start : start + part.nbytes].view(part.shape).copy_(part)
            start += part.nbytes

    def copy_in(self, block: int, given: torch.Tensor) -> None:
        """Fill a block with what `copy_out` copied."""
        start = 0
        for part in self._parts(block):
            part.copy_(given[start : start + part.nbytes].view(part.shape))
            start += part.nbytes

    def _parts(self, block: int) -> list[torch.Tensor]:
        """The bytes of a block: views, uint8 [layers, K and V, block_size, kv_heads, bytes of a row]."""
        slots = slice(block * self.block_size, (block + 1) * self.block_size)
        stores = [self._store] if self._scales is None else [self._store, self._scales[..., None]]
        return [store.view(torch.uint8)[:, :, slots] for store in stores]

    def _of_layer(self, index: int) -> LayerCache:
        scales = (None, None) if self._scales is None else (self._scales[index, 0], self._scales[index, -1])
        return LayerCache(self._store[index, 0], self._store[index, -1], *scales)  # latents are both

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._store.nbytes + (0 if self._scales is None else self._scales.nbytes)


def cache_dtype(configured: str, rows: torch.dtype) -> torch.dtype:
    """The dtype of the cache for `engine.kv_cache_dtype`, beside a trunk's rows."""
    return {"auto": rows, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[configured]


def num_blocks_for(token_bytes: int, block_size: int, budget_bytes: int) -> int:
    """Return how many blocks of tokens that take `token_bytes` each fit `budget_bytes`."""
    return budget_bytes // (token_bytes * block_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Zeros, not empty: a padded gather reads slots that were never written, and NaN times a zero weight is NaN.
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeroed_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def zeroed_bytes(count: int) -> torch.Tensor:
    """Zeros on the host, uint8 [count], from the beginning of a cache line."""
    # calloc'ed, unlike torch.zeros: pages get memory when they are first written.
    memory = np.zeros(count + CACHE_LINE, dtype=np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[start : start + count])
