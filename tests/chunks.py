"""Sequences that are fed to a trunk in chunks, whatever backend computes it."""

from __future__ import annotations

import torch
from backends import trunk_of

from moe_ray.core import Batch, Request, SamplingParams, Sequence
from moe_ray.engine.kv_cache import KVCache, cache_dtype
from moe_ray.model import moe
from moe_ray.model.compute.base import Pass, TrunkCompute
from moe_ray.model.compute.compute import Compute
from moe_ray.model.model_config import ModelConfig


def model(heads: int, kv_heads: int, head_dim: int, **more: object) -> ModelConfig:
    raw = {
        "model_type": "mixtral",
        "vocab_size": 100,
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        **more,
    }
    return ModelConfig.from_dict(raw)


SHAPES = [
    model(4, 4, 32),
    model(4, 2, 64, sliding_window=11),
    model(9, 3, 64, tie_word_embeddings=True),
    model(16, 4, 32, num_local_experts=17, num_experts_per_tok=3),
    model(5, 1, 128),
    model(12, 2, 96, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    model(7, 1, 32),
    model(16, 2, 32),
    model(16, 1, 256),
    model(8, 1, 64, model_type="gpt_oss", sliding_window=11, num_local_experts=6, num_experts_per_tok=2),
]

ONE, TWO = [3 + 5 * i % 91 for i in range(70)], [1 + 7 * i % 93 for i in range(33)]
WHOLE = [(0, ONE, 0, 70), (1, TWO, 0, 33)]
"""Chunks: number of the sequence, its tokens, start, end."""


class Chunks:
    """Feeds sequences to a trunk in chunks, each layer's experts being simple functions of the rows."""

    def __init__(
        self,
        compute: Compute,
        config: ModelConfig,
        quantize: str | None = None,
        kv_cache_dtype: str = "auto",
        trunk: TrunkCompute | None = None,
        length: int = 160,
    ) -> None:
        """`trunk`: default: one of random weights. `length`: of the longest sequence, 160 or 1280."""
        self.config, self.block_size = config, 4
        self.blocks_each = length // self.block_size
        self.trunk = trunk or trunk_of(compute, config, max(256, length), quantize)
        held = cache_dtype(kv_cache_dtype, compute.torch_dtype)
        self.cache = KVCache(config, max(256, 6 * self.blocks_each), self.block_size, held, torch.device("cpu"))

    def table(self, number: int, blocks: int) -> list[int]:
        """The blocks of a sequence: in no order, of no other sequence."""
        return [(7 * b + 3) % self.blocks_each + self.blocks_each * number for b in range(blocks)]

    def run(self, chunks: list[tuple[int, list[int], int, int]]) -> tuple[torch.Tensor, list[moe.Routed]]:
        """One pass over chunks; logits of every position, and the routing of every layer."""
        batch = Batch([], [], [], [], [0], [], [])
        for number, tokens, start, end in chunks:
            seq = Sequence(Request(str(number), (1,), SamplingParams()), tokens)
            seq.block_table = self.table(number, -(-end // self.block_size))
            batch.sequences.append(seq)
            batch.token_ids += tokens[start:end]
            batch.positions += range(start, end)
            batch.slot_mapping += [
                seq.block_table[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, end)
            ]
            batch.query_start.append(len(batch.token_ids))
            batch.context_lens.append(end)
            batch.num_sampled.append(end - start)
        work: Pass = self.trunk.begin(batch, self.cache)
        routings = []
        with torch.inference_mode():
            for layer in range(self.config.num_hidden_layers):
                routed = work.route(layer)
                routings.append(routed)
                parts = (routed.rows * routed.weights[:, None]).to(routed.rows.dtype).split(routed.counts)
                work.combine(routed, torch.cat([part * (0.5 + 0.1 * e) for e, part in enumerate(parts)]))
            return work.logits(list(range(batch.num_tokens))), routings


def in_pieces(chunks: Chunks) -> torch.Tensor:
    """Logits of `WHOLE`, computed in chunks, behind what is cached, in other company and order."""
    first, _ = chunks.run([(0, ONE, 0, 41)])
    mixed, _ = chunks.run([(1, TWO, 0, 5), (0, ONE, 41, 42)])
    last, _ = chunks.run([(0, ONE, 42, 70), (1, TWO, 5, 33)])
    return torch.cat((first, mixed[5:], last[:28], mixed[:5], last[28:]))
