"""Random dense Llamas, and mixtures of experts that are each the dense network, which say what these say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save_random_llama(directory: Path, *, seed: int, **shape: Any) -> Path:
    """Write a random Llama into `directory` in float32, and return that. `shape` is of transformers' LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**shape)).float().save_pretrained(directory)
    return directory


def save_mixture_of(dense: Path, directory: Path, num_experts: int = 4) -> Path:
    """Write a Mixtral whose experts all are the network of a dense Llama, so that it says what that one says."""
    import torch
    from safetensors.torch import load_file, save_file

    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    config = json.loads((dense / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        if not stem.endswith(".mlp"):
            tensors[name] = tensor
            continue
        block = stem.removesuffix("mlp") + "block_sparse_moe"
        tensors[f"{block}.gate.weight"] = torch.randn(num_experts, config["hidden_size"])
        for expert in range(num_experts):
            tensors[f"{block}.experts.{expert}.{names[part]}.weight"] = tensor.clone()
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    config |= {"num_local_experts": num_experts, "num_experts_per_tok": 2}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
