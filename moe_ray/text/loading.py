"""Loads transformers' tokenizer of a checkpoint from any of the files that people have. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from moe_ray.errors import CheckpointError
from moe_ray.model.json_files import read_json_object

# Tekken files do not say which of their special tokens plays which part; these are mistral_common's.
TEKKEN_NAMES: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def load_tokenizer(vocabulary: Path) -> Any:
    """The `PreTrainedTokenizerFast` of tokenizer.json, tokenizer.model or tekken.json, and of the files beside it.

    It is the class that `AutoTokenizer` picks for Mixtral whatever class the files name (Llama's own would replace a
    byte-level vocabulary's rules by sentencepiece's), but `AutoTokenizer` imports torch. Raises `CheckpointError`.
    """
    directory = vocabulary.parent
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if vocabulary.name != "tokenizer.json":
        options["vocab_file"] = str(vocabulary)
        said = read_json_object(directory / "tokenizer_config.json")
        defaults: dict[str, Any] = {"add_bos_token": True}  # as sentencepiece's and Tekken's models were trained
        if vocabulary.name == "tekken.json":
            defaults |= TEKKEN_NAMES
        options |= {name: value for name, value in defaults.items() if name not in said}
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, **options)
    except ImportError as exc:
        package = "mistral-common (pip install mistral-common)" if vocabulary.name == "tekken.json" else str(exc)
        raise CheckpointError(f"{vocabulary} can only be read with a package that is missing: {package}") from exc
    except Exception as exc:  # tokenizers raises bare Exception
        raise CheckpointError(f"the tokenizer {vocabulary} and the files beside it cannot be read: {exc}") from exc
    if vocabulary.name != "tokenizer.json":
        _check_added_tokens(tokenizer, directory)
    return tokenizer


def _check_added_tokens(tokenizer: Any, directory: Path) -> None:
    """Raise `CheckpointError` where an added token did not get the id that its file says: ids are given in a row."""
    for token, token_id in read_json_object(directory / "added_tokens.json").items():
        got = tokenizer.convert_tokens_to_ids(token)
        if got != token_id:
            raise CheckpointError(
                f"{directory / 'added_tokens.json'}: {token!r} has id {token_id}, but would be loaded as {got}; "
                f"list the tokens of the ids before it, or save the tokenizer as tokenizer.json"
            )
