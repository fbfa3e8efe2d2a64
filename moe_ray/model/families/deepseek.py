"""DeepSeek's mixtures: V2 (2024, arXiv:2405.04434) and V3, of which R1 is one (2024, arXiv:2412.19437)."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import ConfigKeys, Family, GroupedRouterKeys, LatentKeys, Router
from moe_ray.model.families.layouts import TRANSFORMERS_STACK, hugging_face

_LAYOUTS: Final = (
    hugging_face("mlp", shared="shared_experts"),
    hugging_face("mlp", shared="shared_experts", stack=TRANSFORMERS_STACK),
)

DEEPSEEK_V2: Final = Family(
    model_type="deepseek_v2",
    config=ConfigKeys(
        intermediate_size="moe_intermediate_size",
        num_shared_experts="n_shared_experts",
        num_shared_experts_default=2,
        dense_intermediate_size="intermediate_size",
        first_dense=0,
        num_experts=("n_routed_experts", "num_local_experts", "num_experts"),
        num_experts_default=64,
        num_experts_per_tok=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_types=("default", "linear", "yarn"),
        latent=LatentKeys(),
        grouped_router=GroupedRouterKeys(1.0, None, None, "softmax", ("greedy", "group_limited_greedy")),
    ),
    layouts=_LAYOUTS,
    router=Router(renormalise=False, wide=True),
)

DEEPSEEK_V3: Final = Family(
    model_type="deepseek_v3",
    config=ConfigKeys(
        intermediate_size="moe_intermediate_size",
        num_shared_experts="n_shared_experts",
        num_shared_experts_default=1,
        dense_intermediate_size="intermediate_size",
        first_dense=3,
        num_experts=("n_routed_experts", "num_local_experts", "num_experts"),
        num_experts_default=256,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_types=("default", "linear", "yarn"),
        latent=LatentKeys(interleaved=True),
        grouped_router=GroupedRouterKeys(2.5, 8, 4, "sigmoid", ("noaux_tc",)),
    ),
    layouts=_LAYOUTS,
    router=Router(renormalise=True, wide=True, sigmoid=True, correction=True, group_scores="best two"),
    further_layers="num_nextn_predict_layers",
)
