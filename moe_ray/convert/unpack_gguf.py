"""A GGUF file as a checkpoint directory: its metadata as Hugging Face's files, its tensors where they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from moe_ray.convert.directories import make_once
from moe_ray.convert.gguf_config import config_of, generation_config_of
from moe_ray.convert.gguf_metadata import GgufMetadata
from moe_ray.convert.recipe import no_progress
from moe_ray.errors import CheckpointError
from moe_ray.model.foreign import CONFIG, GGUF_SOURCE
from moe_ray.model.formats import TensorEntry
from moe_ray.model.gguf_file import read_gguf
from moe_ray.model.tensor_file import NotWhole

FOLDER: Final = "gguf"
"""Of the cache."""
UNPACKED_VERSION: Final = 1
"""Raise it when the same file is unpacked to other files; what older versions made is left alone."""
_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def unpacked(path: Path, cache_dir: Path) -> Path:
    """A directory under `cache_dir` with the configuration, tokenizer and a link to the weights of a GGUF file.

    `path` may be any part of a file in parts (llama.cpp's gguf-split). Made once: a file of another path, size or time
    has a directory of its own. Raises `CheckpointError` naming file and key.
    """
    parts = parts_of(path)
    stats = {str(part): part.stat() for part in parts}
    identity = [UNPACKED_VERSION, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    target = cache_dir.expanduser() / FOLDER / f"{parts[0].stem}-{digest}"
    if (target / GGUF_SOURCE).exists():
        return target
    try:
        make_once(target, GGUF_SOURCE, lambda work: _unpack(parts, work), no_progress)
    except OSError as error:
        raise CheckpointError(f"{path}: its metadata cannot be unpacked to {target} ({error})") from error
    return target


def parts_of(path: Path) -> list[Path]:
    """All files of the model that `path` is a file of, the one with the metadata first. Raises `CheckpointError`."""
    path = path.absolute()
    names = part_names(path.name)
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise CheckpointError(f"{path}: a part of a model whose part {missing[0]} is not beside it")
    return [path.with_name(name) for name in names]


def part_names(name: str) -> list[str]:
    """The names of all files of the model that has a file of this name.

    >>> part_names("mixtral-00002-of-00002.gguf")
    ["mixtral-00001-of-00002.gguf", "mixtral-00002-of-00002.gguf"]
    """
    found = _PART.fullmatch(name)
    if found is None:
        return [name]
    count = found["count"]
    return [f"{found['stem']}-{number:05d}-of-{count}.gguf" for number in range(1, int(count) + 1)]


def choose_file(names: Collection[str], where: str) -> str | None:
    """The first file of the one model that these GGUF files hold; None: none. Raises `CheckpointError` on several."""
    models = sorted({part_names(name)[0] for name in names if name.endswith(".gguf")})
    if len(models) > 1:
        raise CheckpointError(f"{where}: several GGUF files; name one: {', '.join(models)}")
    return models[0] if models else None


def _unpack(parts: list[Path], work: Path) -> None:
    metadata, tensors = _read(parts)
    _write(work / CONFIG, config_of(metadata, tensors))
    if generation := generation_config_of(metadata):
        _write(work / "generation_config.json", generation)
    if "tokenizer.ggml.model" in metadata:
        from moe_ray.convert.gguf_tokenizer import has_tokenizer, tokenizer_config_of, tokenizer_of

        if has_tokenizer(metadata):
            tokenizer_of(metadata).save(str(work / "tokenizer.json"), pretty=False)
            _write(work / "tokenizer_config.json", tokenizer_config_of(metadata))
    for part in parts:
        (work / part.name).symlink_to(part)
    _write(work / GGUF_SOURCE, {"files": [str(part) for part in parts]})


def _read(parts: list[Path]) -> tuple[GgufMetadata, dict[str, TensorEntry]]:
    """The metadata of the first file, and the tensors of all."""
    headers = []
    for part in parts:
        try:
            headers.append(read_gguf(part))
        except NotWhole as error:
            raise CheckpointError(f"{part}: not a whole GGUF file ({error}); download or copy it again") from None
    metadata = GgufMetadata(str(parts[0]), headers[0].metadata)
    count = metadata.integer("split.count", 1)
    if max(count, 1) != len(parts):
        raise CheckpointError(
            f"{parts[0]}: one of {count} parts of a model; their names must end in -00001-of-{count:05d}.gguf, …"
        )
    return metadata, {name: entry for header in headers for name, entry in header.tensors.items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
