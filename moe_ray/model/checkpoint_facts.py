"""What a checkpoint directory is, for people and tools that list models. Reads no weights and never imports torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weight_files import find_weights
from moe_ray.model.weights import weights_of_model


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """Size, kind and identity of one checkpoint."""

    config: ModelConfig
    num_parameters: int
    nbytes: int
    """Of its weight files."""
    container: str
    """"safetensors" or "gguf"."""
    weights: str
    """How the weights are stored: the dtype, or the method by which they are quantised."""
    digest: str
    """SHA-256 of config.json's content and of the names and sizes of the weight files, in hexadecimal."""
    modified_s: float
    """When the newest weight file was written, in seconds since 1970."""


def checkpoint_facts(directory: Path) -> CheckpointFacts:
    """Look at a checkpoint directory. Raises `CheckpointError` as loading it would."""
    config = ModelConfig.load(directory)
    files = [directory / name for name in sorted(set(find_weights(directory)[0].values()))]
    stats = {path: path.stat() for path in files}
    identity = hashlib.sha256(repr(sorted(config.raw.items())).encode())
    for path, stat in stats.items():
        identity.update(f"{path.name} {stat.st_size}\n".encode())
    return CheckpointFacts(
        config=config,
        num_parameters=sum(weight.numel for weight in weights_of_model(config)),
        nbytes=sum(stat.st_size for stat in stats.values()),
        container="gguf" if files[0].suffix == ".gguf" else "safetensors",
        weights=config.dtype if config.quantization is None else config.quantization.method,
        digest=identity.hexdigest(),
        modified_s=max(stat.st_mtime for stat in stats.values()),
    )
