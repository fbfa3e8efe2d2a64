"""Dense Llama checkpoints, read as mixtures of one expert: what draft models usually are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.families import FAMILIES, ConfigKeys, Family, Layout, Role, Router, Weight
from moe_ray.model.foreign import CONFIG
from moe_ray.model.json_files import read_json_object
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weight_files import find_weights

if TYPE_CHECKING:
    import torch

DENSE_TYPES: Final = ("llama", "mistral")
"""config.json's model_type of models whose layers are Mixtral's but for the experts."""
_LAYER: Final = "model.layers.{layer}."
_STEMS: Final[dict[Role, str]] = {
    "embed": "model.embed_tokens",
    "input_norm": f"{_LAYER}input_layernorm",
    "q": f"{_LAYER}self_attn.q_proj",
    "k": f"{_LAYER}self_attn.k_proj",
    "v": f"{_LAYER}self_attn.v_proj",
    "out": f"{_LAYER}self_attn.o_proj",
    "post_norm": f"{_LAYER}post_attention_layernorm",
    "router": f"{_LAYER}mlp.router",
    "norm": "model.norm",
    "head": "lm_head",
    "gate": f"{_LAYER}mlp.gate_proj",
    "up": f"{_LAYER}mlp.up_proj",
    "down": f"{_LAYER}mlp.down_proj",
}
"""There is no router in the file: one expert gets every token with weight 1, whatever its logit."""
_DENSE: Final = Family(
    model_type="mixtral",
    config=ConfigKeys(
        num_experts="num_local_experts",
        intermediate_size="intermediate_size",
        num_experts_default=1,
        num_experts_per_tok=1,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        hidden_act="silu",
    ),
    router=Router(renormalise=True),
    layouts=(Layout(_STEMS),),
    unused=("*rotary_emb.inv_freq",),
)


def open_any(directory: Path) -> Checkpoint:
    """Open a checkpoint of a family that is served, or a dense Llama. Raises `CheckpointError`."""
    path = directory / CONFIG
    raw = read_json_object(path) if path.is_file() else {}
    model_type = raw.get("model_type")
    if model_type in FAMILIES or model_type not in DENSE_TYPES:
        return Checkpoint.open(directory)
    return DenseCheckpoint.of(directory)


def config_of_any(directory: Path) -> ModelConfig:
    """The shape of such a model, of its config.json alone. Raises `CheckpointError`."""
    path = directory if directory.is_file() else directory / CONFIG
    raw = read_json_object(path) if path.is_file() else {}
    if raw.get("model_type") in FAMILIES or raw.get("model_type") not in DENSE_TYPES:
        return ModelConfig.read(path)
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise CheckpointError(f"{path}: `{key}` is true: biases are not computed with")
    heads = raw.get("num_key_value_heads", raw.get("num_attention_heads"))
    whole = {**raw, "model_type": "mixtral", "num_local_experts": 1, "num_experts_per_tok": 1}
    config = ModelConfig.from_dict({**whole, "num_key_value_heads": heads}, str(path))
    return replace(config, family=_DENSE, rope_theta=_rope_theta(config, raw))


def check_vocab_size(draft: ModelConfig, target: ModelConfig, name: str) -> None:
    """Raise `ConfigError` unless the two models' token ids may mean the same."""
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"engine.draft_model {name} has a vocabulary of {draft.vocab_size} tokens, the model one of "
            f"{target.vocab_size}: a draft model must have the model's own vocabulary"
        )


def _rope_theta(config: ModelConfig, raw: dict[str, object]) -> float:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    said = raw.get("rope_theta") or (scaling.get("rope_theta") if isinstance(scaling, dict) else None)
    return config.rope_theta if said else _DENSE.config.rope_theta


@dataclass(slots=True)
class DenseCheckpoint(Checkpoint):
    """A dense Llama's directory as a mixture of one expert, whose router is not stored."""

    @staticmethod
    def of(directory: Path) -> DenseCheckpoint:
        """Open `directory`. Raises `CheckpointError`."""
        config = config_of_any(directory)
        files, headers = find_weights(directory)
        return DenseCheckpoint(directory, config, _DENSE.layouts[0], files, _headers=headers)

    def check(self, weights: Iterable[Weight]) -> int:
        return Checkpoint.check(self, (weight for weight in weights if weight.role != "router"))

    def read(self, weight: Weight, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        if weight.role == "router":
            import torch

            return torch.zeros(weight.shape, dtype=dtype, device=device)
        return Checkpoint.read(self, weight, dtype, device)
