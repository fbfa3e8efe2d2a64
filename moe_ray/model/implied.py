"""How weights are stored by what config.json alone says, for plans of models that are not here."""

from __future__ import annotations

from moe_ray.model.families import Weight
from moe_ray.model.families.gpt_oss import GPT_OSS
from moe_ray.model.formats import StoredWeight
from moe_ray.model.formats.mxfp4 import GROUPING, MXFP4
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import matrices_of_expert


def implied_formats(model: ModelConfig) -> dict[Weight, StoredWeight]:
    """Weight → its format and grouping, with no tensors; {}: config.json does not tell, or nothing is quantised.

    transformers' `quant_method: mxfp4` is of stacked experts and of nothing else (transformers, integrations/mxfp4.py).
    """
    if model.quantization is None or model.quantization.method != MXFP4.name or model.family is not GPT_OSS:
        return {}
    return {
        weight: StoredWeight(MXFP4.name, weight.shape, (), GROUPING)
        for layer in range(model.num_hidden_layers)
        for expert in range(model.num_local_experts)
        for weight in matrices_of_expert(model, layer, expert)
    }
