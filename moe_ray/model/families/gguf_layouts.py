"""How llama.cpp names the tensors of a GGUF file: alike in every family (gguf-py, constants.py)."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import BIASES, ExpertRole, Layout, Role
from moe_ray.model.families.layouts import EXPERT_ROLES, owner_of

Stacks = tuple[tuple[ExpertRole, ...], ...]
STACKED: Final[Stacks] = (("gate",), ("up",), ("down",))
JOINED: Final[Stacks] = (("gate", "up"), ("down",))
SEPARATE: Final[Stacks] = ()
"""A tensor for each expert: until April 2024."""


def gguf(stacks: Stacks, *, interleaved: bool) -> Layout:
    """A layout of llama.cpp's. A stacked tensor's name ends in ".weight" as those of one weight do.

    `interleaved`: whether q and k have their rotary pairs side by side, as architectures of LLAMA_ROPE_TYPE_NORM have
    (llama-model.cpp, llama_model_rope_type); those of LLAMA_ROPE_TYPE_NEOX are stored as Hugging Face has them.
    """
    layer = "blk.{layer}."
    stems: dict[Role, str] = {
        "embed": "token_embd",
        "input_norm": f"{layer}attn_norm",
        "q": f"{layer}attn_q",
        "k": f"{layer}attn_k",
        "v": f"{layer}attn_v",
        "q_norm": f"{layer}attn_q_norm",
        "k_norm": f"{layer}attn_k_norm",
        "out": f"{layer}attn_output",
        "post_norm": f"{layer}ffn_norm",
        "router": f"{layer}ffn_gate_inp",
        "shared_gate": f"{layer}ffn_gate_shexp",
        "shared_up": f"{layer}ffn_up_shexp",
        "shared_down": f"{layer}ffn_down_shexp",
        "shared_share": f"{layer}ffn_gate_inp_shexp",
        "dense_gate": f"{layer}ffn_gate",
        "dense_up": f"{layer}ffn_up",
        "dense_down": f"{layer}ffn_down",
        "norm": "output_norm",
        "head": "output",
    }
    for bias in BIASES:
        stems[bias] = f"{stems[owner_of(bias)]}.bias"
    for role in EXPERT_ROLES:
        stems[role] = f"{layer}ffn_{role}.{{expert}}"
    for stack in stacks:
        for role in stack:
            stems[role] = f"{layer}ffn_{'_'.join(stack)}_exps.weight"
    return Layout(stems, stacks, interleaved=interleaved)


IN_HALVES: Final = (gguf(STACKED, interleaved=False), gguf(JOINED, interleaved=False))
IN_PAIRS: Final = (gguf(STACKED, interleaved=True), gguf(JOINED, interleaved=True))
