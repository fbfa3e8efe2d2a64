"""`adapter_model.safetensors` as peft writes it: each process reads only the tensors that it computes with."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moe_ray.core import ExpertKey
from moe_ray.errors import AdapterError
from moe_ray.model.families import ExpertRole, Role
from moe_ray.model.formats import TensorEntry
from moe_ray.model.lora.adapter_config import FILE as CONFIG_FILE
from moe_ray.model.lora.adapter_config import AdapterConfig
from moe_ray.model.lora.adapter_names import DENSE_ROLES, EXPERT_ROLES, SHARED_ROLES, Module, Names
from moe_ray.model.lora.parts import ExpertPart, LayerPart, LowRank, MatrixPart, TrunkPart
from moe_ray.model.lora.stacked import Stacked, stacked_of
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.safetensors_file import numpy_dtype, read_header
from moe_ray.model.tensor_file import NotWhole, read_bytes

if TYPE_CHECKING:
    import numpy as np

FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
_DTYPES: Final = ("F32", "BF16", "F16")
_SUFFIXES: Final = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".base_layer.weight": "whole",  # beside an addition to it
    ".weight": "whole",
}
_WRAPPERS: Final = r"(\.base_layer)+$"


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two tensors of one low-rank addition, by name."""

    a: str
    b: str
    rank: int
    scale: float


class Adapter:
    """An adapter of one model. Its tensors are read when a part is asked for; thread-safe."""

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        """Check names and shapes of all tensors. Raises `AdapterError`."""
        self.directory = directory
        self.config = AdapterConfig.read(directory)
        self._path = directory / FILE
        self._model = model
        self._entries = _header(directory)
        self._pairs: dict[tuple[Role, int | None, int | None], _Pair] = {}
        self._stacked: dict[int, list[tuple[Stacked, _Pair]]] = {}
        self._whole: dict[Role, str] = {}
        self._sort()
        self.rank = max([pair.rank for pair in self._all_pairs()], default=0)
        """The largest of all matrices."""
        self._expert_layers = frozenset(
            (*self._stacked, *(layer for _, layer, expert in self._pairs if layer is not None and expert is not None))
        )
        self.touches_trunk = bool(self._whole) or any(expert is None for _, _, expert in self._pairs)
        """Whether it adds to anything but experts."""

    @cached_property
    def adapter_id(self) -> int:
        """A hash of both files, from 1 to 2**63 - 1: the same in every process. The first access reads the files."""
        digest = hashlib.blake2b(digest_size=8)
        for name in (CONFIG_FILE, FILE):
            with open(self.directory / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return (int.from_bytes(digest.digest(), "little") & (2**63 - 1)) or 1

    def touches_experts(self, layer: int) -> bool:
        """Whether it adds to any expert of a layer."""
        return layer in self._expert_layers

    def adapts(self, layer: int, expert: int) -> bool:
        """Whether calls of this key may name it: the layer is one of those, and the expert one of its model's.

        Replicas number the experts of further models behind those.
        """
        return layer in self._expert_layers and expert < self._model.num_local_experts

    def trunk_part(self) -> TrunkPart:
        """What it adds to the trunk, read now. Raises `AdapterError`."""
        layers = tuple(map(self._layer_part, range(self._model.num_hidden_layers)))
        return TrunkPart(layers, self._matrix("embed"), self._matrix("head"))

    def _layer_part(self, layer: int) -> LayerPart:
        q, k, v, out, router, share = (
            self._low_rank(role, layer) for role in ("q", "k", "v", "out", "router", "shared_share")
        )
        roles = DENSE_ROLES if layer in self._model.dense_layers else SHARED_ROLES
        shared = ExpertPart(*(self._low_rank(role, layer) for role in roles))
        return LayerPart(q, k, v, out, router, shared, share)

    def expert_part(self, layer: int, expert: int) -> ExpertPart:
        """What it adds to one expert in one layer, read now. Raises `AdapterError`."""
        parts: dict[ExpertRole, LowRank] = {}
        for stacked, pair in self._stacked.get(layer, ()):
            a, b = stacked.of_expert(self._read(pair.a), self._read(pair.b), expert)
            for role, rows in stacked.rows.items():
                parts[role] = LowRank(a, b[rows], pair.scale)
        for role in EXPERT_ROLES:
            if (found := self._low_rank(role, layer, expert)) is not None:
                parts[role] = found
        return ExpertPart.of(parts)

    @property
    def expert_keys(self) -> frozenset[ExpertKey]:
        """The (layer, expert) that it adds to."""
        every = range(self._model.num_local_experts)
        own = {(layer, expert) for _, layer, expert in self._pairs if layer is not None and expert is not None}
        return frozenset(own | {(layer, expert) for layer in self._stacked for expert in every})

    # ---- what the file holds

    def _sort(self) -> None:
        """Find what each tensor is, and check its shape."""
        names = Names(self._model)
        tensors: dict[str, dict[str, str]] = {}
        for name in self._entries:
            module, kind = self._split(name)
            if kind in tensors.setdefault(module, {}):
                raise self._wrong(name, f"{module} has two tensors of this kind")
            tensors[module][kind] = name
        for module, found in tensors.items():
            place = names.find(module)
            if place is None:
                first = next(iter(found.values()))
                raise self._wrong(first, f"the model ({self._model.family.model_type}) has no module {module}")
            if place.role is not None and not names.adapted(place.role):
                raise self._wrong(next(iter(found.values())), f"nothing can be added to {module}")
            if "whole" in found:
                self._take_whole(place, found["whole"], module)
            if "a" in found or "b" in found:
                self._take_pair(place, found, module)
        for layer, several in self._stacked.items():
            roles = [role for stacked, _ in several for role in stacked.rows]
            if len(set(roles)) != len(roles):
                raise AdapterError(f"{self._path}: two additions to the same matrices of layer {layer}'s experts")
        square = self._model.hidden_size == self._model.intermediate_size
        if square and any(stacked.exchanged for several in self._stacked.values() for stacked, _ in several):
            raise AdapterError(
                f"{self._path}: additions to experts with inputs and outputs exchanged, which some versions of peft "
                f"save, of a model whose hidden_size is its intermediate_size: how to read `down_proj` cannot be told"
            )

    def _split(self, name: str) -> tuple[str, str]:
        """Module and kind of a tensor."""
        if name.startswith(PREFIX):
            inner = name.removeprefix(PREFIX)
            for suffix, kind in _SUFFIXES.items():
                if inner.endswith(suffix):
                    return inner.removesuffix(suffix), kind
        raise self._wrong(name, f"not the name of a LoRA tensor: {PREFIX}<module>.lora_A.weight, for example")

    def _take_whole(self, place: Module, name: str, module: str) -> None:
        role = place.role
        if role not in ("embed", "head"):
            raise self._wrong(name, "saved whole; of whole modules only embed_tokens and lm_head are supported")
        # peft saves the embeddings that a target has under it, without their being in modules_to_save.
        beside = name.endswith(".base_layer.weight") and self.config.targets(module, None)
        if not beside and not self.config.saves(module):
            raise self._wrong(name, f"`modules_to_save` of {CONFIG_FILE} does not name {module}")
        if self.config.ensure_weight_tying and self._model.tie_word_embeddings:
            raise AdapterError(f"{self.config.source}: `ensure_weight_tying` with a tied model is not supported")
        self._check(name, (self._model.vocab_size, self._model.hidden_size))
        self._whole[role] = name

    def _take_pair(self, place: Module, found: Mapping[str, str], module: str) -> None:
        for kind, other in (("a", "lora_A"), ("b", "lora_B")):
            if kind not in found:
                raise self._wrong(next(iter(found.values())), f"{module} has no {other} beside it")
        a, b = found["a"], found["b"]
        if place.stacked:
            self._take_stacked(place, a, b, module)
            return
        parameter = f"{module}.weight"
        if self.config.targets(module, place.layer):
            rank, scale = self.config.of(module)
        elif self.config.targets_parameter(parameter):
            rank, scale = self.config.of(parameter)
        else:
            raise self._wrong(a, f"the target modules and parameters of {CONFIG_FILE} do not name {module}")
        n, k = self._model_shape(place)
        self._check(a, (rank, k))
        self._check(b, (n, rank))
        assert place.role is not None
        self._pairs[place.role, place.layer, place.expert] = _Pair(a, b, rank, scale)

    def _take_stacked(self, place: Module, a: str, b: str, module: str) -> None:
        assert place.layer is not None
        stacked = stacked_of(self._model, self._entries[a].shape, self._entries[b].shape)
        if stacked is None:
            c = self._model
            raise self._wrong(
                a,
                f"shapes {list(self._entries[a].shape)} and {list(self._entries[b].shape)} are of no stacked parameter "
                f"of {c.num_local_experts} experts [{2 * c.intermediate_size} or {c.hidden_size}, ...]",
            )
        # peft nests the wrappers of a module's parameters: the module's own name says the parameter.
        parameter = f"{re.sub(_WRAPPERS, '', module)}.{stacked.parameter}"
        if not self.config.targets_parameter(parameter):
            raise self._wrong(a, f"`target_parameters` of {CONFIG_FILE} does not name {parameter}")
        rank, scale = self.config.of(parameter)
        if rank != stacked.rank:
            raise self._wrong(a, f"rank {stacked.rank} for each expert, {CONFIG_FILE} says {rank}")
        for name in (a, b):
            self._check(name, self._entries[name].shape)
        self._stacked.setdefault(place.layer, []).append((stacked, _Pair(a, b, rank, scale)))

    def _model_shape(self, place: Module) -> tuple[int, int]:
        """[N, K] of a matrix as its addition sees it: an embedding's is transposed."""
        n, k = place.shape
        return (k, n) if place.role == "embed" else (n, k)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self._entries[name]
        if entry.shape != shape:
            raise self._wrong(name, f"shape {list(entry.shape)}, expected {list(shape)} for this model and its config")
        if entry.dtype not in _DTYPES:
            raise self._wrong(name, f"dtype {entry.dtype}, supported: {', '.join(_DTYPES)}")

    def _wrong(self, name: str, what: str) -> AdapterError:
        return AdapterError(f"{self._path}: {name}: {what}")

    def _all_pairs(self) -> list[_Pair]:
        return [*self._pairs.values(), *(pair for several in self._stacked.values() for _, pair in several)]

    # ---- reading

    def _low_rank(self, role: Role, layer: int | None, expert: int | None = None) -> LowRank | None:
        pair = self._pairs.get((role, layer, expert))
        return None if pair is None else LowRank(self._read(pair.a), self._read(pair.b), pair.scale)

    def _matrix(self, role: Role) -> MatrixPart | None:
        whole, low_rank = self._whole.get(role), self._low_rank(role, None)
        if whole is None and low_rank is None:
            return None
        return MatrixPart(None if whole is None else self._read(whole), low_rank)

    def _read(self, name: str) -> np.ndarray:
        import numpy as np

        entry = self._entries[name]
        array = np.empty(entry.shape, dtype=numpy_dtype(entry.dtype))
        try:
            with open(self._path, "rb") as file:
                missing = read_bytes(file, entry.start, array.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise self._wrong(name, str(error)) from None
        if missing:
            raise self._wrong(name, f"{missing} bytes are missing at the file's end")
        return array


def read_adapter(directory: Path, config: ModelConfig, most_rank: int | None = None) -> Adapter:
    """The adapter in a directory, in peft's format, for a model of this shape. Raises `AdapterError`.

    It adds to what the file has tensors for; all of them must be of the model, and named by its config.
    """
    adapter = Adapter(directory, config)
    if most_rank is not None and adapter.rank > most_rank:
        raise AdapterError(f"{directory}: its rank {adapter.rank} is above adapters.max_rank {most_rank}")
    return adapter


def _header(directory: Path) -> dict[str, TensorEntry]:
    path = directory / FILE
    try:
        return read_header(path)
    except FileNotFoundError:
        pickled = directory / "adapter_model.bin"
        instead = f"; {pickled.name} is a pickle, which is not read: save it as safetensors" if pickled.exists() else ""
        raise AdapterError(f"{path}: not found{instead}") from None
    except (NotWhole, OSError) as error:
        raise AdapterError(f"{path}: {error}") from None
