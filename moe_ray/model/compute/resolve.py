"""What one process computes with, decided from plain values: device, dtype, kernels of trunk and experts.

No torch, no library is loaded: the same values give the same answer on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.model_config import DTYPES, ModelConfig

Implementation = Literal["torch", "native"]
"""torch: the reference, on any device and in any dtype. native: our C++ kernels."""

BFLOAT16_INSTRUCTIONS: Final = frozenset({"avx512_bf16", "amx_tile"})
"""Without one of these a CPU computes bfloat16 slower than float32. float16 it always does."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process may compute on."""

    cpu_flags: frozenset[str]
    """Instruction sets, as Linux names them."""
    cuda: bool = False
    """Whether torch sees a CUDA device."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for, in the words of the configuration's `model` section."""

    dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"


@dataclass(frozen=True, slots=True)
class KernelSet:
    """What one build of the native kernels can compute."""

    name: str
    instructions: frozenset[str]
    dtypes: frozenset[str]
    formats: frozenset[str]
    activations: frozenset[str]
    lanes: int
    """Row lengths are multiples of this."""
    head_dims: frozenset[int]
    groups: frozenset[int]
    """Query heads per KV head."""


NATIVE: Final = (
    KernelSet(
        name="avx512_bf16",
        instructions=frozenset({"avx512_bf16"}),
        dtypes=frozenset({"bfloat16"}),
        formats=frozenset({"float"}),
        activations=frozenset({"silu"}),
        lanes=32,
        head_dims=frozenset({32, 64, 96, 128, 256}),
        groups=frozenset({1, 2, 3, 4, 5, 6, 7, 8, 16}),
    ),
)
"""The native kernels, best first. One row for each instruction set."""


@dataclass(frozen=True, slots=True)
class Backend:
    """How one process computes. Without arguments for the kernels: the reference."""

    dtype: str
    """"float32", "bfloat16" or "float16"."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    trunk: Implementation = "torch"
    experts: Implementation = "torch"
    missing: tuple[str, ...] = ()
    """Why a part runs on the reference although faster kernels were welcome, a sentence each."""

    @property
    def native(self) -> bool:
        """Whether any part needs the native kernels."""
        return "native" in (self.trunk, self.experts)

    def on_reference(self, why: str) -> Backend:
        """The same without native kernels, because `why`."""
        return replace(self, trunk="torch", experts="torch", missing=(*self.missing, why))

    @property
    def slower_because(self) -> str:
        """Why torch computes what native kernels would compute faster, in one line; empty where that is not so."""
        return f"torch computes, which is slower: {'; '.join(self.missing)}" if self.missing else ""

    def __str__(self) -> str:
        return f"{self.dtype} on {self.device}, trunk: {self.trunk} kernels, experts: {self.experts} kernels"


def choose_dtype(wanted: str, stored: str, device: str, cpu_flags: frozenset[str]) -> str:
    """The dtype to compute in: `wanted`, or for "auto" the checkpoint's where `device` is fast at it, else float32.

    `cpu_flags` count for the device "cpu" only. Raises `CheckpointError` for a stored dtype that is not supported.
    """
    if wanted != "auto":
        return wanted
    if stored not in DTYPES:
        raise CheckpointError(f"config.json: dtype {stored!r}, supported: {', '.join(DTYPES)}")
    if device != "cpu" or stored == "float32":
        return stored
    return "bfloat16" if cpu_flags & BFLOAT16_INSTRUCTIONS else "float32"


def resolve(model: ModelConfig, wanted: Wanted, machine: Machine, weight_format: str = "float") -> Backend:
    """Choose how `model` is computed on `machine`.

    Raises `ConfigError` when CUDA or native kernels are asked for and cannot be had, `CheckpointError` for a dtype that
    is not supported.

    >>> str(resolve(mixtral, Wanted(), Machine(frozenset({"avx512_bf16"}))))
    'bfloat16 on cpu, trunk: native kernels, experts: native kernels'
    """
    if wanted.device == "cuda" and not machine.cuda:
        raise ConfigError("model.device is 'cuda', but this process sees no CUDA device")
    device = "cuda" if machine.cuda and wanted.device != "cpu" else "cpu"
    backend = Backend(choose_dtype(wanted.dtype, model.dtype, device, machine.cpu_flags), device)
    if wanted.kernels == "torch" or (wanted.kernels == "auto" and device == "cuda"):
        return backend  # asked for; and on a card torch's kernels are the fast ones
    kernels = NATIVE[0]
    common = _lacks_in_common(kernels, backend, weight_format, machine)
    trunk = common or _trunk_lacks(kernels, model)
    experts = common or _experts_lack(kernels, model)
    missing = common or (*(f"trunk: {why}" for why in trunk), *(f"experts: {why}" for why in experts))
    if missing and wanted.kernels == "native":
        raise ConfigError(f"model.kernels is 'native': {'; '.join(missing)}")
    return replace(
        backend, trunk="torch" if trunk else "native", experts="torch" if experts else "native", missing=missing
    )


def _lacks_in_common(kernels: KernelSet, backend: Backend, weight_format: str, machine: Machine) -> tuple[str, ...]:
    lacks = []
    if backend.device != "cpu" or backend.dtype not in kernels.dtypes:
        computes = "a CPU" if backend.device == "cpu" else backend.device.upper()
        lacks.append(
            f"native kernels take {', '.join(sorted(kernels.dtypes))} on a CPU, not {backend.dtype} on {computes}"
        )
    if weight_format not in kernels.formats:
        formats = ", ".join(sorted(kernels.formats))
        lacks.append(f"native kernels take weights of format {formats}, not {weight_format}")
    if absent := kernels.instructions - machine.cpu_flags:
        lacks.append(f"this CPU has no {', '.join(sorted(absent))} instructions")
    return tuple(lacks)


def _trunk_lacks(kernels: KernelSet, model: ModelConfig) -> tuple[str, ...]:
    lacks = []
    if not model.router.renormalise:
        lacks.append("their router renormalises the weights of a token's experts, this model's does not")
    if model.hidden_size % kernels.lanes:
        lacks.append(f"hidden_size {model.hidden_size} is not a multiple of {kernels.lanes}")
    group = model.num_attention_heads // model.num_key_value_heads
    if model.head_dim not in kernels.head_dims or group not in kernels.groups:
        lacks.append(f"no attention for head_dim {model.head_dim} with {group} query heads per KV head")
    return tuple(lacks)


def _experts_lack(kernels: KernelSet, model: ModelConfig) -> tuple[str, ...]:
    lacks = []
    if model.hidden_act not in kernels.activations:
        lacks.append(f"native kernels compute {', '.join(sorted(kernels.activations))}, not {model.hidden_act}")
    for name, size in (("hidden_size", model.hidden_size), ("intermediate_size", model.intermediate_size)):
        if size % kernels.lanes:
            lacks.append(f"{name} {size} is not a multiple of {kernels.lanes}")
    return tuple(lacks)
