"""Norms and rotary position embeddings, numerically as transformers computes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_ray.errors import CheckpointError
from moe_ray.model.model_config import ModelConfig


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row of x [T, D] to unit root mean square, then by weight [D].

    Zhang & Sennrich 2019 (arXiv:1910.07467). The statistics are taken in float32, the product in x's dtype.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def normalise(config: ModelConfig, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Normalise x [T, D] as the model's family does between its parts. weight and bias [D]."""
    if config.family.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, config.rms_norm_eps)
    return rms_norm(x, weight, config.rms_norm_eps)


def rope_table(config: ModelConfig, max_len: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return cos and sin for every position, [max_len, 2, rope_dim], in `dtype`.

    Su et al. 2021 (arXiv:2104.09864). Scaled variants (linear, yarn, llama3) take their frequencies from transformers;
    longrope (Ding et al. 2024, arXiv:2402.13753), which changes with a sequence's length, those of short ones.
    """
    exponents = torch.arange(0, config.rope_dim, 2, dtype=torch.float32) / config.rope_dim
    inv_freq, scaling = 1.0 / (config.rope_theta**exponents), 1.0
    if config.rope_type == "longrope":
        factors, scaling = _short_rope(config)
        inv_freq = inv_freq / factors
    elif config.rope_type != "default":
        from transformers import MixtralConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        # head_dim is spelled out: transformers' yarn takes a null for a number, and of some heads a part is rotated.
        scaled = {**config.rope_parameters, "rope_theta": config.rope_theta}
        theirs = MixtralConfig.from_dict({**config.raw, "head_dim": config.rope_dim, "rope_parameters": scaled})
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[config.rope_type](theirs, "cpu")
    freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
    angles = torch.cat((freqs, freqs), dim=-1)
    return torch.stack((angles.cos() * scaling, angles.sin() * scaling), dim=1).to(device=device, dtype=dtype)


def _short_rope(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """What longrope divides the frequencies of short contexts by, [rope_dim / 2], and what cos and sin are times.

    Raises `CheckpointError` where config.json does not tell.
    """
    told = config.rope_parameters
    factors, scaling = told.get("short_factor"), told.get("short_mscale")
    positive = isinstance(factors, list) and all(isinstance(factor, int | float) and factor > 0 for factor in factors)
    if not isinstance(factors, list) or not positive or len(factors) != config.rope_dim // 2:
        raise CheckpointError(f"config.json: `short_factor` must be {config.rope_dim // 2} positive numbers")
    if not isinstance(scaling, int | float):
        raise CheckpointError(f"config.json: `short_mscale` must be a number, found {scaling!r}")
    return torch.tensor(factors, dtype=torch.float32), float(scaling)


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, rope_dim] by each token's cos_sin [T, 2, rope_dim] (halves, not interleaved pairs)."""
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin
