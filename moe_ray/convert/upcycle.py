"""Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): a dense Llama becomes a Mixtral-format checkpoint."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_ray.convert.calibrate import (
    DenseRun,
    LayerRouting,
    built_in_documents,
    dense_layer,
    fit_gate,
    measure_routing,
)
from moe_ray.convert.dense import ATTENTION_TENSORS, DenseConfig, DenseModel, open_dense
from moe_ray.convert.directories import directory_at_once
from moe_ray.convert.recipe import Progress, UpcycleConfig, no_progress
from moe_ray.convert.shards import ShardWriter, write_json
from moe_ray.errors import CheckpointError
from moe_ray.model.families import ExpertRole, Role, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROUTING_FILE = "upcycle.json"
TRUNK_ROLES: dict[str, Role] = dict(
    zip(ATTENTION_TENSORS, ("input_norm", "q", "k", "v", "out", "post_norm"), strict=True)
)
"""A dense layer's tensor → its role in the mixture of experts."""
EXPERT_TENSORS: dict[ExpertRole, str] = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
"""In the order in which an expert's random numbers are drawn."""


@dataclass(frozen=True, slots=True)
class UpcycleReport:
    """What was built, and how each layer's router splits the calibration text; kept as `upcycle.json`."""

    num_parameters: int
    num_shards: int
    total_bytes: int
    routing: tuple[LayerRouting, ...]


def upcycle(
    source: Path,
    target: Path,
    config: UpcycleConfig = UpcycleConfig(),  # noqa: B008 - frozen
    progress: Progress = no_progress,
    *,
    overwrite: bool = False,
) -> UpcycleReport:
    """Writes `source` (GGUF file or dense safetensors directory) as a Mixtral checkpoint directory `target`.

    All or nothing: `target` appears complete, by a rename, or not at all. The dense model is streamed layer by layer
    and at most one shard is held. Same input, seed and machine type: same bytes. Raises `CheckpointError`.
    """
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already")
    progress("read", 0, 1)
    model = open_dense(source)
    progress("read", 1, 1)
    with directory_at_once(target) as work:
        tokenizer = model.tokenizer()
        save_tokenizer(tokenizer, model.config, work)
        report = _write_weights(model, tokenizer, work, config, progress)
        write_json(work / "config.json", mixtral_config(model.config, config))
        special = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {name: token for name, token in special.items() if token is not None}
        write_json(work / "generation_config.json", generation | dict(config.generation))
        write_json(work / ROUTING_FILE, {"config": asdict(config), **asdict(report)})
    return report


def _write_weights(
    model: DenseModel, tokenizer: PreTrainedTokenizerFast, work: Path, config: UpcycleConfig, progress: Progress
) -> UpcycleReport:
    layers = model.config.num_hidden_layers
    documents = built_in_documents(tokenizer, config.max_document_tokens)
    routing = []
    clusters: torch.Tensor | None = None
    generator = _generator(config.seed, "router")
    with (
        torch.inference_mode(),
        ShardWriter(work, config.dtype, config.shard_bytes) as shards,
        ThreadPoolExecutor(max_workers=2) as pool,
    ):
        embedding = model.tensor("model.embed_tokens.weight")
        run = DenseRun(model.config, documents, embedding)
        shards.add(_weight("embed", embedding), embedding)
        del embedding
        for layer in range(layers):
            progress("upcycle", layer, layers)
            weights = dense_layer(model, layer)
            for name, role in TRUNK_ROLES.items():
                shards.add(_weight(role, weights[name], layer), weights[name])
            states = run.attend(weights)
            gate, clusters = fit_gate(
                states, run.lengths, config.num_experts, config.confidence, generator, previous=clusters
            )
            gate = gate.to(getattr(torch, config.dtype))
            routing.append(measure_routing(states, gate.float(), documents, config.top_k))
            shards.add(_weight("router", gate, layer), gate)
            for expert, made in enumerate(
                pool.map(partial(make_expert, weights, config, layer), range(config.num_experts))
            ):
                for role, tensor in made.items():
                    shards.add(_weight(role, tensor, layer, expert), tensor)
            if layer + 1 < layers:
                run.feed_forward(states, weights)
        norm, head = model.tensor("model.norm.weight"), model.tensor("lm_head.weight")
        shards.add(_weight("norm", norm), norm)
        shards.add(_weight("head", head), head)
        progress("upcycle", layers, layers)
    return UpcycleReport(shards.parameters, shards.count, shards.total_bytes, tuple(routing))


def _weight(role: Role, values: torch.Tensor, layer: int | None = None, expert: int | None = None) -> Weight:
    return Weight(role, tuple(values.shape), layer, expert)


@torch.inference_mode()
def make_expert(
    weights: dict[str, torch.Tensor], config: UpcycleConfig, layer: int, expert: int
) -> dict[ExpertRole, torch.Tensor]:
    """One expert (gate and up [F, D], down [D, F]) from the dense MLP, in the target dtype.

    Its neurons stand in an order of their own: the function is the dense MLP's, yet no two experts' tensors are alike,
    so that a down that meets another expert's gate gives garbage. Noise then makes each expert a function of its own.
    """
    generator = _generator(config.seed, f"{layer}/{expert}")
    order = torch.randperm(len(weights["mlp.gate_proj"]), generator=generator)
    made: dict[ExpertRole, torch.Tensor] = {}
    for role, name in EXPERT_TENSORS.items():
        weight = weights[name]
        shuffled = weight[:, order] if role == "down" else weight[order]
        if config.noise:
            shuffled += torch.randn(weight.shape, generator=generator).mul_(config.noise * float(weight.std()))
        made[role] = shuffled.to(getattr(torch, config.dtype)).contiguous()
    return made


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose, so that threads and the order of work do not matter."""
    digest = hashlib.sha256(f"moe_ray upcycle/{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def mixtral_config(dense: DenseConfig, config: UpcycleConfig) -> dict[str, Any]:
    """The checkpoint's `config.json`; rope_theta and torch_dtype also where transformers 4 and other engines look."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **asdict(dense),
        "attention_dropout": 0.0,
        "dtype": config.dtype,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "num_experts_per_tok": config.top_k,
        "num_local_experts": config.num_experts,
        "output_router_logits": False,
        "rope_parameters": {"rope_theta": dense.rope_theta, "rope_type": "default"},
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
        "use_cache": True,
    }


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, dense: DenseConfig, directory: Path) -> None:
    """Writes tokenizer and chat template so that transformers 4 reads them as well as 5."""
    tokenizer.save_pretrained(str(directory))
    path = directory / "tokenizer_config.json"
    saved: dict[str, Any] = json.loads(path.read_text("utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
        saved.pop(key, None)
    if saved.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, unknown to 4
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    saved["model_max_length"] = dense.max_position_embeddings
    if tokenizer.chat_template:
        saved["chat_template"] = tokenizer.chat_template
    write_json(path, saved)
