"""Chooses what one process computes with: dtype, device, kernels. Imports torch only to ask it about CUDA."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache

from moe_ray.config import Config
from moe_ray.errors import CheckpointError, ConfigError, KernelsUnavailable
from moe_ray.model.compute.numerics import Numerics
from moe_ray.model.model_config import DTYPES, ModelConfig
from moe_ray.native.build import cpu_flags
from moe_ray.native.kernels import Kernels
from moe_ray.telemetry import cores

logger = logging.getLogger(__name__)


def numerics(config: Config, model: ModelConfig, threads: int | None = None) -> Numerics:
    """Choose dtype, device and kernels. `threads` of native kernels; default: the cores of this process.

    Raises `ConfigError` when CUDA or native kernels are asked for and absent.
    """
    wanted = config.model.device
    if wanted == "cuda" and not has_cuda():
        raise ConfigError("model.device is 'cuda', but this process sees no CUDA device")
    cuda = wanted == "cuda" or (wanted == "auto" and has_cuda())
    dtype = dtype_name(config, model, cuda)
    return Numerics(dtype, "cuda" if cuda else "cpu", _kernels(config, dtype, cuda, threads or cores()))


@cache
def has_cuda() -> bool:
    """Whether torch can compute on a CUDA device in this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")  # without the driver, torch finds none
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


def dtype_name(config: Config, model: ModelConfig, cuda: bool) -> str:
    """The dtype that `config` means for this model on this machine. Raises `CheckpointError`."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if model.dtype not in DTYPES:
        raise CheckpointError(f"config.json: dtype {model.dtype!r}, supported: {', '.join(DTYPES)}")
    if not cuda and model.dtype != "float32":
        # float16 has no fast CPU kernels; bfloat16 has them only with the instructions for it.
        return "bfloat16" if cpu_flags() & {"avx512_bf16", "amx_tile"} else "float32"
    return model.dtype


def _kernels(config: Config, dtype: str, cuda: bool, threads: int) -> Kernels | None:
    wanted = config.model.kernels
    if wanted == "torch" or (wanted == "auto" and (cuda or dtype != "bfloat16")):
        return None
    try:
        if cuda or dtype != "bfloat16":
            raise KernelsUnavailable(f"they compute bfloat16 on a CPU, not {dtype} on {'CUDA' if cuda else 'a CPU'}")
        return Kernels(config.cache_dir, threads)
    except KernelsUnavailable as error:
        if wanted == "native":
            raise ConfigError(f"model.kernels is 'native': {error}") from None
        logger.warning("computing with torch's kernels, native ones cannot be used: %s", error)
        return None
