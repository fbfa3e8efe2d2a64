"""Which files of a Hugging Face repository are read: the small ones beside weights, and the weights."""

from __future__ import annotations

import json
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from moe_ray.model.foreign import CONSOLIDATED, GPTQ_SINGLE, INDEX, PARAMS, SINGLE, index_in, is_shard

SMALL_FILES: Final = ("*.json", "*.jinja", "tokenizer.model*", "merges.txt")
"""What is read beside weights: configuration, tokenizer, templates. Of the repository's root: folders are not read."""
IN_FOLDERS: Final = "*/*"


def small_files(names: Collection[str]) -> list[str]:
    """Those of a repository's files that are read beside weights."""
    return sorted(name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in SMALL_FILES))


def weight_files(directory: Path) -> list[str]:
    """The weights that are read of a repository whose small files are in `directory`: by its index, or the one file.

    Other files with the same weights in another form (consolidated.safetensors, variants, copies in folders) are not.
    An index that cannot be read is left to `Checkpoint`, which says what is wrong with it.
    """
    try:
        index = index_in([path.name for path in directory.iterdir()]) or INDEX
        files = json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values()
    except FileNotFoundError:
        return [SINGLE]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted({name for name in files if isinstance(name, str) and is_shard(name)})


def other_weight_files(names: Collection[str]) -> list[str]:
    """Weights under other names, read where there is neither index nor the one file: Mistral's own, or AutoGPTQ's."""
    pattern = CONSOLIDATED if PARAMS in names else GPTQ_SINGLE
    return sorted(name for name in names if "/" not in name and fnmatch(name, pattern))
