"""Which files of a checkpoint directory hold its weights, and their headers: safetensors or GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from moe_ray.errors import CheckpointError
from moe_ray.model.foreign import CONSOLIDATED, CONSOLIDATED_INDEX, INDEX, SINGLE, index_in, is_shard, single_in
from moe_ray.model.formats import TensorEntry
from moe_ray.model.gguf_file import read_gguf_tensors
from moe_ray.model.safetensors_file import read_header
from moe_ray.model.tensor_file import NotWhole

Header = dict[str, TensorEntry]
"""Tensor name → what its file says of it."""

_KINDS: Final[dict[str, tuple[str, Callable[[Path], Header]]]] = {
    ".safetensors": ("safetensors", read_header),
    ".gguf": ("GGUF", read_gguf_tensors),
}
"""A file's ending → what it is called, and the reader of its header. All else is read by offset."""


def find_weights(directory: Path) -> tuple[dict[str, str], dict[str, Header]]:
    """Tensor name → file name, and the headers that were read for it: none where an index names the files.

    Hugging Face's files count more than Mistral's, and these more than GGUF. Raises `CheckpointError`.
    """
    here = [path.name for path in directory.iterdir()]
    if index := _index_in(here):
        return _read_index(directory / index), {}  # files are opened when a tensor of theirs is wanted, not before
    single = single_in(here)
    names = [single] if single else []
    for pattern in (CONSOLIDATED, "*.gguf"):
        names = names or sorted(path.name for path in directory.glob(pattern))
    if not names:
        raise CheckpointError(f"{directory}: neither {INDEX} nor {SINGLE} found")
    headers = {name: header_of(directory / name) for name in names}
    files: dict[str, str] = {}
    for name, header in headers.items():
        for tensor in header:
            if tensor in files:
                raise CheckpointError(f"{directory}: tensor {tensor} is in {files[tensor]} and in {name}")
            files[tensor] = name
    return files, headers


def index_of(directory: Path) -> str:
    """The file that says which tensor is in which; `INDEX` where there is none."""
    return _index_in([path.name for path in directory.iterdir()]) or INDEX


def _index_in(here: list[str]) -> str | None:
    beside = CONSOLIDATED_INDEX if CONSOLIDATED_INDEX in here and single_in(here) is None else None
    return index_in(here) or beside


def header_of(path: Path, wanted: str = "") -> Header:
    """A file's header; `wanted` says in errors which tensor it was opened for. Raises `CheckpointError`."""
    kind, read = _KINDS[path.suffix]
    try:
        return read(path)
    except (NotWhole, OSError) as error:
        raise CheckpointError(f"{path}{wanted}: not a whole {kind} file ({error}); download or copy it again") from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable weight_map ({error!r})") from None
    if not isinstance(files, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in files.items()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    for name in set(files.values()):
        if not is_shard(name):
            raise CheckpointError(f"{path}: weight_map names {name!r}; only *.safetensors files beside it are read")
    return files
