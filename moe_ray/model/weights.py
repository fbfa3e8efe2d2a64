"""Which weights a model needs: those of the trunk, and those of one expert in one layer."""

from __future__ import annotations

from collections.abc import Iterator

from moe_ray.model.config_parts import LatentAttention
from moe_ray.model.families import EXPERT_BIASES, Bias, TrunkRole, Weight
from moe_ray.model.model_config import ModelConfig


def weights_of_trunk(config: ModelConfig) -> Iterator[Weight]:
    """Embeddings, attention, norms, routers, shared experts and what layers without experts have, biases, head (none
    where the embedding is the head)."""
    yield Weight("embed", (config.vocab_size, config.hidden_size))
    shapes = {dense: _layer_shapes(config, dense) for dense in (False, True)}
    for layer in range(config.num_hidden_layers):
        for role, shape in shapes[layer in config.dense_layers].items():
            yield Weight(role, shape, layer)
    yield Weight("norm", (config.hidden_size,))
    if "norm_bias" in config.biases:
        yield Weight("norm_bias", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield head_weight(config)
    if "head_bias" in config.biases:
        yield Weight("head_bias", (config.vocab_size,))


def _layer_shapes(c: ModelConfig, dense: bool) -> dict[TrunkRole, tuple[int, ...]]:
    """What the trunk has of a layer, and its shape. `dense`: of one without experts in a model that has some."""
    q, kv, hidden = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.hidden_size
    shapes: dict[TrunkRole, tuple[int, ...]] = {
        "input_norm": (hidden,),
        **({"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "out": (hidden, q)} if c.latent is None else {}),
        **({} if c.latent is None else _latent_shapes(c, c.latent)),
        "post_norm": (hidden,),
    }
    if dense:
        inner = c.dense_intermediate_size
        shapes |= {"dense_gate": (inner, hidden), "dense_up": (inner, hidden), "dense_down": (hidden, inner)}
    elif c.routed:
        shapes["router"] = (c.num_local_experts, hidden)
        if c.router.correction:
            shapes["router_correction"] = (c.num_local_experts,)
    if c.family.sinks:
        shapes["sinks"] = (c.num_attention_heads,)
    if c.family.qk_norm is not None:
        whole = c.family.qk_norm == "whole"
        shapes["q_norm"], shapes["k_norm"] = ((q,), (kv,)) if whole else ((c.head_dim,), (c.head_dim,))
    if c.shared_intermediate_size is not None and not dense:
        inner = c.shared_intermediate_size
        shapes["shared_gate"] = shapes["shared_up"] = (inner, hidden)
        shapes["shared_down"] = (hidden, inner)
        if c.shared_share:
            shapes["shared_share"] = (1, hidden)
    lengths: dict[Bias, int] = {
        **{"input_norm_bias": hidden, "q_bias": q, "k_bias": kv, "v_bias": kv, "out_bias": hidden},
        "post_norm_bias": hidden,
        "router_bias": c.num_local_experts,
    }
    return {**shapes, **{bias: (length,) for bias, length in lengths.items() if bias in c.biases}}


def _latent_shapes(c: ModelConfig, latent: LatentAttention) -> dict[TrunkRole, tuple[int, ...]]:
    """Of latent attention, in the order in which it is computed."""
    heads, hidden = c.num_attention_heads, c.hidden_size
    shapes: dict[TrunkRole, tuple[int, ...]] = {}
    if latent.q_rank is None:
        shapes["q"] = (heads * latent.query, hidden)
    else:
        shapes["q_a"], shapes["q_a_norm"] = (latent.q_rank, hidden), (latent.q_rank,)
        shapes["q_b"] = (heads * latent.query, latent.q_rank)
    return {
        **shapes,
        "kv_a": (latent.width, hidden),
        "kv_a_norm": (latent.kv_rank,),
        "kv_b": (heads * (latent.nope + latent.value), latent.kv_rank),
        "out": (hidden, heads * latent.value),
    }


def head_weight(config: ModelConfig) -> Weight:
    """The head's own matrix, whether the model has one or not."""
    return Weight("head", (config.vocab_size, config.hidden_size))


def weights_of_expert(config: ModelConfig, layer: int, expert: int) -> tuple[Weight, ...]:
    """All of one expert in one layer: `matrices_of_expert`, then `biases_of_expert`."""
    return (*matrices_of_expert(config, layer, expert), *biases_of_expert(config, layer, expert))


def biases_of_expert(config: ModelConfig, layer: int, expert: int) -> tuple[Weight, ...]:
    """Of gate [I], up [I] and down [D] of one expert in one layer; (): the model has none."""
    if not config.family.expert_biases:
        return ()
    lengths = (config.intermediate_size, config.intermediate_size, config.hidden_size)
    return tuple(Weight(role, (n,), layer, expert) for role, n in zip(EXPERT_BIASES, lengths, strict=True))


def matrices_of_expert(config: ModelConfig, layer: int, expert: int) -> tuple[Weight, Weight, Weight]:
    """Gate (w1) [I, D], up (w3) [I, D] and down (w2) [D, I] of one expert in one layer, which has experts."""
    inner, outer = config.intermediate_size, config.hidden_size
    return (
        Weight("gate", (inner, outer), layer, expert),
        Weight("up", (inner, outer), layer, expert),
        Weight("down", (outer, inner), layer, expert),
    )


def weights_of_model(config: ModelConfig) -> Iterator[Weight]:
    """All of them: the trunk's, then the experts' layer by layer."""
    yield from weights_of_trunk(config)
    for layer in config.mixture_layers:
        for expert in range(config.num_local_experts):
            yield from weights_of_expert(config, layer, expert)
