"""What one process computes with, decided from plain values: device, dtype, kernels of trunk and experts.

No torch and no library is loaded: the same values give the same answer on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.families.family import ATTENTION_BIASES
from moe_ray.model.model_config import DTYPES, ModelConfig
from moe_ray.native.build import KERNELS, X86_64, best_kernels

Implementation = Literal["torch", "native"]
"""torch: the reference, on any device and in any dtype. native: our C++ kernels."""

BFLOAT16_INSTRUCTIONS: Final = frozenset({"avx512_bf16", "amx_tile"})
"""Without one of these torch computes bfloat16 on a CPU slower than float32. float16 it always does."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process may compute on."""

    cpu_flags: frozenset[str]
    """Instruction sets, as Linux names them."""
    cuda: bool = False
    """Whether torch sees a CUDA device."""
    architecture: str = X86_64
    """As `platform.machine` names it."""


class ModelWords(Protocol):
    """The `model` section of the configuration."""

    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def kernels(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for, in the words of the configuration."""

    dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    """"auto", "torch", "native" or the name of an instruction set of `native.build.KERNELS`."""
    quantize: str | None = None
    """What experts or trunk are to be quantised to on load."""

    @staticmethod
    def of(section: ModelWords, quantize: str | None = None) -> Wanted:
        """What the `model` section asks for."""
        return Wanted(section.dtype, section.device, section.kernels, quantize)


@dataclass(frozen=True, slots=True)
class KernelLimits:
    """What the native kernels can compute, on every instruction set."""

    dtypes: frozenset[str]
    activations: frozenset[str]
    lanes: int
    """Row lengths and head dimensions are multiples of this."""
    groups: frozenset[int]
    """Query heads per KV head."""


NATIVE: Final = KernelLimits(
    dtypes=frozenset({"float32", "bfloat16", "float16"}),
    activations=frozenset({"silu"}),
    lanes=32,
    groups=frozenset({1, 2, 3, 4, 5, 6, 7, 8, 16}),
)


@dataclass(frozen=True, slots=True)
class Backend:
    """How one process computes. Without arguments for the kernels: the reference."""

    dtype: str
    """"float32", "bfloat16" or "float16"."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    trunk: Implementation = "torch"
    experts: Implementation = "torch"
    kernels: str = ""
    """The instruction set of the native kernels; empty where no part is native."""
    missing: tuple[str, ...] = ()
    """Why a part runs on the reference although faster kernels were welcome, a sentence each."""

    @property
    def native(self) -> bool:
        """Whether any part needs the native kernels."""
        return "native" in (self.trunk, self.experts)

    def on_reference(self, why: str) -> Backend:
        """The same without native kernels, because `why`."""
        return replace(self, trunk="torch", experts="torch", kernels="", missing=(*self.missing, why))

    @property
    def slower_because(self) -> str:
        """Why torch computes what native kernels would compute faster, in one line; empty where that is not so."""
        return f"torch computes, which is slower: {'; '.join(self.missing)}" if self.missing else ""

    def __str__(self) -> str:
        names = {"torch": "torch", "native": f"native {self.kernels}"}
        if self.trunk == self.experts:
            return f"{self.dtype} on {self.device}, trunk and experts by {names[self.trunk]} kernels"
        trunk, experts = names[self.trunk], names[self.experts]
        return f"{self.dtype} on {self.device}, trunk by {trunk} kernels, experts by {experts} kernels"


def choose_dtype(wanted: str, stored: str, device: str, cpu_flags: frozenset[str], kernels: str | None) -> str:
    """The dtype to compute in: `wanted`, or for "auto" the checkpoint's where `device` is fast at it.

    `kernels`: the native kernels that the CPU has, which take any dtype; those with bfloat16 instructions are several
    times faster in it than in float16. torch on a CPU without such instructions computes in float32. Raises
    `CheckpointError` for a stored dtype that is not supported.
    """
    if wanted != "auto":
        return wanted
    if stored not in DTYPES:
        raise CheckpointError(f"config.json: dtype {stored!r}, supported: {', '.join(DTYPES)}")
    if device != "cpu" or stored == "float32":
        return stored
    if kernels is not None:
        return "bfloat16" if "bf16" in kernels else stored
    return "bfloat16" if cpu_flags & BFLOAT16_INSTRUCTIONS else "float32"


def resolve(model: ModelConfig, wanted: Wanted, machine: Machine) -> Backend:
    """Choose how `model` is computed on `machine`.

    Raises `ConfigError` when CUDA or native kernels are asked for and cannot be had, `CheckpointError` for a dtype that
    is not supported.

    >>> str(resolve(mixtral, Wanted(), Machine(frozenset({"avx2", "fma", "f16c"}))))
    'bfloat16 on cpu, trunk and experts by native avx2 kernels'
    """
    if wanted.device == "cuda" and not machine.cuda:
        raise ConfigError("model.device is 'cuda', but this process sees no CUDA device")
    device = "cuda" if machine.cuda and wanted.device != "cpu" else "cpu"
    name, absent = _instruction_set(wanted, machine)
    usable = None if absent or wanted.kernels == "torch" else name
    backend = Backend(choose_dtype(wanted.dtype, model.dtype, device, machine.cpu_flags, usable), device)
    if wanted.kernels == "torch" or (wanted.kernels == "auto" and device == "cuda"):
        return _unquantised(backend, wanted)  # asked for; and on a card torch's kernels are the fast ones
    common = (absent,) if absent else ()
    if device != "cpu":
        common = (*common, f"native kernels compute on a CPU, not on {device.upper()}")
    trunk = common or _trunk_lacks(NATIVE, model)
    experts = common or _experts_lack(NATIVE, model)
    missing = common or (*(f"trunk: {why}" for why in trunk), *(f"experts: {why}" for why in experts))
    if missing and wanted.kernels != "auto":
        raise ConfigError(f"model.kernels is {wanted.kernels!r}: {'; '.join(missing)}")
    backend = replace(
        backend,
        trunk="torch" if trunk else "native",
        experts="torch" if experts else "native",
        kernels="" if trunk and experts else name,
        missing=missing,
    )
    return _unquantised(backend, wanted) if missing else backend


def _instruction_set(wanted: Wanted, machine: Machine) -> tuple[str, str]:
    """The name of the native kernels to use, and why this machine cannot run them; empty where it can."""
    if wanted.kernels in KERNELS:
        row = KERNELS[wanted.kernels]
        if machine.architecture not in row.architectures:
            return row.name, f"they are for {', '.join(row.architectures)}, this is {machine.architecture}"
        if absent := row.needs - machine.cpu_flags:
            return wanted.kernels, f"this CPU has no {', '.join(sorted(absent))} instructions"
        return wanted.kernels, ""
    best = best_kernels(machine.cpu_flags, machine.architecture)
    if best is not None:
        return best, ""
    least = [row for row in KERNELS.values() if machine.architecture in row.architectures]
    if not least:
        return "", f"there are no native kernels for {machine.architecture}"
    return "", f"this CPU has no {', '.join(sorted(least[-1].needs - machine.cpu_flags))} instructions"


def _unquantised(backend: Backend, wanted: Wanted) -> Backend:
    """The backend, which computes on floats in a part. Raises `ConfigError` where quantised weights are asked for."""
    if wanted.quantize is not None:
        why = "; ".join(backend.missing) or "model.kernels is 'torch'" if backend.device == "cpu" else "on a card"
        raise ConfigError(
            f"quantize {wanted.quantize}: weights are quantised on load for the native kernels, and here torch "
            f"computes ({why})"
        )
    return backend


def _trunk_lacks(kernels: KernelLimits, model: ModelConfig) -> tuple[str, ...]:
    lacks = []
    other = {
        "LayerNorm": model.family.norm != "rms",
        "SparseMixer": model.router.jitter is not None,
        "biases of norms and head": bool(model.biases - ATTENTION_BIASES.keys()),
    }
    if found := [name for name, here in other.items() if here]:
        lacks.append(f"native kernels do not compute {', '.join(found)}, which this model has")
    if (model.shared_intermediate_size or 0) % kernels.lanes:
        lacks.append(f"the shared expert's {model.shared_intermediate_size} is not a multiple of {kernels.lanes}")
    if model.shared_intermediate_size is not None and model.hidden_act not in kernels.activations:
        lacks.append(f"the shared expert's activation is {model.hidden_act}")
    if model.hidden_size % kernels.lanes:
        lacks.append(f"hidden_size {model.hidden_size} is not a multiple of {kernels.lanes}")
    group = model.num_attention_heads // model.num_key_value_heads
    if model.head_dim % kernels.lanes or group not in kernels.groups:
        lacks.append(f"no attention for head_dim {model.head_dim} with {group} query heads per KV head")
    return tuple(lacks)


def _experts_lack(kernels: KernelLimits, model: ModelConfig) -> tuple[str, ...]:
    lacks = []
    if model.hidden_act not in kernels.activations:
        lacks.append(f"native kernels compute {', '.join(sorted(kernels.activations))}, not {model.hidden_act}")
    for name, size in (("hidden_size", model.hidden_size), ("intermediate_size", model.intermediate_size)):
        if size % kernels.lanes:
            lacks.append(f"{name} {size} is not a multiple of {kernels.lanes}")
    return tuple(lacks)
