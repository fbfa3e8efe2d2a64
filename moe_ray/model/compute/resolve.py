"""What one process computes with, decided from plain values: device, dtype, kernels of trunk and experts.

No torch and no library is loaded: the same values give the same answer on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.compute.native import limits
from moe_ray.model.compute.triton import limits as triton_limits
from moe_ray.model.model_config import DTYPES, ModelConfig
from moe_ray.native.build import KERNELS, X86_64, best_kernels

Implementation = Literal["torch", "native", "triton"]
"""torch: the reference, on any device and in any dtype. native: our C++ kernels. triton: ours for cards."""
TritonHere = Literal["", "compiles", "interprets"]
"""Whether Triton is installed, and whether it compiles kernels or interprets them, far slower, on a CPU."""

BFLOAT16_INSTRUCTIONS: Final = frozenset({"avx512_bf16", "amx_tile"})
"""Without one of these torch computes bfloat16 on a CPU slower than float32. float16 it always does."""
BFLOAT16_CARDS: Final = (8, 0)
"""The first compute capability with instructions for bfloat16: Ampere (CUDA C++ Programming Guide, "Arithmetic
Instructions"). It is the first as well whose tensor cores Triton uses: tests/model/triton/test_expert_ahead.py."""
OLDEST_CARD: Final = (7, 5)
"""The first compute capability that Triton's kernels are compiled for."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process may compute on."""

    cpu_flags: frozenset[str]
    """Instruction sets, as Linux names them."""
    cuda: bool = False
    """Whether torch sees a CUDA device."""
    architecture: str = X86_64
    """As `platform.machine` names it."""
    capability: tuple[int, int] | None = None
    """Of the CUDA device: major and minor compute capability. None: not known, taken for a recent one's."""
    triton: TritonHere = ""


class ModelWords(Protocol):
    """The `model` section of the configuration."""

    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def kernels(self) -> str: ...
    @property
    def enforce_eager(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for, in the words of the configuration."""

    dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    """"auto", "torch", "native", "triton" or the name of an instruction set of `native.build.KERNELS`."""
    quantize: str | None = None
    """What experts or trunk are to be quantised to on load."""
    enforce_eager: bool = False
    """Whether a card's steps are launched kernel by kernel, and not as CUDA graphs."""

    @staticmethod
    def of(section: ModelWords, quantize: str | None = None) -> Wanted:
        """What the `model` section asks for."""
        return Wanted(section.dtype, section.device, section.kernels, quantize, section.enforce_eager)


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
    notes: tuple[str, ...] = ()
    """What else is not as one may expect, a sentence each."""
    graphs: bool = False
    """Whether steps of decoding and small calls of experts are recorded as CUDA graphs."""

    @property
    def native(self) -> bool:
        """Whether any part needs the native kernels."""
        return "native" in (self.trunk, self.experts)

    def on_reference(self, why: str) -> Backend:
        """The same without native kernels, because `why`."""
        return replace(self, trunk="torch", experts="torch", kernels="", missing=(*self.missing, why))

    @property
    def slower_because(self) -> str:
        """Why torch computes what faster kernels would compute, in one line; empty where that is not so."""
        return f"torch computes, which is slower: {'; '.join(self.missing)}" if self.missing else ""

    def __str__(self) -> str:
        names = {"torch": "torch", "native": f"native {self.kernels}", "triton": "Triton"}
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

    Raises `ConfigError` when CUDA or kernels are asked for and cannot be had, `CheckpointError` for a dtype that is not
    supported.

    >>> str(resolve(mixtral, Wanted(), Machine(frozenset({"avx2", "fma", "f16c"}))))
    'bfloat16 on cpu, trunk and experts by native avx2 kernels'
    """
    if wanted.device == "cuda" and not machine.cuda:
        raise ConfigError("model.device is 'cuda', but this process sees no CUDA device")
    device = "cuda" if machine.cuda and wanted.device != "cpu" else "cpu"
    if device == "cuda" or wanted.kernels == "triton":
        return _on_card(model, wanted, machine, device)
    name, absent = _instruction_set(wanted, machine)
    usable = None if absent or wanted.kernels == "torch" else name
    backend = Backend(choose_dtype(wanted.dtype, model.dtype, device, machine.cpu_flags, usable))
    if wanted.kernels == "torch":
        return _unquantised(backend, wanted)
    common = (absent,) if absent else ()
    trunk = common or limits.trunk_lacks(limits.NATIVE, model)
    experts = common or limits.experts_lack(limits.NATIVE, model)
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


def _on_card(model: ModelConfig, wanted: Wanted, machine: Machine, device: str) -> Backend:
    """Triton's kernels, or torch, on a card; or Triton's interpreter on a CPU, which is for proofs of the kernels."""
    dtype = choose_dtype(wanted.dtype, model.dtype, device, machine.cpu_flags, None)
    notes: tuple[str, ...] = ()
    modern = device != "cuda" or machine.capability is None or machine.capability >= BFLOAT16_CARDS
    if dtype == "bfloat16" and not modern and wanted.dtype == "auto":
        dtype = "float16"
        notes = (f"float16 stands for bfloat16, for which {_card(machine)} has no instructions",)
    graphs = device == "cuda" and not wanted.enforce_eager
    backend = Backend(dtype, device, notes=notes, graphs=graphs)
    if wanted.kernels == "auto" and wanted.quantize is None and not modern:
        why = f"torch computes, on tensor cores, which Triton does not use on {_card(machine)}"
        return replace(backend, notes=(*notes, why))
    if wanted.kernels == "torch":
        return _unquantised(backend, wanted)
    if wanted.kernels not in ("auto", "triton"):
        raise ConfigError(
            f"model.kernels is {wanted.kernels!r}: native kernels compute on a CPU, not on CUDA; allowed on a card: "
            f"auto, torch, triton"
        )
    common = _triton_lacks(machine, device)
    if dtype == "bfloat16" and not modern:
        common = (*common, f"{_card(machine)} has no instructions for bfloat16")
    experts = common or triton_limits.experts_lack(model)
    by_torch = [f"trunk: torch computes {what}" for what in triton_limits.trunk_by_torch(model).values()]
    if experts and wanted.kernels == "triton":
        raise ConfigError(f"model.kernels is 'triton': {'; '.join(experts)}")
    if not modern and not experts:
        notes = (*notes, f"Triton computes without tensor cores on {_card(machine)}")
    if device == "cpu" and not experts:
        notes = (*notes, "Triton's interpreter computes, which is for proofs and very slow: TRITON_INTERPRET is set")
    backend = replace(
        backend,
        trunk="torch" if common else "triton",
        experts="torch" if experts else "triton",
        missing=common or (*by_torch, *(f"experts: {why}" for why in experts)),
        notes=notes,
    )
    return _unquantised(backend, wanted) if experts else backend


def _card(machine: Machine) -> str:
    major, minor = machine.capability or (0, 0)
    return f"this card (compute capability {major}.{minor})"


def _triton_lacks(machine: Machine, device: str) -> tuple[str, ...]:
    """Why Triton's kernels cannot be had for `device` here."""
    if not machine.triton:
        return ("Triton is not installed (pip install triton)",)
    if device == "cpu" and machine.triton != "interprets":
        return (
            "Triton's kernels compute on a card, and on a CPU only in Triton's interpreter, which is for proofs: "
            "TRITON_INTERPRET=1 in the environment",
        )
    if device == "cuda" and machine.triton == "interprets":
        return ("TRITON_INTERPRET is set, so Triton would not compile its kernels",)
    if device == "cuda" and machine.capability is not None and machine.capability < OLDEST_CARD:
        return (f"{_card(machine)} is older than {'.'.join(map(str, OLDEST_CARD))}",)
    return ()


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
        why = "; ".join(backend.missing) or "model.kernels is 'torch'"
        raise ConfigError(
            f"quantize {wanted.quantize}: weights are quantised on load for the kernels that are native or Triton's, "
            f"and here torch computes ({why})"
        )
    return backend
