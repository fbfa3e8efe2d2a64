"""From what `--model` says to a checkpoint directory on this machine."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moe_ray.config import DEMO_MODEL, Config
from moe_ray.errors import AdapterError, CheckpointError
from moe_ray.model.foreign import (
    CONFIG,
    CONSOLIDATED,
    GGUF_SOURCE,
    GPTQ_SINGLE,
    INDEX,
    PARAMS,
    SINGLE,
    index_in,
    refuse_foreign_file,
    single_in,
    what_it_is,
)
from moe_ray.model.repo_files import IN_FOLDERS, SMALL_FILES, weight_files

if TYPE_CHECKING:
    from moe_ray.convert.demo import Progress
    from moe_ray.model.checkpoint import Checkpoint

_REPO_ID: Final = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<file>[\w./-]+\.gguf))?")


def resolve_model(config: Config, progress: Progress | None = None) -> Path:
    """Return the directory of `config.model.path`: built (demo), found (a directory) or downloaded (a Hub repo id).

    A GGUF file (a path, the only one of a directory, or one of a repo as owner/name:FILE.gguf) is unpacked: see
    `unpacked`. With `config.model.hf_overrides` it is a directory with these in its config.json. Raises
    `CheckpointError` when there is no such directory, file or repo, or the download fails, `ConfigError`. Where
    `config.model.load_format` is dummy, no weights are looked for: see `dummy_checkpoint`.
    """
    if config.model.load_format == "dummy":
        from moe_ray.convert.dummy import dummy_checkpoint
        from moe_ray.convert.recipe import no_progress

        small = with_overrides(config, _resolve_small(config))
        return dummy_checkpoint(small, config.cache_dir, progress or no_progress)
    return with_overrides(config, _resolve_model(config, progress))


def with_overrides(config: Config, where: Path) -> Path:
    """`where`, a directory or a config.json, with what `config.model.hf_overrides` says. Raises as `overridden`."""
    if not config.model.hf_overrides:
        return where
    from moe_ray.convert.overridden import overridden

    return overridden(where, config.model.hf_overrides, config.cache_dir)


def _resolve_model(config: Config, progress: Progress | None) -> Path:
    name = config.model.path
    if name == DEMO_MODEL:
        from moe_ray.convert.demo import demo_model_path

        return demo_model_path(config.cache_dir, progress)
    directory = Path(name).expanduser()
    if directory.is_dir():
        gguf = _gguf_in(directory)
        return directory.resolve() if gguf is None else _unpacked(gguf, config)
    if directory.is_file():
        if directory.suffix != ".gguf":
            refuse_foreign_file(directory)
        return _unpacked(directory, config)
    repo = _REPO_ID.fullmatch(name)
    if repo is None:
        raise CheckpointError(
            f"model {name!r}: neither a directory, nor a .gguf file, nor a Hugging Face repo id (owner/name, or "
            f"owner/name:FILE.gguf), nor `demo`"
        )
    if repo["file"] is not None:
        return _unpacked(_download_gguf(repo["repo"], repo["file"], config.model.revision), config)
    return _download(name, config.model.revision)


def _resolve_small(config: Config) -> Path:
    """The directory of `config.model.path` with its config.json and tokenizer, or its config.json alone."""
    name = config.model.path
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path.resolve()
    if path.exists() or _REPO_ID.fullmatch(name) is None or name.endswith(".gguf"):
        return _resolve_model(config, None)
    return _download_small(name, config.model.revision)


def resolve_adapter(source: str) -> Path:
    """Return the directory of an adapter: found, or downloaded (a Hub repo id). Raises `AdapterError`."""
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory.resolve()
    if directory.exists() or not is_repo_id(source) or source.endswith(".gguf"):
        raise AdapterError(f"adapter {source!r}: neither a directory nor a Hugging Face repo id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        with _said(source):
            return Path(snapshot_download(source, allow_patterns=["adapter_*"], ignore_patterns=[IN_FOLDERS]))
    except CheckpointError as error:
        raise AdapterError(str(error).replace("model", "adapter", 1)) from error


def resolve_draft(config: Config, progress: Progress | None = None, config_only: bool = False) -> Path | None:
    """The same of `config.engine.draft_model`; None where there is none. `demo`: what the demo model was made of.

    `config_only`: as `resolve_config`.
    """
    name = config.engine.draft_model
    if name is None:
        return None
    if name == DEMO_MODEL:
        from moe_ray.convert.dense_demo import dense_demo_path

        return dense_demo_path(config.cache_dir, progress)
    model = config.model.model_copy(update={"path": name, "revision": None, "hf_overrides": {}})
    return (resolve_config if config_only else resolve_model)(config.model_copy(update={"model": model}), progress)


def check_draft(config: Config) -> None:
    """Raise `ConfigError` where a token id means another token to `config.engine.draft_model` than to the model."""
    draft = resolve_draft(config)
    if draft is not None:
        from moe_ray.text.same_vocabulary import check_same_vocabulary

        check_same_vocabulary(draft, resolve_model(config))


def open_draft(config: Config, target: Path, progress: Progress | None = None) -> Checkpoint | None:
    """Open `config.engine.draft_model` for the model of directory `target`; None where there is none.

    Raises `ConfigError` where a token id means one token to the one and another to the other, `CheckpointError`.
    """
    directory = resolve_draft(config, progress)
    if directory is None:
        return None
    from moe_ray.model.checkpoint import Checkpoint
    from moe_ray.text.same_vocabulary import check_same_vocabulary

    check_same_vocabulary(directory, target)
    return Checkpoint.open(directory)


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form of a Hugging Face repository, or of a GGUF file in one."""
    return _REPO_ID.fullmatch(name) is not None


def resolve_config(config: Config, progress: Progress | None = None) -> Path:
    """Return where to read the config.json of `config.model.path`: the checkpoint's directory, or that file alone.

    Of a Hub repo id no more than this file is fetched, unless all weights are here already. Raises `CheckpointError`.
    """
    name = config.model.path
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return with_overrides(config, path.resolve())
    repo = _REPO_ID.fullmatch(name)
    if name == DEMO_MODEL or path.exists() or repo is None or repo["file"] is not None:
        return resolve_model(config, progress)
    return with_overrides(config, _download_config(name, config.model.revision))


def _unpacked(gguf: Path, config: Config) -> Path:
    from moe_ray.convert.unpack_gguf import unpacked

    return unpacked(gguf, config.cache_dir)


def _gguf_in(directory: Path) -> Path | None:
    """The GGUF file that is the model of a directory; None: other files are. Raises `CheckpointError` on several."""
    from moe_ray.convert.unpack_gguf import choose_file

    if any((directory / name).exists() for name in (INDEX, SINGLE, GGUF_SOURCE)) or any(directory.glob(CONSOLIDATED)):
        return None
    name = choose_file([path.name for path in directory.glob("*.gguf")], str(directory))
    return None if name is None else directory / name


@contextmanager
def _said(name: str) -> Iterator[None]:
    """Turn what a download raises into `CheckpointError`."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"model {name!r}: not in the local cache, and the Hub cannot be reached") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"model {name!r}: download failed ({first_line})") from error


def _download_gguf(repo_id: str, file: str, revision: str | None) -> Path:
    """All parts of one GGUF file of a repository; returns the first."""
    from huggingface_hub import hf_hub_download

    from moe_ray.convert.unpack_gguf import part_names

    with _said(f"{repo_id}:{file}"):
        parts = [hf_hub_download(repo_id, name, revision=revision) for name in part_names(file)]
    return Path(parts[0])


def _download_small(repo_id: str, revision: str | None) -> Path:
    """All of a repository but its weights."""
    from huggingface_hub import snapshot_download

    small = {"allow_patterns": list(SMALL_FILES), "ignore_patterns": [IN_FOLDERS]}
    with _said(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, **small))


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    directory = _download_small(repo_id, revision)
    with _said(repo_id):
        # A snapshot's directory is named by its commit: the weights are of that one, wherever the branch is by now.
        weights = [glob.escape(name) for name in weight_files(directory)]
        if weights:
            snapshot_download(repo_id, revision=directory.name, allow_patterns=weights)
        if not _has_weights(directory):
            pattern = CONSOLIDATED if (directory / PARAMS).exists() else GPTQ_SINGLE
            only = {"allow_patterns": [pattern], "ignore_patterns": [IN_FOLDERS]}
            snapshot_download(repo_id, revision=directory.name, **only)
    if not _has_weights(directory):
        _refuse_foreign_repo(repo_id, directory.name)
    return directory


def _has_weights(directory: Path) -> bool:
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return (index_in(names) or single_in(names)) is not None or any(directory.glob(CONSOLIDATED))


def _download_config(repo_id: str, revision: str | None) -> Path:
    """The config.json of a repository, or its directory here where all weights are in it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _said(repo_id):
        try:
            path = Path(hf_hub_download(repo_id, CONFIG, revision=revision))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"model {repo_id!r}: its {CONFIG} is not in the local cache, and the Hub cannot be reached: give "
                f"--model a {CONFIG} that you have"
            ) from error
        except EntryNotFoundError as error:
            raise CheckpointError(f"model {repo_id!r}: the repository has no {CONFIG}") from error
    weights = weight_files(path.parent)
    return path.parent if weights and all((path.parent / name).exists() for name in weights) else path


def _refuse_foreign_repo(repo_id: str, commit: str) -> None:
    """Raise `CheckpointError` that says what a repository without weights for us holds, where its files tell."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def nothing(name: str) -> Mapping[str, object]:
        return {}

    try:
        names = [name for name in HfApi().list_repo_files(repo_id, revision=commit) if "/" not in name]
    except (HfHubHTTPError, httpx.HTTPError, OSError):
        return  # opening the directory says what is missing in it
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        choices = ", ".join(f"{repo_id}:{name}" for name in gguf)
        raise CheckpointError(f"model {repo_id!r}: GGUF files; name one: {choices}")
    found = what_it_is(names, nothing)
    if found is not None:
        raise CheckpointError(f"model {repo_id!r}: {found}")
