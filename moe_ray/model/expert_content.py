"""Which experts of several checkpoints have the same weights, by their bytes as they are stored.

Bytes at one place of one file are equal without a look at them. Of others a few rows are compared first, and only where
these are equal all bytes, by a digest, which is remembered for as long as the file does not change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_ray.core import ExpertKey
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import weights_of_expert

READERS: Final = 4
"""Experts that are read at a time."""
CHUNK_BYTES: Final = 4 << 20
MOST_REMEMBERED: Final = 65_536
"""Digests that are kept, the latest: of a Mixtral-8x7B there are 256."""
MEMORY: Final = "expert-digests.json"
"""File of the cache directory with the digests that are known."""
_BLOB: Final = re.compile(r"[0-9a-f]{64}")
"""A file of weights in the Hub's cache: its name is the SHA-256 of its content."""
_COMPARED: Final[Mapping[str, Callable[[ModelConfig], object]]] = {
    "model_type": lambda model: model.family.model_type,
    "hidden_size": lambda model: model.hidden_size,
    "intermediate_size": lambda model: model.intermediate_size,
    "num_hidden_layers": lambda model: model.num_hidden_layers,
    "layers without experts": lambda model: sorted(model.dense_layers),
    "num_local_experts": lambda model: model.num_local_experts,
    "hidden_act": lambda model: model.hidden_act,
    "swiglu_limit": lambda model: "none" if model.clamped_swiglu is None else str(model.clamped_swiglu),
    "quantization": lambda model: "none" if model.quantization is None else model.quantization.method,
}
"""What experts of two models must have in common to be held by one actor → its value."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive bytes of a file."""

    file: str
    """What is equal for equal files: see `_named`."""
    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Expert:
    """Where one checkpoint has one expert of one layer, and in what form."""

    form: str
    stretches: tuple[_Stretch, ...]

    @property
    def place(self) -> str:
        """Equal only for experts whose bytes are equal."""
        spots = " ".join(f"{each.file}@{each.start}+{each.nbytes}" for each in self.stretches)
        return f"{self.form} {spots}"

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.stretches)


def check_alike(base: ModelConfig, variant: ModelConfig, name: str, same_dtype: bool) -> None:
    """Raise `ConfigError` unless experts of `variant` can be held and computed beside those of `base`.

    Vocabulary, attention, router, rotary embeddings and end tokens may differ. `same_dtype`: the checkpoints' dtypes
    must be the same, because they say in which dtype is computed.
    """
    compared = dict(_COMPARED)
    if same_dtype:
        compared["dtype"] = lambda model: model.dtype
    for key, value in compared.items():
        ours, others = value(base), value(variant)
        if ours != others:
            hint = "; `model.dtype` says in which both are computed" if key == "dtype" else ""
            raise ConfigError(
                f"variant {name!r}: its {key} is {others}, that of the first model is {ours}; they share experts only "
                f"where these are the same{hint}"
            )
    if base.quantization is not None and variant.quantization is not None:
        ours_by = (base.quantization.zeros_plus_one, base.quantization.group, base.quantization.block)
        others_by = (variant.quantization.zeros_plus_one, variant.quantization.group, variant.quantization.block)
        if ours_by != others_by:
            raise ConfigError(f"variant {name!r}: it is quantised in other groups than the first model")


def contents_of(
    checkpoints: Sequence[Checkpoint], memory: Path | None = None, progress: Progress | None = None
) -> list[dict[ExpertKey, str]]:
    """Of each checkpoint, (layer, expert) → a text that is equal for equal weights, within one layer.

    `memory`: the directory where digests are kept. `progress` is told of the bytes that are read in full.
    Raises `CheckpointError`.
    """
    found = [_experts_of(checkpoint) for checkpoint in checkpoints]
    samples = _samples(checkpoints, found)
    once: dict[str, _Expert] = {}
    """Place → an expert whose bytes have to be read."""
    alike: dict[tuple[int, bytes], set[str]] = {}
    for (layer, _), sample, expert in samples:
        alike.setdefault((layer, sample), set()).add(expert.place)
    for (layer, _), sample, expert in samples:
        if len(alike[layer, sample]) > 1:
            once[expert.place] = expert
    digests = _digests(once, None if memory is None else memory / MEMORY, progress)
    return [{key: digests.get(e.place, e.place) for key, e in experts.items()} for experts in found]


def _experts_of(checkpoint: Checkpoint) -> dict[ExpertKey, _Expert]:
    """Every expert of a checkpoint. Raises `CheckpointError`."""
    config, named = checkpoint.config, dict[str, tuple[str, Path]]()
    found = {}
    for layer in config.mixture_layers:
        for expert in range(config.num_local_experts):
            forms, stretches = [], []
            for weight in weights_of_expert(config, layer, expert):
                stored = checkpoint.find(weight)
                parts = [(part.dtype, part.shape, part.alternation) for part in stored.parts]
                forms.append((stored.format, stored.shape, stored.grouping, stored.block, parts))
                for part in stored.parts:
                    file = checkpoint.files[part.name]
                    if file not in named:
                        named[file] = _named(checkpoint.directory / file)
                    start = checkpoint.start_of(part)
                    stretches.append(_Stretch(*named[file], start, part.span))
            found[layer, expert] = _Expert(repr(forms), tuple(stretches))
    return found


def _named(path: Path) -> tuple[str, Path]:
    """What is equal for equal files, and the file itself: its name in the Hub's cache, else which file it is."""
    real = path.resolve()
    if real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
        return real.name, real
    try:
        known = real.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return f"{known.st_dev}:{known.st_ino}", real


def _samples(
    checkpoints: Sequence[Checkpoint], found: Sequence[Mapping[ExpertKey, _Expert]]
) -> list[tuple[ExpertKey, bytes, _Expert]]:
    """(key, fingerprint, expert) of the experts of all checkpoints; each place is looked at once."""
    seen: dict[str, bytes] = {}
    samples = []
    for checkpoint, experts in zip(checkpoints, found, strict=True):
        for key, expert in experts.items():
            if expert.place not in seen:
                seen[expert.place] = checkpoint.fingerprint(weights_of_expert(checkpoint.config, *key))
            samples.append((key, seen[expert.place], expert))
    return samples


def _digests(experts: Mapping[str, _Expert], memory: Path | None, progress: Progress | None) -> dict[str, str]:
    """Place → digest of form and bytes. Raises `CheckpointError`."""
    known = _remembered(memory)
    keys = {place: _memory_key(expert) for place, expert in experts.items()}
    missing = {place: expert for place, expert in experts.items() if keys[place] not in known}
    total, done, lock = sum(expert.nbytes for expert in missing.values()), 0, threading.Lock()

    def read(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    with ThreadPoolExecutor(READERS, thread_name_prefix="expert-digest") as threads:
        made = threads.map(lambda expert: _digest(expert, read), missing.values())
        for place, digest in zip(missing, made, strict=True):
            known[keys[place]] = digest
    if missing and memory is not None:
        _remember(memory, known)
    return {place: known[key] for place, key in keys.items()}


def _digest(expert: _Expert, read: Callable[[int], None]) -> str:
    digest, room = hashlib.blake2b(expert.form.encode(), digest_size=16), memoryview(bytearray(CHUNK_BYTES))
    for stretch in expert.stretches:
        try:
            with open(stretch.path, "rb", buffering=0) as file:
                file.seek(stretch.start)
                left = stretch.nbytes
                while left:
                    got = file.readinto(room[: min(left, CHUNK_BYTES)])
                    if not got:
                        raise CheckpointError(f"{stretch.path}: the file ended {left} bytes early")
                    digest.update(room[:got])
                    left -= got
        except OSError as error:
            raise CheckpointError(f"{stretch.path}: cannot be read ({error})") from None
        read(stretch.nbytes)
    return digest.hexdigest()


def _memory_key(expert: _Expert) -> str:
    """By what a digest is remembered: form, and of each stretch its place, with path, size and age of its file."""
    told = [expert.form]
    for stretch in expert.stretches:
        known = os.stat(stretch.path)
        told.append(f"{stretch.path} {known.st_size} {known.st_mtime_ns} {stretch.start} {stretch.nbytes}")
    return hashlib.blake2b("\n".join(told).encode(), digest_size=16).hexdigest()


def _remembered(memory: Path | None) -> dict[str, str]:
    """The digests of a file; none where it cannot be read: then they are made anew."""
    try:
        told: Any = {} if memory is None else json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in told.items()} if isinstance(told, dict) else {}


def _remember(memory: Path, known: Mapping[str, str]) -> None:
    """Write the digests; where that cannot be, they are made anew the next time."""
    fresh = memory.with_suffix(f".{os.getpid()}.tmp")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(dict(list(known.items())[-MOST_REMEMBERED:])), encoding="utf-8")
        fresh.replace(memory)
    except OSError:
        fresh.unlink(missing_ok=True)
