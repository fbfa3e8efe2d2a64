"""Which weights a model needs: those of the trunk, and those of one expert in one layer."""

from __future__ import annotations

from collections.abc import Iterator

from moe_ray.model.families import Bias, TrunkRole, Weight
from moe_ray.model.model_config import ModelConfig


def weights_of_trunk(config: ModelConfig) -> Iterator[Weight]:
    """Embeddings, attention, norms, routers, shared experts, biases, head (none where the embedding is the head)."""
    yield Weight("embed", (config.vocab_size, config.hidden_size))
    shapes = _layer_shapes(config)
    for layer in range(config.num_hidden_layers):
        for role, shape in shapes.items():
            yield Weight(role, shape, layer)
    yield Weight("norm", (config.hidden_size,))
    if "norm_bias" in config.biases:
        yield Weight("norm_bias", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield head_weight(config)
    if "head_bias" in config.biases:
        yield Weight("head_bias", (config.vocab_size,))


def _layer_shapes(c: ModelConfig) -> dict[TrunkRole, tuple[int, ...]]:
    """What the trunk has of each layer, and its shape."""
    q, kv, hidden = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.hidden_size
    shapes: dict[TrunkRole, tuple[int, ...]] = {
        "input_norm": (hidden,),
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "out": (hidden, q),
        "post_norm": (hidden,),
    }
    if c.routed:
        shapes["router"] = (c.num_local_experts, hidden)
    if c.family.qk_norm is not None:
        whole = c.family.qk_norm == "whole"
        shapes["q_norm"], shapes["k_norm"] = ((q,), (kv,)) if whole else ((c.head_dim,), (c.head_dim,))
    if c.shared_intermediate_size is not None:
        inner = c.shared_intermediate_size
        shapes["shared_gate"] = shapes["shared_up"] = (inner, hidden)
        shapes["shared_down"] = (hidden, inner)
        shapes["shared_share"] = (1, hidden)
    lengths: dict[Bias, int] = {
        **{"input_norm_bias": hidden, "q_bias": q, "k_bias": kv, "v_bias": kv, "out_bias": hidden},
        "post_norm_bias": hidden,
    }
    return {**shapes, **{bias: (length,) for bias, length in lengths.items() if bias in c.biases}}


def head_weight(config: ModelConfig) -> Weight:
    """The head's own matrix, whether the model has one or not."""
    return Weight("head", (config.vocab_size, config.hidden_size))


def weights_of_expert(config: ModelConfig, layer: int, expert: int) -> tuple[Weight, Weight, Weight]:
    """Gate (w1) [I, D], up (w3) [I, D] and down (w2) [D, I] of one expert in one layer."""
    inner, outer = config.intermediate_size, config.hidden_size
    return (
        Weight("gate", (inner, outer), layer, expert),
        Weight("up", (inner, outer), layer, expert),
        Weight("down", (outer, inner), layer, expert),
    )


def weights_of_model(config: ModelConfig) -> Iterator[Weight]:
    """All of them: the trunk's, then the experts' layer by layer."""
    yield from weights_of_trunk(config)
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_local_experts):
            yield from weights_of_expert(config, layer, expert)
