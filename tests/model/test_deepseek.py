"""DeepSeek's checkpoints as they are published: weights in float8 by blocks, and layers that predict further tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from backends import open_backend
from random_families import save_random_family
from safetensors.torch import load_file, save_file

from moe_ray.core import Request, SamplingParams
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.errors import CheckpointError
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.model.families.family import Router
from moe_ray.model.foreign import SINGLE
from moe_ray.model.moe import choose
from moe_ray.model.surplus import check_surplus
from moe_ray.model.trunk import Trunk

BLOCK = 32
PROMPT = tuple(range(3, 24))
KEPT = ("embed_tokens", "lm_head", "mlp.gate.")


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float8 codes, scales of blocks, and the values that these stand for, of a matrix [N, K]."""
    n, k = weight.shape
    blocks = weight.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448.0
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    values = codes.float() * scales[:, None, :, None]
    return codes.view(n, k), scales, values.view(n, k)


def published(directory: Path, floats: Path) -> None:
    """Make the checkpoint in `directory` one of float8 with a layer more, and `floats` one of what its codes are."""
    tensors, config = load_file(directory / SINGLE), json.loads((directory / "config.json").read_text())
    plain, stored = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        plain[name] = stored[name] = tensor
        if tensor.dim() == 2 and not any(kept in name for kept in KEPT):
            stored[name], stored[f"{name}_scale_inv"], plain[name] = quantised(tensor)
    layers = config["num_hidden_layers"]
    further = {
        name.replace(f"layers.{layers - 1}.", f"layers.{layers}."): tensor.clone()
        for name, tensor in stored.items()
        if f"layers.{layers - 1}." in name
    }
    floats.mkdir()
    save_file(plain, floats / SINGLE)
    (floats / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    save_file({**stored, **further}, directory / SINGLE)
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))


def generated(directory: Path, backend: str) -> list[int]:
    compute, checkpoint = open_backend(backend), Checkpoint.open(directory)
    trunk = Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 64)
    engine, tokens = Engine(trunk, EngineOptions(64, 8, max_model_len=48)), list[int]()
    engine.submit(Request("0", PROMPT, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens += event.token_ids
    return tokens


@pytest.mark.parametrize("backend", ["torch float32", "native float32"])
def test_float8_by_blocks_and_a_layer_behind_the_last(
    backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, floats = save_random_family(tmp_path / "float8", "deepseek_v3"), tmp_path / "floats"
    published(directory, floats)
    with caplog.at_level(logging.INFO):
        check_surplus(Checkpoint.open(directory))
    assert "layers behind the last, which predict further tokens (num_nextn_predict_layers)" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert generated(directory, backend) == generated(floats, backend)


def test_a_layer_without_experts_has_none_to_hold(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_random_family(tmp_path, "deepseek_v2"))
    compute = open_backend("torch float32")
    assert ExpertReader(checkpoint, [(0, 3), (1, 3)], compute).keys == ((1, 3),)
    with pytest.raises(CheckpointError, match="layers 0 have no experts"):
        ExpertReader(checkpoint, [(0, 3), (0, 4)], compute)


def test_groups_and_sigmoids_by_hand() -> None:
    logits = torch.tensor([[3.0, -1.0, 2.0, 1.5, 0.0, 2.8]])  # three groups of two
    best = Router(renormalise=False, groups=3, groups_chosen=1)
    weights, experts = choose(logits, 2, best)[::-1]
    assert experts.tolist() == [[0, 1]]
    assert weights[0].tolist() == pytest.approx(logits.softmax(-1)[0, :2].tolist())
    two = Router(True, sigmoid=True, correction=True, groups=3, groups_chosen=1, group_scores="best two", scale=2.5)
    weights, experts = choose(logits, 2, two)[::-1]
    assert experts.tolist() == [[2, 3]]  # 0.88 + 0.82 is more than 0.95 + 0.27
    scores = logits.sigmoid()[0, 2:4]
    assert weights[0].tolist() == pytest.approx((2.5 * scores / scores.sum()).tolist())
    corrected = choose(logits, 2, two, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]))[0]
    assert corrected.tolist() == [[0, 1]]  # what is added chooses, and weighs nothing
