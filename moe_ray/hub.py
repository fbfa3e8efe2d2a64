"""From what `--model` says to a checkpoint directory on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from moe_ray.config import DEMO_MODEL, Config
from moe_ray.errors import CheckpointError

if TYPE_CHECKING:
    from moe_ray.convert.demo import Progress

WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(config: Config, progress: Progress | None = None) -> Path:
    """Return the directory of `config.model.path`: built (demo), found (a directory) or downloaded (a Hub repo id).

    Raises `CheckpointError` when there is no such directory or repo, or the download fails.
    """
    name = config.model.path
    if name == DEMO_MODEL:
        from moe_ray.convert.demo import demo_model_path

        return demo_model_path(config.cache_dir, progress)
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory.resolve()
    if not _REPO_ID.fullmatch(name):
        raise CheckpointError(
            f"model {name!r}: neither a directory, nor a Hugging Face repo id (owner/name), nor `demo`"
        )
    return _download(name, config.model.revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(WANTED)))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"model {repo_id!r}: not in the local cache, and the Hub cannot be reached") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"model {repo_id!r}: download failed ({first_line})") from error
