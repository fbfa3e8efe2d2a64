"""Dense Llama-architecture models as a source of tensors: a GGUF file or a Hugging Face safetensors directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import safe_open

from moe_ray.convert.gguf_metadata import GgufMetadata
from moe_ray.convert.gguf_tokenizer import tokenizer_config_of, tokenizer_of
from moe_ray.errors import CheckpointError
from moe_ray.model.foreign import refuse_foreign
from moe_ray.model.formats.quantization import quantization_of
from moe_ray.model.gguf_file import read_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ATTENTION_TENSORS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
)
"""Of a layer: what dense model and mixture of experts have in common."""
GGUF_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """Shape of a dense Llama model, in Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    sliding_window: int | None = None


class DenseModel(Protocol):
    """A dense model read tensor by tensor, so that only what is in use is in memory."""

    config: DenseConfig

    def tensor(self, name: str) -> torch.Tensor:
        """The float32 tensor of this Hugging Face name; `lm_head.weight` is the embedding where those are tied."""

    def tokenizer(self) -> PreTrainedTokenizerFast: ...


def open_dense(path: Path) -> DenseModel:
    """Opens a GGUF file or a safetensors directory; raises `CheckpointError` where it is neither or not a Llama."""
    if path.is_file() and path.suffix == ".gguf":
        return GgufModel(path)
    if (path / "config.json").is_file():
        refuse_foreign(path)
        return SafetensorsModel(path)
    raise CheckpointError(f"{path} is neither a .gguf file nor a directory with a config.json")


class GgufModel:
    """A Llama GGUF file, dequantised tensor by tensor (the file itself is memory-mapped)."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise CheckpointError("reading GGUF files needs the package gguf: pip install gguf") from error
        self._path = path
        try:
            reader = GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        self._fields = reader.fields
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in reader.tensors}
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path} has architecture {architecture!r}; only 'llama' can be upcycled")
        if self._field("llama.expert_count", 0):
            raise CheckpointError(f"{path} is a mixture of experts already")
        scaling = self._field("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise CheckpointError(f"{path} uses scaled rotary embeddings ({scaling}), which are not supported")
        self.config = self._read_config()

    def _field(self, key: str, *default: Any) -> Any:
        if key in self._fields:
            return self._fields[key].contents()
        if default:
            return default[0]
        raise CheckpointError(f"{self._path} has no metadata {key!r}")

    def _read_config(self) -> DenseConfig:
        hidden, heads = self._field("llama.embedding_length"), self._field("llama.attention.head_count")
        eos = self._field("tokenizer.ggml.eos_token_id", None)
        return DenseConfig(
            vocab_size=int(self._tensors["model.embed_tokens.weight"].shape[1]),  # GGUF lists the inner dimension first
            hidden_size=hidden,
            intermediate_size=self._field("llama.feed_forward_length"),
            num_hidden_layers=self._field("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._field("llama.attention.head_count_kv", heads),
            head_dim=self._field("llama.attention.key_length", hidden // heads),
            max_position_embeddings=self._field("llama.context_length"),
            # GGUF stores float32; 9.999999747378752e-06 was 1e-05
            rms_norm_eps=float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            rope_theta=float(self._field("llama.rope.freq_base", 10000.0)),
            bos_token_id=self._field("tokenizer.ggml.bos_token_id", None),
            eos_token_id=eos,
            pad_token_id=self._field("tokenizer.ggml.padding_token_id", eos),
        )

    @staticmethod
    def _hf_name(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in GGUF_TOP_NAMES:
            return f"{GGUF_TOP_NAMES[stem]}.{kind}"
        if stem.startswith("blk."):
            _, layer, part = stem.split(".", 2)
            return f"model.layers.{layer}.{GGUF_NAMES.get(part, part)}.{kind}"
        return name

    def tensor(self, name: str) -> torch.Tensor:
        from gguf.quants import dequantize

        if name == "lm_head.weight" and name not in self._tensors:
            name = "model.embed_tokens.weight"
        if name not in self._tensors:
            raise CheckpointError(f"{self._path} has no tensor for {name}")
        stored = self._tensors[name]
        weight = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type)))
        if name.endswith("self_attn.q_proj.weight"):
            return unpermute(weight, self.config.num_attention_heads)
        if name.endswith("self_attn.k_proj.weight"):
            return unpermute(weight, self.config.num_key_value_heads)
        return weight

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from transformers import PreTrainedTokenizerFast

        metadata = GgufMetadata(str(self._path), read_gguf(self._path).metadata)
        options = tokenizer_config_of(metadata)
        options.pop("tokenizer_class")
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(metadata), **options)


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rotary pairs side by side, as llama.cpp's `convert_hf_to_gguf.py` stores them → in halves, as HF has them."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


class SafetensorsModel:
    """A dense Llama (or Mistral) directory in Hugging Face's format."""

    def __init__(self, path: Path) -> None:
        self._path = path
        raw: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))
        if raw.get("model_type") not in ("llama", "mistral"):
            raise CheckpointError(f"{path} has model_type {raw.get('model_type')!r}; allowed: 'llama', 'mistral'")
        if quantised := quantization_of(raw, str(path / "config.json")):
            raise CheckpointError(f"{path} is quantised ({quantised.method}); only float weights can be upcycled")
        if raw.get("attention_bias") or raw.get("mlp_bias") or raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{path} has biases or another activation than silu, which Mixtral does not have")
        # transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling
        rope: dict[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise CheckpointError(
                f"{path} uses scaled rotary embeddings ({rope['rope_type']}), which are not supported"
            )
        heads = raw["num_attention_heads"]
        self.config = DenseConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads", heads),
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=raw.get("eos_token_id"),
            pad_token_id=raw.get("pad_token_id"),
            sliding_window=raw.get("sliding_window"),
        )
        index = path / "model.safetensors.index.json"
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else set()
        self._files: dict[str, Path] = {}
        for name in sorted(names) or ["model.safetensors"]:
            if not (path / name).is_file():
                raise CheckpointError(f"{path / name} is missing")
            with safe_open(path / name, framework="pt") as shard:
                self._files.update(dict.fromkeys(shard.keys(), path / name))

    def tensor(self, name: str) -> torch.Tensor:
        if name == "lm_head.weight" and name not in self._files:
            name = "model.embed_tokens.weight"
        if name not in self._files:
            raise CheckpointError(f"{self._path} has no tensor {name}")
        with safe_open(self._files[name], framework="pt") as shard:
            stored: torch.Tensor = shard.get_tensor(name)
        return stored.float()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self._path))
