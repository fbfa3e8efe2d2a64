"""Loads a draft model beside the model that it drafts for."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from moe_ray.config import Config
from moe_ray.engine.kv_cache import KVCache, cache_dtype
from moe_ray.engine.trunk_drafts import TrunkDrafts
from moe_ray.errors import ConfigError
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.compute.compute import Compute, open_compute
from moe_ray.model.compute.resolve import Wanted
from moe_ray.model.expert_reader import read_experts
from moe_ray.model.inline_experts import InlineExperts
from moe_ray.model.kv_bytes import held_in, kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk import Trunk

logger = logging.getLogger(__name__)

CATCH_UP_TOKENS = 256
"""Most tokens of prompts that a step has the draft model compute, so that a long one does not stall the others."""


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """The weights of a draft model, without a KV cache yet."""

    trunk: Trunk
    weight_bytes: int
    kv_bytes_per_token: int

    def with_cache(self, config: Config, num_blocks: int, ends: frozenset[int]) -> TrunkDrafts:
        """The draft model, with as many blocks as the target has. `ends`: the target's end tokens."""
        held = cache_dtype(config.engine.kv_cache_dtype, self.trunk.dtype)
        size = config.engine.block_size
        cache = KVCache(self.trunk.config, num_blocks, size, held, self.trunk.device)
        return TrunkDrafts(
            self.trunk,
            cache,
            end_token_ids=ends,
            max_positions=_positions(config, self.trunk.config),
            most_tokens=min(CATCH_UP_TOKENS, config.engine.max_num_batched_tokens),
            weight_bytes=self.weight_bytes,
        )


def load_draft(
    config: Config, draft: Checkpoint, target: ModelConfig, compute: Compute, progress: Progress | None = None
) -> LoadedDraft:
    """Load the weights of `draft` for a target model that is computed by `compute`.

    Its kernels' threads are shared: the two take turns. Raises `ConfigError` where the vocabularies differ in size,
    `CheckpointError`.
    """
    model = draft.config
    check_vocab_size(model, target, str(draft.directory))
    quantize = config.engine.draft_quantize
    wanted = Wanted.of(config.model, quantize)
    if wanted.kernels != "torch" and (compute.backend.native or compute.device == "cuda"):
        wanted = replace(wanted, kernels="auto")  # the draft model may have a shape that the kernels lack
    own = open_compute(model, wanted, config.cache_dir, config.trunk.threads)
    if own.kernels is not None and compute.kernels is not None and own.backend.kernels == compute.backend.kernels:
        own = replace(own, kernels=compute.kernels, threads=compute.threads)
    experts = InlineExperts(read_experts(draft, model.expert_keys, own, None, quantize))
    trunk = Trunk.load(draft, experts, own, _positions(config, model), progress, quantize)
    weight_bytes = trunk.nbytes + experts.nbytes
    logger.info("draft model %s: %d bytes of weights, computing %s", draft.directory.name, weight_bytes, own.backend)
    held = held_in(config.engine.kv_cache_dtype, own.dtype)
    return LoadedDraft(trunk, weight_bytes, kv_bytes_per_token(model, held))


def check_vocab_size(draft: ModelConfig, target: ModelConfig, name: str) -> None:
    """Raise `ConfigError` unless the two models' token ids may mean the same."""
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"engine.draft_model {name} has a vocabulary of {draft.vocab_size} tokens, the model one of "
            f"{target.vocab_size}: a draft model must have the model's own vocabulary"
        )


def _positions(config: Config, draft: ModelConfig) -> int:
    longest = config.model.max_model_len or draft.max_position_embeddings
    return min(longest, draft.max_position_embeddings)
