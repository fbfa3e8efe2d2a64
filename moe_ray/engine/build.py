"""Turns configuration and a checkpoint into an engine: cache size, context length, limits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from moe_ray.config import Config
from moe_ray.engine.adapter_shelf import AdapterShelf, HoldingExperts
from moe_ray.engine.build_draft import load_draft
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions, TierOptions
from moe_ray.engine.grammar.grammars import Grammars, TokenBytes
from moe_ray.engine.kv_cache import num_blocks_for
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.engine.tiers.cache_identity import cache_identity
from moe_ray.errors import ConfigError
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.compute.compute import Compute, open_compute
from moe_ray.model.compute.resolve import Wanted
from moe_ray.model.end_tokens import end_token_ids
from moe_ray.model.kv_bytes import held_in, kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.moe import Experts
from moe_ray.model.trunk import Trunk

logger = logging.getLogger(__name__)

GIB = 1024**3
CPU_CACHE_SHARE, CPU_CACHE_MOST = 0.2, 4 * GIB
GPU_CACHE_SHARE = 0.85


def num_blocks(config: Config, model: ModelConfig, compute: Compute, draft_token_bytes: int = 0) -> int:
    """How many KV blocks the configured (or default) memory holds, never more than all sequences can use.

    Nor more than `engine.kv_cache_tokens` needs. `draft_token_bytes`: what a draft model keeps of each token beside.
    """
    size, held = config.engine.block_size, held_in(config.engine.kv_cache_dtype, compute.dtype)
    if config.engine.kv_cache_gib is not None:
        budget = int(config.engine.kv_cache_gib * GIB)
    elif compute.device == "cuda":
        budget = int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(compute.torch_device)[0])
    else:
        budget = min(int(CPU_CACHE_SHARE * psutil.virtual_memory().available), CPU_CACHE_MOST)
    longest = config.model.max_model_len or model.max_position_embeddings
    most = config.engine.max_num_seqs * -(-longest // size)
    if config.engine.kv_cache_tokens is not None:
        most = min(most, -(-config.engine.kv_cache_tokens // size))
    token_bytes = kv_bytes_per_token(model, held) + draft_token_bytes
    return min(num_blocks_for(token_bytes, size, budget), most)


def max_model_len(config: Config, model: ModelConfig, blocks: int) -> int:
    """The longest sequence: as asked for, or the model's, cut to the cache. Raises `ConfigError` if it does not fit."""
    capacity, asked = blocks * config.engine.block_size, config.model.max_model_len
    if capacity < 2:
        raise ConfigError(f"the KV cache holds {capacity} tokens; raise engine.kv_cache_gib")
    if asked is None:
        return min(model.max_position_embeddings, capacity)
    if asked > model.max_position_embeddings:
        why = f": {model.context_limit}" if model.context_limit else ""
        raise ConfigError(
            f"max_model_len {asked} exceeds the model's max_position_embeddings {model.max_position_embeddings}{why}"
        )
    if asked > capacity:
        raise ConfigError(
            f"max_model_len {asked} exceeds the {capacity} tokens of the KV cache; raise engine.kv_cache_gib"
        )
    return asked


def load_trunk(
    config: Config,
    checkpoint: Checkpoint,
    make_experts: Callable[[Compute], Experts],
    progress: Progress | None = None,
) -> tuple[Trunk, Compute]:
    """Load a trunk with room for any position, over experts of `make_experts`. Raises as `build_engine`."""
    model = checkpoint.config
    quantize = config.trunk.quantize
    wanted = Wanted.of(config.computing_on(config.trunk.device).model, quantize)
    compute = open_compute(model, wanted, config.cache_dir, config.trunk.threads)
    experts = make_experts(compute)
    longest = config.model.max_model_len or model.max_position_embeddings
    if model.context_limit:
        logger.warning("context of %d tokens: %s", model.max_position_embeddings, model.context_limit)
    return Trunk.load(checkpoint, experts, compute, longest, progress, quantize), compute


def build_engine(
    config: Config,
    checkpoint: Checkpoint,
    make_experts: Callable[[Compute], HoldingExperts],
    progress: Progress | None = None,
    token_bytes: TokenBytes | None = None,
    draft: Checkpoint | None = None,
    locate_adapter: Callable[[str], Path] = Path,
) -> Engine:
    """Load the trunk and return an engine over it. Raises `CheckpointError`, `ConfigError`.

    `token_bytes` is called when the first request with a grammar comes; without it such requests are refused. `draft`:
    the checkpoint of `engine.draft_model`, where there is one. `locate_adapter`: from the source of an adapter to its
    directory.
    """
    model = checkpoint.config
    made: list[HoldingExperts] = []

    def make(compute: Compute) -> Experts:
        made.append(make_experts(compute))
        return made[0]

    # On a GPU the cache takes what the weights leave, so they are loaded first.
    trunk, compute = load_trunk(config, checkpoint, make, progress)
    loaded = None
    if draft is not None:
        loaded = load_draft(config, draft, model, compute)
        draft.close()
    blocks = num_blocks(config, model, compute, 0 if loaded is None else loaded.kv_bytes_per_token)
    options = EngineOptions(
        num_blocks=blocks,
        block_size=config.engine.block_size,
        limits=SchedulerLimits(
            max_num_seqs=config.engine.max_num_seqs,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_waiting=config.engine.max_waiting,
            enable_prefix_caching=config.engine.enable_prefix_caching,
            num_speculative_tokens=0 if config.engine.speculative == "off" else config.engine.num_speculative_tokens,
            speculation=config.engine.speculative,
            prompt_lookup_max=config.engine.prompt_lookup_max,
            prompt_lookup_min=config.engine.prompt_lookup_min,
        ),
        max_model_len=max_model_len(config, model, blocks),
        micro_batches=None if config.engine.micro_batches == "auto" else config.engine.micro_batches,
        eos_token_ids=end_token_ids(checkpoint.directory, model.vocab_size),
        kv_cache_dtype=config.engine.kv_cache_dtype,
        tiers=_tiers(config, checkpoint, compute),
    )
    end = options.eos_token_ids
    adapters = AdapterShelf(trunk, made[0], config.adapters.max_loaded, config.adapters.max_rank, locate_adapter)
    drafts = None if loaded is None else loaded.with_cache(config, blocks, end)
    return Engine(trunk, options, token_bytes and Grammars(token_bytes, model.vocab_size, end), drafts, adapters)


def _tiers(config: Config, checkpoint: Checkpoint, compute: Compute) -> TierOptions | None:
    engine = config.engine
    if not engine.kv_swap_gib and engine.kv_disk_dir is None:
        return None
    return TierOptions(
        swap_bytes=int(engine.kv_swap_gib * GIB),
        disk=engine.kv_disk_dir,
        disk_bytes=int(engine.kv_disk_gib * GIB),
        identity=bytes(16) if engine.kv_disk_dir is None else cache_identity(config, checkpoint, compute),
    )
