"""What a checkpoint's configuration says of its quantised weights, beyond what their tensors tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from moe_ray.errors import CheckpointError

KEYS: Final = ("quantization_config", "compression_config")
"""Of config.json: transformers', an old llm-compressor's."""
FILES: Final = ("quantize_config.json", "quant_config.json")
"""Beside config.json, where that says nothing: AutoGPTQ's and AutoAWQ's."""
_ELSEWHERE: Final = ("config.json", *FILES)

Settings = Mapping[str, Any]
"""A JSON object."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """One checkpoint's quantisation, known to be one that is read. Which weights it meets, the tensors say."""

    method: str
    """A row of `METHODS`."""
    file: str
    """Which says so."""
    zeros_plus_one: bool = True
    """GPTQ: stored zero points are one below the true ones, as in the first version of its format."""
    group: int | None = None
    """GPTQ, AWQ: consecutive inputs that share a scale, where it is not one for all."""
    block: tuple[int, int] | None = None
    """FP8: rows and columns that share a scale."""


def quantization_of(config: Settings, source: str) -> Quantization | None:
    """What a config.json says of it; None: nothing. Raises `CheckpointError` for what is not read."""
    for key in KEYS:
        settings = config.get(key)
        if isinstance(settings, dict) and settings:
            return quantization_from(settings, f"{source}: {key}")
        if settings:
            raise CheckpointError(f"{source}: `{key}` must be an object, found {settings!r}")
    if settings := config.get("quantization"):
        bits = settings.get("bits", "?") if isinstance(settings, dict) else "?"
        raise _not_read(f"{source}: quantization", f"MLX, {bits} bits")
    return None


def quantization_from(settings: Settings, source: str) -> Quantization:
    """What such an object, or one of `FILES`, says. Raises `CheckpointError` for what is not read."""
    method = _method(settings)
    if method not in METHODS:
        raise _not_read(source, method)
    return METHODS[method](settings, source)


def _method(settings: Settings) -> str:
    if named := settings.get("quant_method"):
        return str(named).lower()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if "w_bit" in settings:
        return "awq"
    if "bits" in settings and "group_size" in settings:
        return "gptq"
    return "compressed-tensors" if "config_groups" in settings else "a method without a name"


def _not_read(source: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: weights quantised with {what} are not read; read are {', '.join(sorted(METHODS))}, and floats"
    )


def _one_of(settings: Settings, key: str, default: str, allowed: tuple[str, ...], source: str) -> str:
    value = str(settings.get(key) or default).lower()
    if value not in allowed:
        raise CheckpointError(f"{source}: {key} {value!r} is not read; read are {', '.join(map(repr, allowed))}")
    return value


def _group(settings: Settings, key: str, source: str) -> int | None:
    size = settings.get(key)
    if size in (None, -1):
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise CheckpointError(f"{source}: {key} must be a positive integer or -1, found {size!r}")
    return size


def _gptq(settings: Settings, source: str) -> Quantization:
    if settings.get("is_marlin_format"):
        raise CheckpointError(f"{source}: GPTQ weights in Marlin's order are not read; read are 'gptq', 'gptq_v2'")
    version = _one_of(settings, "checkpoint_format", "gptq", ("gptq", "gptq_v2"), source)
    _one_of(settings, "pack_dtype", "int32", ("int32",), source)
    return Quantization("gptq", source, zeros_plus_one=version == "gptq", group=_group(settings, "group_size", source))


def _awq(settings: Settings, source: str) -> Quantization:
    _one_of(settings, "version", "gemm", ("gemm",), source)
    key = "q_group_size" if "q_group_size" in settings else "group_size"
    return Quantization("awq", source, group=_group(settings, key, source))


def _compressed_tensors(settings: Settings, source: str) -> Quantization:
    groups = settings.get("config_groups") or {}
    formats = [settings.get("format"), *(group.get("format") for group in groups.values() if isinstance(group, dict))]
    for stored_as in formats:
        _one_of({"format": stored_as}, "format", "pack-quantized", COMPRESSED, source)
    if settings.get("transform_config"):
        raise CheckpointError(f"{source}: transform_config: weights that are rotated when the model runs are not read")
    sparsity = settings.get("sparsity_config") or {}
    _one_of(sparsity, "format", "dense", ("dense",), f"{source}: sparsity_config")
    blocks = {
        tuple(weights["block_structure"])
        for group in groups.values()
        if isinstance(group, dict)
        and isinstance(weights := group.get("weights"), dict)
        and weights.get("block_structure")
    }
    return Quantization("compressed-tensors", source, block=_block(*blocks, source=source))


def _fp8(settings: Settings, source: str) -> Quantization:
    block = settings.get("weight_block_size")
    return Quantization("fp8", source, block=_block(*([tuple(block)] if block else []), source=source))


def _modelopt(settings: Settings, source: str) -> Quantization:
    _one_of(settings, "quant_algo", "fp8", ("fp8",), source)
    return Quantization("modelopt", source)


def _block(*found: tuple[object, ...], source: str) -> tuple[int, int] | None:
    if not found:
        return None
    if len(found) == 1 and len(found[0]) == 2:
        rows, columns = found[0]
        if isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0:
            return rows, columns
    raise CheckpointError(f"{source}: one block of [rows, columns] expected, found {', '.join(map(str, found))}")


def _by_tensors(method: str) -> Callable[[Settings, str], Quantization]:
    """Of a method whose tensors tell all."""
    return lambda settings, source: Quantization(method, source)


COMPRESSED: Final = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
    "dense",
)
METHODS: Final[dict[str, Callable[[Settings, str], Quantization]]] = {
    "awq": _awq,
    "bitsandbytes": _by_tensors("bitsandbytes"),
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "hqq": _by_tensors("hqq"),
    "modelopt": _modelopt,
    "moe-ray-ternary": _by_tensors("moe-ray-ternary"),
    "mxfp4": _by_tensors("mxfp4"),
}
"""`quant_method` → what else its settings have to say."""
