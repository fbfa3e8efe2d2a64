"""A model's directory with other values in its config.json: everything that reads the directory sees these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from moe_ray.convert.directories import make_once
from moe_ray.convert.recipe import no_progress
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.foreign import CONFIG, PARAMS
from moe_ray.model.json_files import read_json_object
from moe_ray.model.mistral_params import config_of_params
from moe_ray.model.model_config import ModelConfig

FOLDER: Final = "overridden"
"""Of the cache."""
LENGTHENING: Final = ("yarn", "linear")
"""Kinds of rotary embeddings whose factor says how many times longer a context may be."""
_OF_TOKENS: Final = frozenset({"eos_token_id"})
"""Keys that what reads tokens asks for, and not `ModelConfig`."""


class _Asked(dict[str, Any]):
    """A config.json that remembers which keys a reader asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)


def merged_config(raw: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The config.json `raw` with the keys of `overrides` in it.

    Rotary embeddings have two spellings: `rope_parameters` (transformers 5), and `rope_scaling` beside `rope_theta`. An
    override in either one counts, whichever the file has. Where one scales positions by a factor, as `LENGTHENING` do,
    and says nothing of `max_position_embeddings`, this becomes the trained context times the factor, as in vLLM.
    Raises `ConfigError` for a key that nothing reads, `CheckpointError` where the reader refuses the result.
    """
    merged = {**raw, **overrides}
    rope = _rope(raw, overrides)
    if rope is not None:
        merged = {key: value for key, value in merged.items() if key not in ("rope_scaling", "rope_theta")}
        merged["rope_parameters"] = rope
        _lengthen(merged, rope, overrides)
    asked = _Asked(merged)
    ModelConfig.from_dict(asked, f"{source} with model.hf_overrides")
    known = asked.keys_asked | _OF_TOKENS | {"rope_scaling", "rope_parameters", "rope_theta"}
    if unread := sorted(set(overrides) - known):
        raise ConfigError(
            f"`model.hf_overrides`: nothing reads {', '.join(map(repr, unread))} of a {raw.get('model_type')} model's "
            f"config.json; read are {', '.join(sorted(known))}"
        )
    return merged


def _rope(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_parameters` of the merged file; None where nothing of them is overridden. Raises `ConfigError`."""
    given = next((key for key in ("rope_parameters", "rope_scaling") if key in overrides), None)
    if given is None and "rope_theta" not in overrides:
        return None
    before = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    after = before if given is None else overrides[given] or {"rope_type": "default"}
    if not isinstance(after, dict):
        raise ConfigError(f"`model.hf_overrides`: `{given}` must be an object or null, got {after!r}")
    theta = {} if not isinstance(before, dict) else before
    told = [overrides.get("rope_theta"), after.get("rope_theta"), theta.get("rope_theta"), raw.get("rope_theta")]
    found = next((each for each in told if each is not None), None)
    return {**after, **({} if found is None else {"rope_theta": found})}


def _lengthen(merged: dict[str, Any], rope: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Set the longest context of a model whose positions are scaled."""
    name, trained_name = "max_position_embeddings", "original_max_position_embeddings"
    kind, factor, now = rope.get("rope_type") or rope.get("type"), rope.get("factor"), merged.get(name)
    if name in overrides or kind not in LENGTHENING or not isinstance(now, int) or isinstance(now, bool):
        return
    trained = rope.get(trained_name) or now
    if not isinstance(factor, int | float) or not isinstance(trained, int) or factor <= 1:
        return
    if kind == "yarn":
        rope[trained_name] = trained  # what it would be by default is about to change
    merged[name] = max(now, int(trained * factor))


def overridden(where: Path, overrides: Mapping[str, Any], cache_dir: Path) -> Path:
    """What stands for `where`, a checkpoint's directory or its config.json alone, with `overrides` in its config.json.

    A directory under `cache_dir` of links to its files, made once for the same files and overrides; for a config.json
    alone, such a file. Raises as `merged_config` does, and `CheckpointError` where the directory cannot be made.
    """
    alone = where.is_file()
    directory = where.parent if alone else where
    source = where if alone else directory / CONFIG
    if alone or source.exists():
        raw = read_json_object(source)
    else:
        source = directory / PARAMS
        raw = config_of_params(read_json_object(source), str(source))
    merged = merged_config(raw, overrides, str(source))
    names = [] if alone else sorted(path.name for path in directory.iterdir() if path.name != CONFIG)
    identity = json.dumps([str(where.absolute()), names, merged], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    target = cache_dir.expanduser() / FOLDER / f"{directory.name}-{digest}"

    def build(work: Path) -> None:
        for name in names:
            (work / name).symlink_to((directory / name).absolute())
        (work / CONFIG).write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")

    try:
        make_once(target, CONFIG, build, no_progress)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be overridden in {target} ({error})") from error
    return target / CONFIG if alone else target
