"""Reads values of a config.json, and refuses by name what would have a model computed otherwise than it is here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from moe_ray.errors import CheckpointError

NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    **dict.fromkeys(("attention_bias", "qkv_bias", "mlp_bias", "lm_head_bias", "attention_out_bias"), (False,)),
    **dict.fromkeys(("use_bias", "use_qkv_bias", "use_sliding_window", "use_qk_norm", "qk_layernorm"), (False,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "partial_rotary_factor"), (1,)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_layer_freq"), (1,)),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "shared_intermediate_size"), (0,)),
    **dict.fromkeys(("shared_expert_intermediate_size", "first_k_dense_replace", "sliding_window"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), ()),
    **dict.fromkeys(("attention_multiplier", "attention_chunk_size", "q_lora_rank", "kv_lora_rank"), ()),
    **dict.fromkeys(("swiglu_limit", "swiglu_alpha"), ()),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "no_rope_layers": ([],),
}
"""Keys that change what a model computes → the values with which they do not, beside null and being absent."""


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Values of one config.json; remembers which were asked for. Methods raise `CheckpointError` naming the key."""

    raw: Mapping[str, Any]
    source: str
    """Of `raw`, for messages."""
    _seen: set[str] = field(default_factory=set)

    def get(self, key: str) -> Any:
        """The value of a key, whatever it is; None where it is absent."""
        self._seen.add(key)
        return self.raw.get(key)

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.source}: `{key}` must be a positive integer, found {value!r}")
        return value

    def count(self, key: str, default: int) -> int:
        """A whole number from 0 on."""
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{self.source}: `{key}` must be an integer from 0 on, found {value!r}")
        return value

    def positive_float(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise CheckpointError(f"{self.source}: `{key}` must be a positive number, found {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.source}: `{key}` must be true or false, found {value!r}")
        return value

    def one_of(self, key: str, allowed: Sequence[str], default: str) -> str:
        self._seen.add(key)
        value = self.raw.get(key, default)
        if value not in allowed:
            raise CheckpointError(f"{self.source}: `{key}` is {value!r}, supported: {', '.join(allowed)}")
        return str(value)

    def first(self, keys: Sequence[str]) -> str:
        """The first of these keys that the file has; of none, the first."""
        self._seen.update(keys)
        return next((key for key in keys if self.raw.get(key) is not None), keys[0])

    def refuse_other_computing(self, irrelevant: Sequence[str], what: str) -> None:
        """Raise on a key of `NEUTRAL` that was not asked for, is not `irrelevant`, and has another value.

        `what` has it, in words.
        """
        for key, neutral in NEUTRAL.items():
            value = self.raw.get(key)
            if value is None or value in neutral or key in self._seen or key in irrelevant:
                continue
            allowed = ", ".join(map(repr, (*neutral, None)))
            raise CheckpointError(
                f"{self.source}: `{key}` is {value!r}, which is not computed for {what}; supported: {allowed}"
            )
