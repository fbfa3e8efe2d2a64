"""How Hugging Face's checkpoints name their tensors: much the same in every family."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import BIASES, ExpertRole, Layout, Role

EXPERT_ROLES: Final[tuple[ExpertRole, ...]] = ("gate", "up", "down")
PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")
TRANSFORMERS_STACK: Final = ("experts.gate_up_proj", "experts.down_proj")
"""transformers 5 holds, and may save, the experts of a layer as two tensors: gates above ups, and downs."""


def hugging_face(
    block: str,
    *,
    model: str = "model.",
    router: str = "gate",
    experts: tuple[str, str, str] = PROJECTIONS,
    stack: tuple[str, str] | None = None,
    dense: bool = False,
    shared: str = "shared_expert",
) -> Layout:
    """A layout of Hugging Face's.

    `block`: the module of router and experts; `model`: the prefix of all but the head. `experts`: the names of gate,
    up and down in an expert, or with `dense` in the block itself. `shared`: the module of the shared expert. `stack`:
    the names of all experts' gates and ups in one tensor, and of their downs; a parameter has its whole name, a
    module's tensor `.weight` with it.
    """
    layer = f"{model}layers.{{layer}}."
    attention = f"{layer}self_attn."
    beside = f"{layer}{block}.{shared}"
    stems: dict[Role, str] = {
        "embed": f"{model}embed_tokens",
        "input_norm": f"{layer}input_layernorm",
        **{role: f"{attention}{role}_proj" for role in ("q", "k", "v")},
        "q_norm": f"{attention}q_norm",
        "k_norm": f"{attention}k_norm",
        "out": f"{attention}o_proj",
        "post_norm": f"{layer}post_attention_layernorm",
        "router": f"{layer}{block}.{router}",
        "router_correction": f"{layer}{block}.{router}.e_score_correction_bias",
        "shared_gate": f"{beside}.gate_proj",
        "shared_up": f"{beside}.up_proj",
        "shared_down": f"{beside}.down_proj",
        "shared_share": f"{beside}_gate",
        "dense_gate": f"{layer}{block}.gate_proj",
        "dense_up": f"{layer}{block}.up_proj",
        "dense_down": f"{layer}{block}.down_proj",
        "q_a": f"{attention}q_a_proj",
        "q_a_norm": f"{attention}q_a_layernorm",
        "q_b": f"{attention}q_b_proj",
        "kv_a": f"{attention}kv_a_proj_with_mqa",
        "kv_a_norm": f"{attention}kv_a_layernorm",
        "kv_b": f"{attention}kv_b_proj",
        "norm": f"{model}norm",
        "head": "lm_head",
    }
    for bias in BIASES:
        stems[bias] = f"{stems[owner_of(bias)]}.bias"
    if stack is not None:
        joined, down = (f"{layer}{block}.{name}" for name in stack)
        return Layout({**stems, "gate": joined, "up": joined, "down": down}, stacks=(("gate", "up"), ("down",)))
    own = f"{layer}{block}." if dense else f"{layer}{block}.experts.{{expert}}."
    for role, name in zip(EXPERT_ROLES, experts, strict=True):
        stems[role] = f"{own}{name}"
    return Layout(stems)


def owner_of(bias: str) -> Role:
    """The weight that a bias goes with."""
    role: Role = bias.removesuffix("_bias")  # type: ignore[assignment]  # the names of biases are made so
    return role
