"""Names all that determines the bits of KV blocks on a disk: blocks of one name are equal where their keys are."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch

import moe_ray.model
from moe_ray.config import Config
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.kv_bytes import held_in
from moe_ray.model.weights import weights_of_model
from moe_ray.native import build

LAYOUT: Final = 1
"""Of a block's bytes, and of what its key is made of."""


def cache_identity(config: Config, checkpoint: Checkpoint, compute: Compute) -> bytes:
    """16 bytes of the model's weights, its experts' included, of how they are held and computed, and of the cache.

    Weights are known by their formats, shapes and samples of their values (`Checkpoint.fingerprint`), which reads a
    few rows of each; experts by the configuration of this process. Adapters are named by their contents in the keys
    of blocks. Raises `CheckpointError`.
    """
    model, engine = checkpoint.config, config.engine
    backend = compute.backend
    facts = {
        "layout": LAYOUT,
        "code": _code_of(backend),
        "model code": _digest_of_code(),
        "model": sorted(model.raw.items()),
        "weights": checkpoint.fingerprint(weights_of_model(model)).hex(),
        "dtype": backend.dtype,
        "device": torch.cuda.get_device_name() if backend.device == "cuda" else backend.device,
        "computed by": (backend.trunk, backend.experts, backend.kernels, config.model.kernels),
        "trunk": config.trunk.quantize,
        "experts": [config.experts.quantize_of(expert) for expert in range(model.num_local_experts)],
        "positions": config.model.max_model_len or model.max_position_embeddings,
        "kv": (held_in(engine.kv_cache_dtype, backend.dtype), engine.block_size),
    }
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def _code_of(backend: Backend) -> str:
    """What computes, and its version."""
    if backend.kernels:
        return build.fingerprint_of(backend.kernels)
    triton = f", triton {version('triton')}" if "triton" in (backend.trunk, backend.experts) else ""
    return f"torch {torch.__version__}{triton}"


def _digest_of_code() -> str:
    """Of the source of the model's room: another version may round otherwise."""
    digest, room = hashlib.blake2b(digest_size=16), Path(next(iter(moe_ray.model.__path__)))
    for path in sorted(room.rglob("*.py")):
        digest.update(str(path.relative_to(room)).encode() + path.read_bytes())
    return digest.hexdigest()
