"""What only some families have, read from config.json: routers by groups, latents, windows, layers without experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

from moe_ray.errors import CheckpointError
from moe_ray.model.config_reader import ConfigReader
from moe_ray.model.families import FULL, SLIDING, ClampedSwiGLU, ConfigKeys, Family, Router

LATENT_EPS: Final = 1e-6
"""Of the norms of latents, whatever `rms_norm_eps` says (DeepseekV3Attention of transformers)."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    A token's keys and values of all heads come from one latent vector, and one rotated key is common to all heads. What
    is cached is these two: attention is that of `num_attention_heads` queries and one key of `head_dim` numbers, which
    is the value as well. Queries are brought to the latents' space first, and outputs out of it (section 2.1.2: weights
    absorbed).
    """

    q_rank: int | None
    """Of the queries' latents; None: queries have none."""
    kv_rank: int
    nope: int
    """Of a head's queries and keys, the elements without positions, which come first."""
    rope: int
    """Those that are rotated."""
    value: int
    """Elements of a head's output."""
    interleaved: bool
    """Whether rotary pairs lie side by side in the checkpoint's rows."""
    scale: float
    """What products of queries and keys are multiplied by."""

    @property
    def query(self) -> int:
        """Elements of a head's query in the checkpoint's rows."""
        return self.nope + self.rope

    @property
    def width(self) -> int:
        """Elements that are cached of a token in a layer, and of a head's query: the latent, then what is rotated."""
        return self.kv_rank + self.rope


def latent_of(read: ConfigReader, keys: ConfigKeys) -> LatentAttention | None:
    """None where the family has none. Raises `CheckpointError`."""
    absent = keys.latent
    if absent is None:
        return None
    q_rank = read.get("q_lora_rank") if "q_lora_rank" in read.raw else absent.q_lora_rank
    found = LatentAttention(
        q_rank=None if q_rank is None else read.positive_int("q_lora_rank", q_rank),
        kv_rank=read.positive_int("kv_lora_rank", absent.kv_lora_rank),
        nope=read.positive_int("qk_nope_head_dim", absent.qk_nope_head_dim),
        rope=read.positive_int("qk_rope_head_dim", absent.qk_rope_head_dim),
        value=read.positive_int("v_head_dim", absent.v_head_dim),
        interleaved=True if absent.interleaved is None else read.flag("rope_interleave", absent.interleaved),
        scale=1.0,
    )
    if found.rope % 2:
        raise CheckpointError(f"{read.source}: `qk_rope_head_dim` {found.rope} must be even for rotary embeddings")
    return replace(found, scale=found.query**-0.5 * _magnitude(read) ** 2)


def _magnitude(read: ConfigReader) -> float:
    """What longer contexts multiply queries and keys by, each: `mscale_all_dim` of yarn (arXiv:2309.00071, section 3.4,
    in `yarn_get_mscale` of modeling_deepseek_v3.py). Raises `CheckpointError`."""
    told: dict[str, Any] = read.raw.get("rope_parameters") or read.raw.get("rope_scaling") or {}
    kind = told.get("rope_type") or told.get("type") or "default"
    if kind == "default" or not told.get("mscale_all_dim"):
        return 1.0
    inner = ConfigReader(told, read.source)
    factor, share = inner.positive_float("factor", 1.0), inner.positive_float("mscale_all_dim", 1.0)
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def router_of(read: ConfigReader, family: Family) -> Router:
    """How the family's router weighs experts in this model. Raises `CheckpointError`."""
    router, keys = family.router, family.config
    if keys.norm_topk_prob is not None:
        router = replace(router, renormalise=read.flag("norm_topk_prob", keys.norm_topk_prob))
    if keys.router_jitter_noise is not None:
        router = replace(router, jitter=read.positive_float("router_jitter_noise", keys.router_jitter_noise))
    return _grouped(read, router, keys)


def _grouped(read: ConfigReader, router: Router, keys: ConfigKeys) -> Router:
    absent = keys.grouped_router
    if absent is None:
        return router
    if keys.norm_topk_prob is None and read.flag("norm_topk_prob", False):
        raise CheckpointError(f"{read.source}: `norm_topk_prob` is True, which is not computed here; supported: False")
    if read.get("scoring_func") is not None:
        read.one_of("scoring_func", (absent.scoring_func,), absent.scoring_func)
    method = absent.topk_methods[0]
    if read.get("topk_method") is not None:
        method = read.one_of("topk_method", absent.topk_methods, method)
    router = replace(router, scale=read.positive_float("routed_scaling_factor", absent.routed_scaling_factor))
    if method == "greedy":
        return router
    groups = read.positive_int("n_group", absent.n_group)
    return replace(router, groups=groups, groups_chosen=read.positive_int("topk_group", absent.topk_group))


def check_groups(router: Router, experts: int, top_k: int, source: str) -> None:
    """Raises `CheckpointError` where groups of experts do not come out even, or have too few experts."""
    if router.groups == 1:
        return
    each = experts // router.groups
    if experts % router.groups or (router.group_scores == "best two" and each < 2):
        raise CheckpointError(f"{source}: n_group is {router.groups}, which does not divide {experts} experts")
    if router.groups_chosen > router.groups or top_k > router.groups_chosen * each:
        raise CheckpointError(
            f"{source}: num_experts_per_tok {top_k} of topk_group {router.groups_chosen} groups: there are "
            f"{router.groups} groups of {each} experts"
        )


def shared_size(read: ConfigReader, keys: ConfigKeys) -> int | None:
    """Inner size of the shared expert; None: there is none. Raises `CheckpointError`."""
    if keys.shared_intermediate_size is not None:
        return read.positive_int(keys.shared_intermediate_size)
    if keys.num_shared_experts is None:
        return None
    count = (
        read.get(keys.num_shared_experts) if keys.num_shared_experts in read.raw else keys.num_shared_experts_default
    )
    if not count:
        return None
    return read.positive_int(keys.num_shared_experts, count) * read.positive_int(keys.intermediate_size)


def dense_layers_of(read: ConfigReader, keys: ConfigKeys, layers: int) -> frozenset[int]:
    """Which of the layers have no experts. Raises `CheckpointError`."""
    if keys.dense_intermediate_size is None:
        return frozenset()
    if keys.first_dense is not None:
        first = read.get("first_k_dense_replace")
        dense = frozenset(range(read.count("first_k_dense_replace", keys.first_dense if first is None else first)))
    else:
        step, named = read.positive_int("decoder_sparse_step", 1), read.get("mlp_only_layers") or []
        if not isinstance(named, list) or not all(isinstance(layer, int) for layer in named):
            raise CheckpointError(f"{read.source}: `mlp_only_layers` must be a list of layers, found {named!r}")
        dense = frozenset(layer for layer in range(layers) if layer in named or (layer + 1) % step)
    if len(dense := dense & frozenset(range(layers))) == layers:
        raise CheckpointError(f"{read.source}: none of the {layers} layers has experts; a dense family is needed")
    return dense


def clamped_swiglu_of(read: ConfigReader, keys: ConfigKeys) -> ClampedSwiGLU | None:
    """None where the family's experts compute plain SwiGLU. Raises `CheckpointError`."""
    if (default := keys.clamped_swiglu) is None:
        return None
    limit = read.positive_float("swiglu_limit", default.limit)
    return ClampedSwiGLU(limit, read.positive_float("swiglu_alpha", default.alpha))


def clip_of(read: ConfigReader, keys: ConfigKeys) -> float | None:
    """The bound of queries, keys and values; None: there is none. Raises `CheckpointError`."""
    if not keys.clip_qkv or read.get("clip_qkv") is None:
        return None
    return read.positive_float("clip_qkv", 1.0)


def sliding_window_of(read: ConfigReader, keys: ConfigKeys, layers: int) -> tuple[int | None, frozenset[int]]:
    """How many positions each query sees (None: all), and the layers where it sees all the same.

    Only families with `layer_types` of their own mix both; of others, mixed ones are refused. Raises
    `CheckpointError`.
    """
    window = None
    if keys.sliding_window:
        found = read.get("sliding_window") if "sliding_window" in read.raw else keys.sliding_window_default
        window = read.positive_int("sliding_window", found) if found else None
    kinds = read.get("layer_types")
    if keys.layer_types and window is not None:
        if kinds is None:
            kinds = [keys.layer_types[layer % len(keys.layer_types)] for layer in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (SLIDING, FULL) for kind in kinds):
            raise CheckpointError(
                f"{read.source}: `layer_types` is {kinds!r}, supported: {SLIDING} or {FULL} for each of {layers} layers"
            )
        return window, frozenset(layer for layer, kind in enumerate(kinds) if kind == FULL)
    allowed = FULL if window is None else SLIDING
    if kinds is not None and any(kind != allowed for kind in kinds):
        raise CheckpointError(f"{read.source}: `layer_types` is {kinds!r}, supported: {allowed} in every layer")
    return window, frozenset()
