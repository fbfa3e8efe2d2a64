"""Which weights a model needs: those of the trunk, and those of one expert in one layer."""

from __future__ import annotations

from collections.abc import Iterator

from moe_ray.model.families import Weight
from moe_ray.model.model_config import ModelConfig


def weights_of_trunk(config: ModelConfig) -> Iterator[Weight]:
    """Embeddings, attention, norms, routers and head (none where the embedding is the head)."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield Weight("embed", (c.vocab_size, c.hidden_size))
    for layer in range(c.num_hidden_layers):
        yield Weight("input_norm", (c.hidden_size,), layer)
        yield Weight("q", (q, c.hidden_size), layer)
        yield Weight("k", (kv, c.hidden_size), layer)
        yield Weight("v", (kv, c.hidden_size), layer)
        yield Weight("out", (c.hidden_size, q), layer)
        yield Weight("post_norm", (c.hidden_size,), layer)
        yield Weight("router", (c.num_local_experts, c.hidden_size), layer)
    yield Weight("norm", (c.hidden_size,))
    if not c.tie_word_embeddings:
        yield head_weight(config)


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
