"""Names what a directory holds where it is not what `Checkpoint` reads, by the names of its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from moe_ray.errors import CheckpointError

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
PARAMS: Final = "params.json"
"""Mistral's config.json."""
CONSOLIDATED: Final = "consolidated*.safetensors"
CONSOLIDATED_INDEX: Final = "consolidated.safetensors.index.json"
GGUF_SOURCE: Final = "gguf.json"
"""In a directory that was made of a GGUF file: which one."""
ADAPTER_CONFIG: Final = "adapter_config.json"
GPTQ_SINGLE: Final = "gptq_model*.safetensors"
"""AutoGPTQ's name of it: with the bits and the group size."""
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

Contents = Callable[[str], Mapping[str, Any]]
"""A JSON file's object by the file's name; {} where it cannot be had."""

_CONVERT: Final = "convert it to safetensors with config.json (transformers: model.save_pretrained)"


def what_it_is(names: Collection[str], contents: Contents) -> str | None:
    """What a directory of these files (not those of its folders) is, if it is something else; None: nothing known.

    A sentence without the directory's name. What is read has `CONFIG`, and an index or a single file of weights; or
    it has `CONFIG` or `PARAMS`, and `CONSOLIDATED`; or it was made of a GGUF file.
    """
    here = set(names)
    consolidated = any(fnmatch(name, CONSOLIDATED) for name in here)
    loads = CONFIG in here and (GGUF_SOURCE in here or (index_in(here) or single_in(here)) is not None)
    loads = loads or (consolidated and bool({CONFIG, PARAMS} & here))
    if ADAPTER_CONFIG in here:
        return _adapter(contents(ADAPTER_CONFIG), loads)
    if loads:
        return None
    for pattern, sentence in _OTHERS:
        found = sorted(name for name in here if fnmatch(name, pattern))
        if found:
            return sentence.format(found[0])
    return None


def index_in(names: Collection[str]) -> str | None:
    """Which of a directory's files says where each tensor lies; None: none does."""
    if INDEX in names or SINGLE in names:
        return INDEX if INDEX in names else None
    return _only(names, f"{GPTQ_SINGLE}.index.json")


def single_in(names: Collection[str]) -> str | None:
    """Which of a directory's files holds all tensors, where there is no index; None: none does."""
    return SINGLE if SINGLE in names else _only(names, GPTQ_SINGLE)


def _only(names: Collection[str], pattern: str) -> str | None:
    found = [name for name in names if fnmatch(name, pattern)]
    return found[0] if len(found) == 1 else None


def is_shard(name: str) -> bool:
    """Whether an index may name this file: a safetensors file beside it."""
    return name.endswith(".safetensors") and "/" not in name and "\\" not in name


def refuse_foreign(directory: Path) -> None:
    """Raise `CheckpointError` that says what `directory` holds, where that is known not to be read."""
    try:
        names = [path.name for path in directory.iterdir() if path.is_file()]
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror})") from None
    found = what_it_is(names, lambda name: _read_json(directory / name))
    if found is not None:
        raise CheckpointError(f"{directory}: {found}")


def refuse_foreign_file(path: Path) -> None:
    """The same for a file where a directory is expected."""
    raise CheckpointError(
        f"{path}: a file; a model is a directory with {CONFIG} and safetensors files, or a .gguf file"
    )


_OTHERS: Final = (  # (a file's pattern, what a directory with it is), the surest first
    (
        "consolidated*.pt*",
        "{}: Mistral's own layout as pickles, which can run code when read and are refused; use the model's "
        "safetensors files",
    ),
    (CONSOLIDATED, "{}: Mistral's own layout, whose params.json is missing"),
    ("*.gguf", "{}: a GGUF file, which is read as a model of its own: name the file"),
    *((pattern, "{}: pickle checkpoints can run code when read and are refused; " + _CONVERT) for pattern in PICKLES),
    ("*.h5", "{}: TensorFlow weights; " + _CONVERT),
    ("*.msgpack", "{}: Flax weights; " + _CONVERT),
    ("*.onnx", "{}: an ONNX model; use the weights it was made of"),
)


def _adapter(settings: Mapping[str, Any], beside_base: bool) -> str:
    base = settings.get("base_model_name_or_path")
    kind = f"a {settings.get('peft_type', 'LORA')} adapter" + (f" of {base}" if base else "")
    if beside_base:
        return (
            f"{ADAPTER_CONFIG}: {kind} lies beside the weights and would not be applied: move it elsewhere and serve "
            f"it with --adapter NAME=PATH, or merge it into the weights (peft: merge_and_unload)"
        )
    return (
        f"{ADAPTER_CONFIG}: {kind}, not a model: serve it with --adapter NAME=PATH beside its base model, or merge it "
        f"into that (peft: merge_and_unload)"
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
