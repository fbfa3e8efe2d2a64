"""Checks of the model: whether its files are whole, its tokenizer and template, and whether it fits this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_ray.config import DEMO_MODEL
from moe_ray.doctor.finding import Finding, Subject, as_size, error, ok, warning
from moe_ray.doctor.machine import available_memory
from moe_ray.errors import MoeRayError

LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """A model's files on this machine."""

    name: str
    directory: Path | None
    """None: not on this machine; `away` says why, or what the Hub says."""
    away: Finding | None = None
    pointers: tuple[str, ...] = ()
    """Files that are Git LFS's notes of where the weights are."""
    missing: tuple[str, ...] = ()
    """Files that the index names."""
    weights_fault: str | None = None
    tokenizer_fault: str | None = None
    has_template: bool = False
    needed: int | None = None
    """Bytes of all actors together, with the least KV cache."""
    available: int = 0


def model_facts(subject: Subject) -> CheckpointState:
    """Find the model without downloading it, read every header and the tokenizer."""
    from moe_ray.hub import resolve_model, with_overrides

    config = subject.config
    name = config.model.path
    try:
        away = _away(name, config.model.revision)
        if away is not None:
            return CheckpointState(name, None, away)
        # A repository may be here in part: what lacks must not be fetched now.
        cached = _cached(name, config.model.revision)
        directory = resolve_model(config) if cached is None else with_overrides(config, cached)
    except MoeRayError as failure:
        mend = "give --model a directory, a GGUF file, a Hugging Face repository or `demo`"
        return CheckpointState(name, None, error("model", str(failure), mend))
    pointers = pointers_in(directory)
    missing = missing_shards(directory)
    if pointers or missing:
        return CheckpointState(name, directory, pointers=pointers, missing=missing)
    needed: int | None = None
    weights_fault, tokenizer_fault, has_template = None, None, False
    try:
        needed = subject.bytes_needed(config, directory)
    except MoeRayError as failure:
        weights_fault = str(failure)
    try:
        has_template = _has_template(directory)
    except MoeRayError as failure:
        tokenizer_fault = str(failure)
    available = available_memory()
    return CheckpointState(
        name, directory, None, (), (), weights_fault, tokenizer_fault, has_template, needed, available
    )


def pointers_in(directory: Path) -> tuple[str, ...]:
    """Files of a clone made without Git LFS."""
    small = (path for path in sorted(directory.iterdir()) if path.is_file() and path.stat().st_size <= POINTER_BYTES)
    return tuple(path.name for path in small if path.read_bytes().startswith(LFS_POINTER))


def missing_shards(directory: Path) -> tuple[str, ...]:
    """Weight files that an index names and that are not there."""
    from moe_ray.model.repo_files import weight_files

    if not any(directory.glob("*.safetensors.index.json")):
        return ()
    return tuple(name for name in weight_files(directory) if not (directory / name).exists())


def check_files(facts: CheckpointState) -> list[Finding]:
    """The checkpoint is here, whole, and of a kind that is read."""
    if facts.away is not None:
        return [facts.away]
    if facts.pointers:
        says = f"{facts.directory}: {_some(facts.pointers)} are Git LFS pointers, not the files"
        return [error("model", says, f"git lfs install && git -C {facts.directory} lfs pull")]
    if facts.missing:
        says = f"{facts.directory}: the index names {_some(facts.missing)}, which is missing"
        return [error("model", says, "fetch the whole model again")]
    if facts.weights_fault is not None:
        return [error("model", facts.weights_fault, "fetch the file again, or serve another model: docs/using.md")]
    return [ok("model", f"{facts.name} in {facts.directory}: every tensor is there")]


def check_tokenizer(facts: CheckpointState) -> list[Finding]:
    """Text becomes tokens, and conversations become text."""
    if facts.directory is None or facts.pointers or facts.missing:
        return []
    if facts.tokenizer_fault is not None:
        return [error("tokenizer", facts.tokenizer_fault, "copy the tokenizer's files of the model beside its weights")]
    if not facts.has_template:
        says = "no chat template: chat requests are refused, completions work"
        return [warning("tokenizer", says, "add `chat_template` to tokenizer_config.json, or chat_template.jinja")]
    return [ok("tokenizer", "with a chat template")]


def check_fit(facts: CheckpointState) -> list[Finding]:
    """All actors fit into the memory of this machine."""
    if facts.needed is None:
        return []
    said = f"{as_size(facts.needed)} needed with a small KV cache, {as_size(facts.available)} free"
    if facts.needed > facts.available:
        mend = "--quantize int4 --quantize-trunk int8, more machines (docs/deployment.md), or moe-ray plan for cards"
        return [warning("fit", f"{said}: too little for this machine alone", mend)]
    return [ok("fit", said)]


def examine_model(subject: Subject) -> Sequence[Finding]:
    """Files, tokenizer, memory; nothing where no model is asked about."""
    if not subject.model_given:
        return []
    facts = model_facts(subject)
    return [*check_files(facts), *check_tokenizer(facts), *check_fit(facts)]


def _has_template(directory: Path) -> bool:
    from moe_ray.text.tokenizer import Tokenizer

    return Tokenizer(directory).chat_template.exists


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_repo(name: str) -> bool:
    from moe_ray.hub import is_repo_id

    return name != DEMO_MODEL and not Path(name).expanduser().exists() and is_repo_id(name)


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of a repository in the cache; None: the name is none of a repository, or nothing of it is here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not _is_repo(name):
        return None
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _away(name: str, revision: str | None) -> Finding | None:
    """What to say of a repository that is not in the cache; None for all else."""
    if not _is_repo(name) or ":" in name or _cached(name, revision) is not None:
        return None
    return _hub_says(name, lambda api: api.model_info(name, revision=revision, timeout=5))


def _hub_says(name: str, ask: Callable[[Any], Any]) -> Finding:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        ask(HfApi())
    except GatedRepoError:
        says = f"{name} is gated: its owner has not let this user in"
        return error("model", says, "ask for access on its page, then hf auth login")
    except RepositoryNotFoundError:
        return error("model", f"the Hub has no {name} that this user may see", "check its name, or hf auth login")
    except OfflineModeIsEnabled:
        says = f"{name} is not in the cache, and HF_HUB_OFFLINE is set"
        return error("model", says, "unset HF_HUB_OFFLINE, or give --model a directory")
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as failure:
        said = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        return error("model", f"{name} is not in the cache, and the Hub does not give it ({said})", "see the hub check")
    return ok("model", f"{name} is not on this machine yet; the Hub has it, moe-ray serve will fetch it")
