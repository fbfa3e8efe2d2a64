"""A step's attention by Triton: what its kernels need to know of the batch, and their launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Self

import numpy as np
import torch

from moe_ray.core import Batch
from moe_ray.model.compute.base import KVCacheView, LayerCache
from moe_ray.model.compute.torch.ops import Attending
from moe_ray.model.compute.torch.plan import MOST_RECORDED, padded_count, power_of_two, to_device
from moe_ray.model.compute.triton.attention_kernels import attend_kernel, merge_kernel
from moe_ray.model.compute.triton.launch import INTERPRETED, Constant, Launch
from moe_ray.model.compute.triton.rope_kernels import rope_kernel
from moe_ray.model.model_config import ModelConfig

ROWS: Final = 64
"""Query rows of a tile: tokens times the query heads of a KV head. Decodes leave most of them empty, and are bound by
reading keys and values all the same; tiles of one shape have sums of one order."""
PARTITION: Final = 256
"""Positions of a partition of the context."""
KEYS: Final = {256: 64, 512: 32, 1024: 8}
"""Keys that are multiplied at a time, by the bytes of one of 128 elements or more. A tile of queries, of these and of
values fits every card's shared memory, but for Turing's with wider heads."""
KINDS: Final = {torch.int8: "int8", torch.float8_e4m3fn: "float8"}
"""How a cache of this dtype is held; others are held as the rows are."""


class TritonStep:
    """`StepAttention` by Triton. Everything is brought to the device in one copy that nothing waits for.

    `static_shapes`: a batch of decodes alone has one of few numbers of tokens (`padded_count`), and powers of two for
    its partitions; what pads it are first tokens of the first sequence, which are kept in a slot that no block has.
    """

    def __init__(
        self,
        batch: Batch,
        cache: KVCacheView,
        config: ModelConfig,
        device: torch.device,
        static_shapes: bool,
        start: Callable[[Launch], None],
    ) -> None:
        self._config, self._start, self._block_size = config, start, cache.block_size
        self._group = config.num_attention_heads // config.num_key_value_heads
        self._group_rows = power_of_two(self._group)
        self.num_tokens = batch.num_tokens
        short, chunks = tiles_of(batch, ROWS // self._group_rows)
        tables = [seq.block_table for seq in batch.sequences]
        blocks = max(-(-context // cache.block_size) for context in batch.context_lens)
        longest = max((batch.context_lens[tile[0]] for tile in short), default=1)
        padding = 0
        self._is_static = static_shapes and batch.num_tokens == len(batch.sequences)
        if self._is_static:
            longest = max(power_of_two(longest), PARTITION)
            blocks = -(-longest // cache.block_size)
            padding = padded_count(batch.num_tokens) - batch.num_tokens
            short += [(0, at, at + 1, at) for at in range(batch.num_tokens, batch.num_tokens + padding)]
        self._partitions = -(-longest // PARTITION)
        tokens = [token for _, start, end, _ in short for token in range(start, end)]
        table = np.zeros((len(tables) + padding, blocks), dtype=np.int64)
        for row, known in zip(table, tables, strict=False):
            row[: len(known)] = known[:blocks]
        given = [
            np.array(values + [filler] * padding, dtype=np.int64)
            for values, filler in ((batch.token_ids, 0), (batch.positions, 0), (batch.slot_mapping, cache.spare_slot))
        ]
        tiles = [np.array(part, dtype=np.int64).reshape(-1, 4) for part in (short, chunks)]
        numbers = [np.array(each, dtype=np.int64) for each in ([batch.num_tokens], tokens)]
        arrived = to_device([*given, table, *numbers, *tiles], device)
        self.token_ids, self.positions, self._slots, self._tables, self.real, *more = arrived
        self._tokens, self._short, self._chunks = more

    @property
    def key(self) -> tuple[object, ...] | None:
        if not self._is_static or len(self.positions) > MOST_RECORDED:
            return None
        return (self._partitions, *(tuple(each.shape) for each in self._tensors()))

    def take(self, other: Self) -> None:
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.token_ids, self.positions, self._slots, self._tables, self.real, self._tokens, self._short

    def attend(
        self, qk: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor, cache: LayerCache, how: Attending
    ) -> torch.Tensor:
        held: dict[str, torch.Tensor | None] = {"keys": _bytes(cache.k), "values": _bytes(cache.v)}
        held |= {"k_scales": cache.k_scales, "v_scales": cache.v_scales}
        kind = KINDS.get(cache.k.dtype, "rows")
        q = self._rotate(qk, v, cos_sin, held, kind)
        out = torch.empty_like(q)
        for tiles, partitions in ((self._short, self._partitions), (self._chunks, 1)):
            if len(tiles):
                self._attend(tiles, partitions, q, out, held, kind, how)
        return out

    def _rotate(
        self, qk: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor, held: dict[str, torch.Tensor | None], kind: str
    ) -> torch.Tensor:
        """Keep keys and values; the queries, rotated, [P, heads, head_dim]."""
        kv_heads, head_dim = v.shape[1:]
        heads = qk.shape[1] - kv_heads
        q = qk.new_empty(len(qk), heads, head_dim)
        self._start(
            Launch(
                rope_kernel,
                (len(qk),),
                {"qk": qk, "v": v, "cos_sin": cos_sin, "slots": self._slots, "q": q, **held},
                {"qk_stride": qk.stride(0), "v_stride": v.stride(0)},
                {
                    **{"HEADS": heads, "BLOCK_H": power_of_two(heads), "KV_HEADS": kv_heads},
                    **{"BLOCK_KV": power_of_two(kv_heads), "HALF": head_dim // 2, "BLOCK": power_of_two(head_dim // 2)},
                    **{"KIND": kind, "EMULATED": INTERPRETED},
                },
                contracted=False,
            )
        )
        return q

    def _attend(
        self,
        tiles: torch.Tensor,
        partitions: int,
        q: torch.Tensor,
        out: torch.Tensor,
        held: dict[str, torch.Tensor | None],
        kind: str,
        how: Attending,
    ) -> None:
        """What these tiles attend to, into `out`; each of so many partitions by its own program, unless it is 1."""
        _, heads, head_dim = q.shape
        apart, kv_heads = partitions > 1, self._config.num_key_value_heads
        sizes = (len(self._tokens), partitions, heads)
        common = {
            "parts": q.new_empty((*sizes, head_dim), dtype=torch.float32) if apart else None,
            "peaks": q.new_empty(sizes, dtype=torch.float32) if apart else None,
            "totals": q.new_empty(sizes, dtype=torch.float32) if apart else None,
            **{"positions": self.positions, "sinks": how.sinks, "out": out},
        }
        shape: dict[str, Constant] = {
            **{"WINDOW": how.window or 0, "KV_HEADS": kv_heads, "GROUP": self._group, "GROUP_ROWS": self._group_rows},
            **{"HEAD_DIM": head_dim, "BLOCK_D": max(16, power_of_two(head_dim)), "PARTITION": PARTITION},
            "EMULATED": INTERPRETED,
        }
        keys = KEYS[max(128, power_of_two(head_dim)) * q.dtype.itemsize]
        scale = (head_dim**-0.5 if how.scale is None else how.scale) * math.log2(math.e)
        tile = {"SCALE": scale, "BLOCK_SIZE": self._block_size, "ROWS": ROWS, "KEYS": keys, "KIND": kind}
        self._start(
            Launch(
                attend_kernel,
                (len(tiles), kv_heads, partitions),
                {**common, **held, "q": q, "tables": self._tables, "tiles": tiles},
                {"table_stride": self._tables.shape[1]},
                {**shape, **tile, "APART": apart},
                stages=2,
                contracted=False,
            )
        )
        if apart:
            self._start(
                Launch(
                    merge_kernel,
                    (len(self._tokens), kv_heads),
                    {**common, "tokens": self._tokens},
                    {"partitions": partitions},
                    shape,
                    contracted=False,  # as the same merge is rounded in `attend_kernel`
                )
            )

    def attend_latents(self, q: torch.Tensor, k: torch.Tensor, cache: LayerCache, how: Attending) -> torch.Tensor:
        raise AssertionError("torch plans the steps of models with latent attention, see TritonOps.plan")


Tile = tuple[int, int, int, int]
"""A sequence, a range of flat positions, and how many positions come before it in tiles of its kind."""


def tiles_of(batch: Batch, tokens: int) -> tuple[list[Tile], list[Tile]]:
    """The tiles of a batch, of up to so many tokens: those with all of their sequence's, and those of longer chunks.

    The former are decodes, with drafts behind them: few tokens over a context that may be long.
    """
    short: list[Tile] = []
    chunks: list[Tile] = []
    before = 0
    for i, start in enumerate(batch.query_start[:-1]):
        end = batch.query_start[i + 1]
        if end - start <= tokens:
            short.append((i, start, end, before))
            before += end - start
        else:
            chunks += [(i, at, min(at + tokens, end), 0) for at in range(start, end, tokens)]
    return short, chunks


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    """Float8 by its bytes, which kernels convert."""
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows
