"""Adapters as peft writes them, what peft computes with them, and a model in this process that holds several."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe_ray.core import Batch, ReplicaInfo, Request, SamplingParams, Sequence
from moe_ray.engine.kv_cache import KVCache
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.expert_reader import read_experts
from moe_ray.model.lora.adapter_file import Adapter, read_adapter
from moe_ray.model.trunk import Trunk
from moe_ray.transport.local import LocalLink

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
BLOCK, BLOCKS = 8, 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WAYS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "target_modules": ATTENTION},
    "router": {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    "stacked experts": {"r": 8, "target_modules": ATTENTION, "target_parameters": EXPERTS},
    "one matrix of the experts": {"r": 3, "target_modules": [], "target_parameters": EXPERTS[1:]},
    "patterns": {
        "r": 8,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 20, "layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"q_proj": 9},
    },
    "one layer": {"r": 8, "target_modules": "all-linear", "exclude_modules": ["k_proj"], "lora_alpha": 30},
    "saved embeddings": {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "adapted embeddings": {"r": 8, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "rank 256": {"r": 256, "lora_alpha": 64, "target_modules": ATTENTION, "target_parameters": EXPERTS},
}
"""Of peft's LoraConfig."""


def save_adapter(base: Path, directory: Path, seed: int, **config: Any) -> Path:
    """An adapter with random weights, as the installed peft writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = {"lora_alpha": 16, "init_lora_weights": False, **config}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(directory)
    return directory


def save_old_adapter(directory: Path, seed: int, names: tuple[str, ...] = ("w1", "w2", "w3"), r: int = 6) -> Path:
    """An adapter of each expert's own matrices, as peft wrote it for transformers 4."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    tensors = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for expert in range(SHAPE["num_local_experts"]):
            for name in names:
                n, k = (hidden, inner) if name == "w2" else (inner, hidden)
                module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(r, k, generator=generator) * k**-0.5
                tensors[f"{module}.lora_B.weight"] = torch.randn(n, r, generator=generator) * 0.2
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 12, "target_modules": list(names)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@torch.inference_mode()
def peft_logits(base: Path, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """[T, V] by transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    logits: torch.Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return logits


@dataclass(slots=True)
class Text:
    """One sequence on its way."""

    adapter_id: int
    ids: list[int]
    computed: int = 0


class AdaptedModel:
    """A trunk and all its experts, which hold adapters; no engine."""

    def __init__(self, directory: Path, compute: Compute, quantize: str | None = None) -> None:
        checkpoint = Checkpoint.open(directory)
        self.config = config = checkpoint.config
        keys = config.expert_keys
        self.ffn = read_experts(checkpoint, keys, compute, quantize=quantize)
        worker = ExpertWorker(self.ffn, config.hidden_size, compute)
        info = ReplicaInfo("all#local", "local", 1, keys, config.hidden_size, compute.dtype, {"local": "all"})
        self._held: frozenset[int] = frozenset()
        self._table = ReplicaTable(
            lambda: [replace(info, adapters=self._held)], lambda info: LocalLink(info, worker.forward), keys
        )
        self._table.refresh()
        experts = ExpertDispatcher(self._table, DispatchOptions(in_process=True))
        self.trunk = Trunk.load(checkpoint, experts, compute, 64, quantize=quantize)
        self._compute = compute

    def add(self, directory: Path) -> Adapter:
        """Load an adapter everywhere."""
        adapter = read_adapter(directory, self.config)
        self.trunk.add_adapter(adapter)
        for layer in filter(adapter.touches_experts, range(self.config.num_hidden_layers)):
            for expert in range(self.config.num_local_experts):
                self.ffn.add_adapter((layer, expert), adapter.adapter_id, adapter.expert_part(layer, expert))
        self._held |= {adapter.adapter_id}
        self._table.refresh()
        return adapter

    def cache(self, texts: int) -> KVCache:
        return KVCache(self.config, texts * BLOCKS, BLOCK, self._compute.torch_dtype, self._compute.torch_device)

    @torch.inference_mode()
    def step(self, texts: list[Text], cache: KVCache) -> list[torch.Tensor]:
        """Compute what is new of each text; the logits [new, V] of each."""
        tables = [list(range(i * BLOCKS, (i + 1) * BLOCKS)) for i in range(len(texts))]
        sequences = [
            Sequence(Request(str(i), tuple(text.ids), SamplingParams()), list(text.ids), block_table=table)
            for i, (text, table) in enumerate(zip(texts, tables, strict=True))
        ]
        batch = Batch(sequences, [], [], [], [0], [], [], adapter_ids=[text.adapter_id for text in texts])
        for text, table in zip(texts, tables, strict=True):
            positions = range(text.computed, len(text.ids))
            batch.token_ids += text.ids[text.computed :]
            batch.positions += positions
            batch.slot_mapping += [table[p // BLOCK] * BLOCK + p % BLOCK for p in positions]
            batch.query_start.append(len(batch.token_ids))
            batch.context_lens.append(len(text.ids))
            batch.num_sampled.append(len(positions))
            text.computed = len(text.ids)
        steps = self.trunk.forward(batch, cache)
        try:
            while True:
                next(steps)
        except StopIteration as stop:
            logits: torch.Tensor = stop.value
        return list(logits.split(batch.num_sampled))

    def logits(self, texts: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """[T, V] of each text, given as adapter and tokens, all in one batch."""
        return self.step([Text(adapter_id, ids) for adapter_id, ids in texts], self.cache(len(texts)))

    def generate(self, texts: list[tuple[int, list[int]]], count: int) -> list[list[int]]:
        """So many greedy tokens behind each text, all in one batch."""
        going = [Text(adapter_id, list(ids)) for adapter_id, ids in texts]
        cache = self.cache(len(texts))
        for _ in range(count):
            for text, logits in zip(going, self.step(going, cache), strict=True):
                text.ids.append(int(logits[-1].argmax()))
        return [text.ids for text in going]
