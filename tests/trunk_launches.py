"""What a trunk of Mixtral-8x7B would launch, by name of its dtype, cache and step: on tensors without memory."""

from __future__ import annotations

from typing import Final

import torch
from step_batch import step_batch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_ray.engine.kv_cache import KVCache, cache_dtype
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.compute.triton.launch import Launch
from moe_ray.model.compute.triton.model_launches import BlankTrunkWeights
from moe_ray.model.compute.triton.ops import TritonOps
from moe_ray.model.compute.triton.warm_up import warm_up
from moe_ray.model.model_config import ModelConfig

MIXTRAL: Final = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
MODELS: Final = {
    "mixtral": MIXTRAL,
    "wide": {**MIXTRAL, "head_dim": 256, "num_attention_heads": 16},
    "window": {**MIXTRAL, "sliding_window": 4096},
    "gpt-oss": {**MIXTRAL, "model_type": "gpt_oss", "head_dim": 64, "num_attention_heads": 64, "sliding_window": 128},
    "qwen3": {**MIXTRAL, "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}
    | {"moe_intermediate_size": 768, "num_key_value_heads": 4},
}
STEPS: Final = {
    "one": [(999, 1000)],
    "short": [(99, 100)],
    "many": [(999 + i, 1000 + i) for i in range(40)],
    "prompt": [(0, 512), (999, 1000)],
}


def launches(name: str) -> list[Launch]:
    """`name`: a model of `MODELS`, a dtype, a cache's dtype, and a step of `STEPS`, or "warming" for what is first."""
    model, dtype, cache, chunks = name.split()
    config, made = ModelConfig.from_dict(MODELS[model]), list[Launch]()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        ops = TritonOps(config, torch.device("cpu"), made.append)
        trunk = TorchTrunk(BlankTrunkWeights(config, getattr(torch, dtype)), 4096, True, ops)
        held = cache_dtype(cache, getattr(torch, dtype))
        kv = KVCache(config, 64 * 40, 16, held, torch.device("cpu"))
        if chunks == "warming":
            warm_up(trunk, config.num_hidden_layers, kv, 4096)
            return made
        batch = step_batch(STEPS[chunks], 16, 64)
        work = trunk.begin(batch, kv)
        for layer in range(config.num_hidden_layers):
            routed = work.route(layer)
            assert routed is not None
            work.combine(routed, routed.rows)
        work.logits([row for end in batch.query_start[1:] for row in range(max(end - 70, 0), end)])
    return made
