"""Turns configuration and a checkpoint into an engine: dtype, device, cache size, context length."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moe_ray.config import Config
from moe_ray.engine.engine import Engine, EngineOptions
from moe_ray.engine.kv_cache import num_blocks_for
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.errors import CheckpointError, ConfigError, KernelsUnavailable
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.model_config import DTYPES, ModelConfig
from moe_ray.model.moe import Experts
from moe_ray.model.trunk import Trunk
from moe_ray.native.kernels import Kernels
from moe_ray.telemetry import cores

logger = logging.getLogger(__name__)

GIB = 1024**3
CPU_CACHE_SHARE, CPU_CACHE_MOST = 0.2, 4 * GIB
GPU_CACHE_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Numerics:
    """How tensors are held and computed in one process."""

    dtype: torch.dtype
    device: torch.device
    kernels: Kernels | None = None
    """Native kernels with this process's compute threads, where they are wanted and work."""


def numerics(config: Config, model: ModelConfig, threads: int | None = None) -> Numerics:
    """Choose dtype, device and kernels. `threads` of native kernels; default: the cores of this process.

    Raises `ConfigError` when CUDA or native kernels are asked for and absent.
    """
    wanted = config.model.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device is 'cuda', but this process sees no CUDA device")
    cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    dtype = getattr(torch, dtype_name(config, model, cuda))
    return Numerics(dtype, device, _kernels(config, dtype, cuda, threads or cores()))


def _kernels(config: Config, dtype: torch.dtype, cuda: bool, threads: int) -> Kernels | None:
    wanted = config.model.kernels
    if wanted == "torch" or (wanted == "auto" and (cuda or dtype != torch.bfloat16)):
        return None
    try:
        if cuda or dtype != torch.bfloat16:
            raise KernelsUnavailable(f"they compute bfloat16 on a CPU, not {dtype} on {'CUDA' if cuda else 'a CPU'}")
        return Kernels(config.cache_dir, threads)
    except KernelsUnavailable as error:
        if wanted == "native":
            raise ConfigError(f"model.kernels is 'native': {error}") from None
        logger.warning("computing with torch's kernels, native ones cannot be used: %s", error)
        return None


def dtype_name(config: Config, model: ModelConfig, cuda: bool) -> str:
    """The dtype that `config` means for this model on this machine."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if model.dtype not in DTYPES:
        raise CheckpointError(f"config.json: dtype {model.dtype!r}, supported: {', '.join(DTYPES)}")
    if not cuda and model.dtype != "float32":
        # float16 has no fast CPU kernels; bfloat16 has them only with the instructions for it.
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bfloat16" if fast else "float32"
    return model.dtype


def num_blocks(config: Config, model: ModelConfig, how: Numerics) -> int:
    """How many KV blocks the configured (or default) memory holds, never more than all sequences can use."""
    size, itemsize = config.engine.block_size, how.dtype.itemsize
    if config.engine.kv_cache_gib is not None:
        budget = int(config.engine.kv_cache_gib * GIB)
    elif how.device.type == "cuda":
        budget = int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(how.device)[0])
    else:
        budget = min(int(CPU_CACHE_SHARE * psutil.virtual_memory().available), CPU_CACHE_MOST)
    longest = config.model.max_model_len or model.max_position_embeddings
    most = config.engine.max_num_seqs * -(-longest // size)
    return min(num_blocks_for(model, size, itemsize, budget), most)


def max_model_len(config: Config, model: ModelConfig, blocks: int) -> int:
    """The longest sequence: as asked for, or the model's, cut to the cache. Raises `ConfigError` if it does not fit."""
    capacity, asked = blocks * config.engine.block_size, config.model.max_model_len
    if capacity < 2:
        raise ConfigError(f"the KV cache holds {capacity} tokens; raise engine.kv_cache_gib")
    if asked is None:
        return min(model.max_position_embeddings, capacity)
    if asked > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {asked} exceeds the model's max_position_embeddings {model.max_position_embeddings}"
        )
    if asked > capacity:
        raise ConfigError(
            f"max_model_len {asked} exceeds the {capacity} tokens of the KV cache; raise engine.kv_cache_gib"
        )
    return asked


def eos_token_ids(directory: Path, model: ModelConfig) -> frozenset[int]:
    """End-of-sequence ids from generation_config.json and config.json, those that the vocabulary has."""
    found: set[int] = set()
    path = directory / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    for value in (generation.get("eos_token_id"), model.raw.get("eos_token_id")):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(token for token in found if 0 <= token < model.vocab_size)


def build_engine(
    config: Config,
    checkpoint: Checkpoint,
    make_experts: Callable[[Numerics], Experts],
    progress: Progress | None = None,
) -> Engine:
    """Load the trunk and return an engine over it. Raises `CheckpointError`, `ConfigError`."""
    model = checkpoint.config
    how = numerics(config, model, config.trunk.threads)
    experts = make_experts(how)
    # On a GPU the cache takes what the weights leave, so the trunk is loaded first, with room for any position.
    longest = config.model.max_model_len or model.max_position_embeddings
    trunk = Trunk.load(checkpoint, experts, how.dtype, how.device, longest, progress, how.kernels)
    blocks = num_blocks(config, model, how)
    options = EngineOptions(
        num_blocks=blocks,
        block_size=config.engine.block_size,
        limits=SchedulerLimits(
            max_num_seqs=config.engine.max_num_seqs,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_waiting=config.engine.max_waiting,
            enable_prefix_caching=config.engine.enable_prefix_caching,
            num_speculative_tokens=config.engine.num_speculative_tokens if config.engine.speculative == "ngram" else 0,
            prompt_lookup_max=config.engine.prompt_lookup_max,
            prompt_lookup_min=config.engine.prompt_lookup_min,
        ),
        max_model_len=max_model_len(config, model, blocks),
        micro_batches=None if config.engine.micro_batches == "auto" else config.engine.micro_batches,
        eos_token_ids=eos_token_ids(checkpoint.directory, model),
    )
    return Engine(trunk, options)
