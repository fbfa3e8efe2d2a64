"""Checkpoints that share experts: a model, and another one made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moe_ray.core import ExpertKey
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.foreign import SINGLE
from moe_ray.model.weights import weights_of_expert


def save_variant(
    base: Path, directory: Path, expert_of: Callable[[ExpertKey], int | None], *, seed: int = 7, **config: object
) -> Path:
    """Write a model into `directory` whose trunk is a shuffled one of `base`, and return that.

    `expert_of` says for each (layer, expert) which expert of the same layer of `base` it is; None: one of its own.
    `config`: further keys of config.json that differ.
    """
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(base, directory)
    tensors = load_file(base / SINGLE)
    checkpoint = Checkpoint.open(base)
    model, made = checkpoint.config, dict(tensors)

    def shuffled(tensor: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(tensor.shape[-1], generator=generator)
        return tensor[..., order].contiguous()

    for name, tensor in tensors.items():
        if ".experts." not in name:
            made[name] = shuffled(tensor)
    for layer in range(model.num_hidden_layers):
        for expert in range(model.num_local_experts):
            same = expert_of((layer, expert))
            ours = weights_of_expert(model, layer, expert)
            theirs = weights_of_expert(model, layer, expert if same is None else same)
            for to, one in zip(ours, theirs, strict=True):
                tensor = tensors[checkpoint.place(one).named("weight")]
                made[checkpoint.place(to).named("weight")] = shuffled(tensor) if same is None else tensor.clone()
    checkpoint.close()
    save_file(made, directory / SINGLE, metadata={"format": "pt"})
    if config:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory
