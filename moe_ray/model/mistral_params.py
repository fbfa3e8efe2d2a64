"""Mistral's params.json in Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moe_ray.errors import CheckpointError

MAX_POSITIONS: Final = 32768
"""Where the file does not say: of Mixtral 8x7B (mistral-inference has no bound)."""

_NAMES: Final = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "tied_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "max_seq_len": "max_position_embeddings",
}
_MOE_NAMES: Final = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
_NO_MATTER: Final = {"max_batch_size", "model_type", "use_biases", "causal", "dtype", "activation"}
"""Keys that change nothing where they are as in any Mixtral; `_REQUIRED` says how that is."""
_REQUIRED: Final = {"model_type": "transformer", "use_biases": False, "causal": True, "activation": "silu"}


def config_of_params(raw: Any, source: str) -> dict[str, Any]:
    """The config.json that says the same. Raises `CheckpointError` naming `source` and a key that is not understood.

    >>> config_of_params({"dim": 4096, "moe": {"num_experts": 8, "num_experts_per_tok": 2}, …}, "params.json")
    {"model_type": "mixtral", "hidden_size": 4096, "num_local_experts": 8, "num_experts_per_tok": 2, …}
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {type(raw).__name__}")
    moe = raw.get("moe")
    if not isinstance(moe, dict):
        raise CheckpointError(
            f"{source}: `moe` is {moe!r}: not a mixture of experts (a dense model's safetensors in Hugging Face's "
            f"layout are converted by `moe-ray convert upcycle`)"
        )
    config: dict[str, Any] = {"model_type": "mixtral", "hidden_act": "silu", "dtype": "bfloat16"}
    config |= {"max_position_embeddings": MAX_POSITIONS, "num_key_value_heads": raw.get("n_heads")}
    for given, names, path in ((raw, _NAMES, ""), (moe, _MOE_NAMES, "moe.")):
        config |= {names[key]: value for key, value in given.items() if key in names and value is not None}
        _refuse_unknown(given, {*names, *(_NO_MATTER | {"moe"} if not path else ())}, path, source)
    return config


def _refuse_unknown(given: Mapping[str, Any], known: set[str], path: str, source: str) -> None:
    """Raise on a key with a value that would be left out: it says how the model computes."""
    for key, value in given.items():
        wanted = None if path else _REQUIRED.get(key)
        if wanted is not None and value is not None and value != wanted:
            raise CheckpointError(f"{source}: `{key}` is {value!r}, supported: {wanted!r}")
        if key not in known and value:
            raise CheckpointError(
                f"{source}: `{path}{key}` is {value!r}, which is not supported; understood: {', '.join(sorted(known))}"
            )
