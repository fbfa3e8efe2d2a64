"""Writes small GGUF files of Mixtral checkpoints, as llama.cpp's converter does: names, row order, metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType
from gguf.gguf_writer import GGUFValue
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.weights import weights_of_model

Era = Literal["stacked", "separate", "joined"]
"""How experts lie: stacked by role; a tensor each (until April 2024); gate and up in one stack."""
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As `LlamaModel.permute` of convert_hf_to_gguf.py."""
    paired = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def tensors_of(directory: Path, era: Era = "stacked") -> Iterator[tuple[str, np.ndarray]]:
    """GGUF name and float32 values of all tensors of a checkpoint with an expert's tensors each."""
    config = config_of(directory)
    files = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor.float().numpy() for file in files for name, tensor in load_file(file).items()}
    yield "token_embd.weight", tensors["model.embed_tokens.weight"]
    yield "output_norm.weight", tensors["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        yield "output.weight", tensors["lm_head.weight"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in NAMES.items():
            values = tensors[f"model.layers.{layer}.{theirs}.weight"]
            yield f"blk.{layer}.{ours}.weight", permute(values, heads[ours]) if ours in heads else values
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        of = {
            role: [tensors[f"{experts}.{e}.{name}.weight"] for e in range(config["num_local_experts"])]
            for role, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        }
        if era == "separate":
            for role, matrices in of.items():
                for expert, matrix in enumerate(matrices):
                    yield f"blk.{layer}.ffn_{role}.{expert}.weight", matrix
            continue
        stacks = {role: np.stack(matrices) for role, matrices in of.items()}
        if era == "joined":
            stacks["gate_up"] = np.concatenate([stacks.pop("gate"), stacks.pop("up")], axis=1)
        for role, stack in stacks.items():
            yield f"blk.{layer}.ffn_{role}_exps.weight", stack


def write_gguf(
    source: Path,
    target: Path,
    era: Era = "stacked",
    kind: str = "F32",
    tokenizer: PreTrainedTokenizerFast | None = None,
    pre: str = "smollm",
    split: int = 0,
    **metadata: int | float | str,
) -> Path:
    """Write `target` with the weights of `source`, matrices in the block type `kind`; norms and routers stay float32.

    `split`: bytes of a file of several. `metadata`: further keys, `__` for a dot; they replace those of the same name.
    """
    config = config_of(source)
    writer = GGUFWriter(target, "llama", split_max_size=split)
    _add_shape(writer, config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    for key, value in metadata.items():
        kind_of_value = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}[
            type(value)
        ]
        writer.kv_data[0][key.replace("__", ".")] = GGUFValue(value, kind_of_value)
    if tokenizer is not None:
        add_vocabulary(writer, tokenizer, pre, config["vocab_size"])
    qtype = GGMLQuantizationType[kind]
    for name, values in tensors_of(source, era):
        plain = values.ndim == 1 or "ffn_gate_inp" in name
        written = GGMLQuantizationType.F32 if plain else qtype
        writer.add_tensor(name, quantize(np.ascontiguousarray(values), written), raw_dtype=written)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_shape(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Of a mixture, whatever its architecture."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


TENSORS = {
    **{"embed": MODEL_TENSOR.TOKEN_EMBD, "norm": MODEL_TENSOR.OUTPUT_NORM, "head": MODEL_TENSOR.OUTPUT},
    **{"input_norm": MODEL_TENSOR.ATTN_NORM, "post_norm": MODEL_TENSOR.FFN_NORM, "router": MODEL_TENSOR.FFN_GATE_INP},
    **{"q": MODEL_TENSOR.ATTN_Q, "k": MODEL_TENSOR.ATTN_K, "v": MODEL_TENSOR.ATTN_V, "out": MODEL_TENSOR.ATTN_OUT},
    **{"q_norm": MODEL_TENSOR.ATTN_Q_NORM, "k_norm": MODEL_TENSOR.ATTN_K_NORM},
    **{"gate": MODEL_TENSOR.FFN_GATE_EXP, "up": MODEL_TENSOR.FFN_UP_EXP, "down": MODEL_TENSOR.FFN_DOWN_EXP},
    **{"shared_gate": MODEL_TENSOR.FFN_GATE_SHEXP, "shared_up": MODEL_TENSOR.FFN_UP_SHEXP},
    **{"shared_down": MODEL_TENSOR.FFN_DOWN_SHEXP, "shared_share": MODEL_TENSOR.FFN_GATE_INP_SHEXP},
}
"""Role of a weight → llama.cpp's tensor."""


def write_family(source: Path, target: Path, architecture: str, **metadata: bool) -> Path:
    """Write `target` with the weights of `source`, in float32, as llama.cpp's converter does for an architecture.

    `metadata`: flags beside those that the converter writes, `__` for a dot.
    """
    config = config_of(source)
    checkpoint = Checkpoint.open(source)
    writer = GGUFWriter(target, architecture)
    _add_shape(writer, config)
    for key, add in (
        ("head_dim", writer.add_key_length),
        ("head_dim", writer.add_value_length),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("clip_qkv", writer.add_clamp_kqv),
    ):
        if config.get(key) is not None:
            add(config[key])
    for key, value in metadata.items():
        writer.add_bool(f"{architecture}.{key.replace('__', '.')}", value)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    stacks: dict[str, list[np.ndarray]] = {}
    for weight in weights_of_model(checkpoint.config):
        role, suffix = weight.role.removesuffix("_bias"), "bias" if weight.role.endswith("_bias") else "weight"
        values = checkpoint.read_values(weight)
        if architecture == "granitemoe" and role in heads:
            values = permute(values, heads[role])
        name = f"{TENSOR_NAMES[TENSORS[role]].format(bid=weight.layer)}.{suffix}"
        if weight.expert is None:
            writer.add_tensor(name, np.ascontiguousarray(values[0] if role == "shared_share" else values))
        else:
            stacks.setdefault(name, []).append(values)
    for name, matrices in stacks.items():
        writer.add_tensor(name, np.stack(matrices))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, pre: str, size: int) -> None:
    """A byte-level tokenizer's vocabulary, padded to the model's size."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    kinds = [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    kinds += [TokenType.UNUSED] * (size - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
