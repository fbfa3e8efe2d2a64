"""Small random Mixtrals in quantised formats, and the proof that each weight is read as a reference reads it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.families import Weight
from moe_ray.model.foreign import SINGLE
from moe_ray.model.formats import FORMATS, Grouping
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus
from moe_ray.model.weights import weights_of_expert, weights_of_model

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "torch_dtype": "float16",
}
PLAIN = ("embed", "input_norm", "post_norm", "norm", "router", "head")
"""Roles that checkpoints leave in floats."""
W1 = "model.layers.0.block_sparse_moe.experts.0.w1."
"""Of one weight that every quantised model has: [256, 128]."""
SHAPE = (256, 128)

Made = tuple[dict[str, torch.Tensor], torch.Tensor]
"""One weight's tensors by suffix, and its values as the reference has them."""


@dataclass(frozen=True)
class Written:
    directory: Path
    expected: dict[Weight, torch.Tensor]

    def change(self, **tensors: torch.Tensor | None) -> Path:
        """Replace tensors of `W1` by suffix; None: take one away."""
        held = load_file(self.directory / SINGLE)
        for suffix, tensor in tensors.items():
            held.pop(W1 + suffix, None)
            if tensor is not None:
                held[W1 + suffix] = tensor
        save_file(held, self.directory / SINGLE)
        return self.directory


def write(
    directory: Path,
    quantise: Callable[[torch.Tensor], Made],
    quantization_config: dict[str, Any] | None,
    plain: tuple[str, ...] = PLAIN,
    layout: int = 0,
    **config: Any,
) -> Written:
    """A model whose weights, but those of the roles `plain`, are what `quantise` makes of random values.

    `layout`: a row of Mixtral's; 1 stacks experts.
    """
    raw = {**CONFIG, **config}
    if quantization_config is not None:
        raw["quantization_config"] = quantization_config
    (directory / "config.json").write_text(json.dumps(raw))
    model = ModelConfig.from_dict({**CONFIG, **config})
    random = torch.Generator().manual_seed(1)
    tensors, expected = {}, {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for weight in weights_of_model(model):
        place = model.family.layouts[layout].place(weight, model.num_local_experts)
        values = torch.randn(weight.shape, generator=random) * 0.05
        if weight.role in plain or len(weight.shape) == 1:
            tensors[place.named("weight")] = values.half()
            expected[weight] = values.half().float()
            continue
        made, expected[weight] = quantise(values)
        if place.experts is not None:
            for suffix, tensor in made.items():
                stacks.setdefault(place.named(suffix), []).append(tensor)
            continue
        tensors |= {place.named(suffix): tensor.contiguous().clone() for suffix, tensor in made.items()}
    for name, parts in stacks.items():  # in the order of a stack: gate and up of the first expert, of the second …
        tensors[name] = torch.cat(parts).reshape(model.num_local_experts, -1, *parts[0].shape[1:])
    save_file(tensors, directory / SINGLE)
    return Written(directory, expected)


def read_equals(
    written: Written,
    caplog: pytest.LogCaptureFixture,
    row: str,
    grouping: Callable[[tuple[int, ...]], Grouping | None],
    relative: float = 0.0,
    absolute: float = 0.0,
) -> None:
    """Every weight is what the reference says, as values and as codes; no tensor is left over or read by others.

    `relative`: what values may differ by. `absolute`: what codes may, where their products and sums are other ones.
    """
    checkpoint = Checkpoint.open(written.directory)
    with caplog.at_level(logging.WARNING):
        check_surplus(checkpoint)
    assert not [record for record in caplog.records if record.name.startswith("moe_ray")]
    total = checkpoint.check(written.expected)
    for weight, expected in written.expected.items():
        stored = checkpoint.find(weight)
        values = checkpoint.read(weight, torch.float32)
        torch.testing.assert_close(values, expected.float(), rtol=relative, atol=0, msg=str(weight))
        if stored.format in ("float32", "float16", "bfloat16"):
            continue
        assert stored.format == row
        assert stored.grouping == grouping(weight.shape), weight
        codes = FORMATS[row].codes(stored, checkpoint.arrays(stored))
        assert (codes is None) == (stored.grouping is None)
        if codes is not None:
            assert codes.grouping == stored.grouping
            assert codes.codes.dtype == np.uint8
            assert codes.scales.dtype == np.float32
            arrays = (codes.codes, codes.scales, codes.offsets, codes.order)
            assert all(array is None or array.flags.c_contiguous for array in arrays)
            np.testing.assert_allclose(codes.values(), expected.float().numpy(), rtol=relative, atol=absolute)
    assert checkpoint.bytes_read == total
    for weight in written.expected:
        checkpoint.fingerprint([weight])
    own = Checkpoint.open(written.directory)
    weights = weights_of_expert(own.config, 1, 2)
    for weight in weights:
        own.read(weight, torch.bfloat16)
    held = load_file(written.directory / SINGLE)
    experts = {name: tensor.nbytes for name, tensor in held.items() if ".layers.1." in name and ".experts." in name}
    alone = sum(nbytes for name, nbytes in experts.items() if ".experts.2." in name)  # 0 where experts are stacked
    assert own.bytes_read <= (alone or sum(experts.values()) // own.config.num_local_experts)


def refused(directory: Path, *named: str) -> None:
    """The model in `directory` is refused before any weight is read, and the error says each of `named`."""

    def check() -> None:
        checkpoint = Checkpoint.open(directory)
        checkpoint.check(weights_of_model(checkpoint.config))

    with pytest.raises(CheckpointError) as caught:
        check()
    for text in (str(directory), *named):
        assert text in str(caught.value)
