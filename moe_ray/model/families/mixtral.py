"""Mixtral (Jiang et al. 2024, arXiv:2401.04088), and what is converted to its format."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import ConfigKeys, Family, Layout, Role
from moe_ray.model.families.gguf_layouts import IN_PAIRS, SEPARATE, gguf
from moe_ray.model.families.layouts import TRANSFORMERS_STACK, hugging_face


def _layout(block: str, stacked: bool, model: str = "model.") -> Layout:
    if stacked:
        return hugging_face(block, model=model, stack=TRANSFORMERS_STACK)
    return hugging_face(block, model=model, experts=("w1", "w3", "w2"))


def _mistral(block: str) -> Layout:
    """Mistral's own names (mistral-inference, transformer.py). `block`: the module of router and experts."""
    layer = "layers.{layer}."
    expert = f"{layer}{block}.experts.{{expert}}."
    stems: dict[Role, str] = {
        "embed": "tok_embeddings",
        "input_norm": f"{layer}attention_norm",
        "q": f"{layer}attention.wq",
        "k": f"{layer}attention.wk",
        "v": f"{layer}attention.wv",
        "out": f"{layer}attention.wo",
        "post_norm": f"{layer}ffn_norm",
        "router": f"{layer}{block}.gate",
        "norm": "norm",
        "head": "output",
        "gate": f"{expert}w1",
        "up": f"{expert}w3",
        "down": f"{expert}w2",
    }
    return Layout(stems, interleaved=True)


MIXTRAL: Final = Family(
    model_type="mixtral",
    config=ConfigKeys(
        num_experts=("num_local_experts", "num_experts"),
        intermediate_size="intermediate_size",
        num_experts_default=8,
        num_experts_per_tok=2,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=True,
    ),
    layouts=(
        _layout("block_sparse_moe", stacked=False),  # Mistral AI's own, and what transformers saves
        _layout("mlp", stacked=True),  # transformers 5 saves its modules as they are
        _layout("block_sparse_moe", stacked=True),
        _layout("mlp", stacked=False),
        _layout("block_sparse_moe", stacked=False, model=""),  # without its head; transformers loads it, too
        _layout("mlp", stacked=True, model=""),
        _mistral("feed_forward"),
        _mistral("block_sparse_moe"),
        *IN_PAIRS,
        gguf(SEPARATE, interleaved=True),
    ),
)
