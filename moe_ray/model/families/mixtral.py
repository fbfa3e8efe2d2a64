"""Mixtral (Jiang et al. 2024, arXiv:2401.04088), and what is converted to its format."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import ConfigKeys, Family, Layout, Role, Router


def _layout(model: str, block: str, stacked: bool) -> Layout:
    """`model`: the prefix of all but the head; `block`: the module of router and experts."""
    layer = f"{model}layers.{{layer}}."
    experts = f"{layer}{block}.experts."
    trunk: dict[Role, str] = {
        "embed": f"{model}embed_tokens",
        "input_norm": f"{layer}input_layernorm",
        "q": f"{layer}self_attn.q_proj",
        "k": f"{layer}self_attn.k_proj",
        "v": f"{layer}self_attn.v_proj",
        "out": f"{layer}self_attn.o_proj",
        "post_norm": f"{layer}post_attention_layernorm",
        "router": f"{layer}{block}.gate",
        "norm": f"{model}norm",
        "head": "lm_head",
    }
    if stacked:
        joined, down = f"{experts}gate_up_proj", f"{experts}down_proj"
        return Layout({**trunk, "gate": joined, "up": joined, "down": down}, stacks=(("gate", "up"), ("down",)))
    own = f"{experts}{{expert}}."
    return Layout({**trunk, "gate": f"{own}w1", "up": f"{own}w3", "down": f"{own}w2"})


MIXTRAL: Final = Family(
    model_type="mixtral",
    config=ConfigKeys(
        num_experts="num_local_experts",
        intermediate_size="intermediate_size",
        num_experts_default=8,
        num_experts_per_tok=2,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        hidden_act="silu",
    ),
    router=Router(renormalise=True),
    layouts=(
        _layout("model.", "block_sparse_moe", stacked=False),  # Mistral AI's own, and what transformers saves
        _layout("model.", "mlp", stacked=True),  # transformers 5 saves its modules as they are
        _layout("model.", "block_sparse_moe", stacked=True),
        _layout("model.", "mlp", stacked=False),
        _layout("", "block_sparse_moe", stacked=False),  # the model without its head; transformers loads it as well
        _layout("", "mlp", stacked=True),
    ),
    unused=("*rotary_emb.inv_freq",),
)
