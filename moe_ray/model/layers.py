"""RMSNorm and rotary position embeddings, numerically as transformers computes them."""

from __future__ import annotations

import torch

from moe_ray.model.model_config import ModelConfig


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row of x [T, D] to unit root mean square, then by weight [D].

    Zhang & Sennrich 2019 (arXiv:1910.07467). The statistics are taken in float32, the product in x's dtype.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope_table(config: ModelConfig, max_len: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return cos and sin for every position, [max_len, 2, head_dim], in `dtype`.

    Su et al. 2021 (arXiv:2104.09864). Scaled variants (linear, yarn, llama3) take their frequencies from transformers.
    """
    if config.rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        inv_freq, scaling = 1.0 / (config.rope_theta**exponents), 1.0
    else:
        from transformers import MixtralConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        # head_dim is spelled out: transformers' yarn takes a null for a number.
        theirs = MixtralConfig.from_dict({**config.raw, "head_dim": config.head_dim})
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[config.rope_type](theirs, "cpu")
    freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
    angles = torch.cat((freqs, freqs), dim=-1)
    return torch.stack((angles.cos() * scaling, angles.sin() * scaling), dim=1).to(device=device, dtype=dtype)


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, head_dim] by each token's cos_sin [T, 2, head_dim] (halves, not interleaved pairs)."""
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin
