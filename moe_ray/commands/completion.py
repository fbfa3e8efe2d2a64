"""What the shell may complete: words of options, models of this machine, sampling parameters. Loads nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

Completer = Callable[[str], list[str]]

CHECKPOINT: Final = "config.json"
PARAMS: Final = "params.json"


def one_of(*words: str) -> Completer:
    """Completes to one of these words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def models(incomplete: str) -> list[str]:
    """`demo`, repositories in the Hub's cache, and paths on the way to a checkpoint or a GGUF file."""
    named = [name for name in ("demo", *cached_repositories()) if name.startswith(incomplete)]
    paths = (_model_path(path, entry) for path, entry in _entries(incomplete))
    return [*named, *(path for path in paths if path is not None)]


def cached_repositories() -> list[str]:
    """owner/name of each model in the Hugging Face cache."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))
    names = sorted(path.name for path in cache.glob("models--*--*"))
    return [name.removeprefix("models--").replace("--", "/", 1) for name in names]


def sampling_settings(incomplete: str) -> list[str]:
    """NAME= of each sampling parameter of a conversation."""
    from moe_ray.commands.chat_settings import SETTINGS

    return [f"{name}=" for name in SETTINGS if name.startswith(incomplete)]


def paths_from(start: str) -> list[str]:
    """Paths that begin with `start`; directories end in a slash."""
    return [f"{path}/" if entry.is_dir() else path for path, entry in _entries(start)]


def _model_path(path: str, entry: os.DirEntry[str]) -> str | None:
    """A path on the way to a model; a directory that is none itself ends in a slash, for one may be below."""
    if not entry.is_dir():
        return path if entry.name.endswith(".gguf") else None
    is_model = any(os.path.exists(os.path.join(entry.path, file)) for file in (CHECKPOINT, PARAMS))
    return path if is_model else f"{path}/"


def _entries(start: str) -> list[tuple[str, os.DirEntry[str]]]:
    """(path, entry) of what lies where `start` points; hidden files only where it names them."""
    parent, name = os.path.split(start)
    try:
        entries = sorted(os.scandir(os.path.expanduser(parent) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        (os.path.join(parent, entry.name), entry)
        for entry in entries
        if entry.name.startswith(name) and (name or not entry.name.startswith("."))
    ]
