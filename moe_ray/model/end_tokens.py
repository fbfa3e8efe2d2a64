"""The end-of-sequence ids of a checkpoint directory: one reader for the engine and for the tokenizer. No torch.

An id ends a sequence if any file says so: generation_config.json and config.json by id, the tokenizer's files by name.
The name is resolved as transformers resolves it, without loading the tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_ray.errors import CheckpointError
from moe_ray.model.json_files import read_json_object

logger = logging.getLogger(__name__)

TOKENIZER_FILES: Final = ("tokenizer.json", "tekken.json", "tokenizer.model")  # the first that exists is used
MODEL_CONFIGS: Final = ("generation_config.json", "config.json")
TEKKEN_EOS: Final = "</s>"
# Files of 2024 leave the list out; its first ids were the same in all of them.
TEKKEN_SPECIAL: Final = {"<unk>": 0, "<s>": 1, TEKKEN_EOS: 2}


def tokenizer_file(directory: Path) -> Path | None:
    """The file that holds the directory's vocabulary; None where there is none."""
    paths = (directory / name for name in TOKENIZER_FILES)
    return next((path for path in paths if path.is_file()), None)


def end_token_ids(directory: Path, vocab_size: int | None = None) -> frozenset[int]:
    """Every end-of-sequence id that the files of `directory` name and a vocabulary of `vocab_size` ids can produce.

    Raises `CheckpointError` naming the file and the key of a value that is no token id or no token.
    """
    named = [*_ids_in_model_configs(directory), *_id_of_tokenizer(directory)]
    found: set[int] = set()
    for token_id, source in named:
        if token_id < 0 or (vocab_size is not None and token_id >= vocab_size):
            logger.warning("%s names end token %d, which is no id of the model: ignored", source, token_id)
        else:
            found.add(token_id)
    return frozenset(found)


def _ids_in_model_configs(directory: Path) -> Iterator[tuple[int, str]]:
    for name in MODEL_CONFIGS:
        path = directory / name
        config = read_json_object(path)
        yield from _ids(config.get("eos_token_id"), f"{path}: `eos_token_id`")
        nested = config.get("text_config")
        if isinstance(nested, dict):
            yield from _ids(nested.get("eos_token_id"), f"{path}: `text_config.eos_token_id`")


def _ids(value: object, source: str) -> Iterator[tuple[int, str]]:
    if value is None:
        return
    for token_id in value if isinstance(value, list) else [value]:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise CheckpointError(f"{source} must be a token id or a list of token ids, found {value!r}")
        yield token_id, source


def _id_of_tokenizer(directory: Path) -> Iterator[tuple[int, str]]:
    file = tokenizer_file(directory)
    if file is None:
        return
    names = _SpecialNames.read(directory)
    vocabulary = _VOCABULARIES[file.name](file)
    eos = names.eos if names.says_eos else vocabulary.default_eos
    if eos is None:
        return
    declared = _declared_tokens(directory)
    # A sentencepiece vocabulary cannot hold what was added to it later; in tokenizer.json everything has its id.
    known = {**declared, **vocabulary.ids} if vocabulary.complete else {**vocabulary.ids, **declared}
    if eos not in known:  # transformers appends the special tokens that the vocabulary lacks, in this order
        for name in (names.bos, eos):
            if name is not None and name not in known:
                known[name] = 1 + max(known.values(), default=-1)
    yield known[eos], names.source if names.says_eos else str(file)


@dataclass(frozen=True, slots=True)
class _SpecialNames:
    """Strings of the special tokens, and the file and key that named the end token."""

    bos: str | None
    eos: str | None
    says_eos: bool
    """Some file has the key, be it null; else the vocabulary's own default counts."""
    source: str

    @staticmethod
    def read(directory: Path) -> _SpecialNames:
        path, overriding = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
        config = read_json_object(path)
        # As transformers does: the older file counts, and counts more, where the newer one lists no added tokens.
        older = {} if "added_tokens_decoder" in config else read_json_object(overriding)
        holder, file = (older, overriding) if "eos_token" in older else (config, path)
        return _SpecialNames(
            bos=_name(older.get("bos_token", config.get("bos_token")), f"{path}: `bos_token`"),
            eos=_name(holder.get("eos_token"), f"{file}: `eos_token`"),
            says_eos="eos_token" in holder,
            source=f"{file}: `eos_token`",
        )


def _name(value: object, source: str) -> str | None:
    """Text of a special token: a string or an AddedToken object."""
    content = value.get("content") if isinstance(value, dict) else value
    if content is None and not isinstance(value, dict):
        return None
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"{source} must be a token's text or an object with its `content`, found {value!r}")
    return content


def _declared_tokens(directory: Path) -> dict[str, int]:
    """Text → id of the tokens that tokenizer_config.json or added_tokens.json add to the vocabulary."""
    path = directory / "tokenizer_config.json"
    decoder = read_json_object(path).get("added_tokens_decoder")
    if decoder is None:
        path = directory / "added_tokens.json"
        added = read_json_object(path)
        if not all(isinstance(token_id, int) for token_id in added.values()):
            raise CheckpointError(f"{path}: must map tokens to ids")
        return dict(added)
    try:
        return {token["content"]: int(token_id) for token_id, token in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: `added_tokens_decoder` must map ids to objects with a `content`") from None


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    ids: Mapping[str, int]
    default_eos: str | None
    """The end token where no file names one."""
    complete: bool
    """The file holds the added tokens too."""


def _tokenizer_json(path: Path) -> _Vocabulary:
    content = read_json_object(path)
    try:
        vocab: Any = content["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable vocabulary ({error!r})") from None
    return _Vocabulary({**ids, **added}, None, complete=True)


def _tekken(path: Path) -> _Vocabulary:
    content = read_json_object(path)
    listed = content.get("special_tokens")
    try:
        size = int(content["config"]["default_vocab_size"])
        ids = dict(TEKKEN_SPECIAL) if listed is None else {str(t["token_str"]): int(t["rank"]) for t in listed}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable vocabulary ({error!r})") from None
    return _Vocabulary({"": size - 1, **ids}, TEKKEN_EOS, complete=False)


def _sentencepiece(path: Path) -> _Vocabulary:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a sentencepiece model ({error})") from None
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    eos: int = model.eos_id()
    return _Vocabulary(ids, model.id_to_piece(eos) if eos >= 0 else None, complete=False)


_VOCABULARIES = {"tokenizer.json": _tokenizer_json, "tekken.json": _tekken, "tokenizer.model": _sentencepiece}
