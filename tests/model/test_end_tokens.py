"""End tokens from every file that names one: ids, or tokens resolved as transformers resolves them."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from moe_ray.errors import CheckpointError
from moe_ray.model.end_tokens import end_token_ids
from moe_ray.text.tokenizer import Tokenizer

IM_END = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
ADDED = {"added_tokens": {"<|im_start|>": 32000, "<|im_end|>": 32001}}
DECODER = {
    "32000": {"content": "<|im_start|>", "special": True},
    "32001": {"content": "<|im_end|>", "special": True},
}
Files = Mapping[str, Mapping[str, Any]]


def written(directory: Path, files: Files, tokenizer_model: bool = True) -> Path:
    """A directory with JSON files, and Mixtral's tokenizer.model unless told otherwise."""
    if tokenizer_model:
        with resources.as_file(resources.files("mistral_common") / "data" / "tokenizer.model.v1") as model:
            shutil.copy(model, directory / "tokenizer.model")
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"config": {"eos_token_id": 2}}, {2}),
        ({"config": {"eos_token_id": [2, 5]}}, {2, 5}),
        ({"config": {"eos_token_id": None}}, set()),
        ({"config": {"text_config": {"eos_token_id": 7}}}, {7}),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [8, 9]}}, {2, 8, 9}),
        ({"generation_config": {"eos_token_id": []}}, set()),
    ],
)
def test_ids_in_the_model_configs(files: Files, expected: set[int], tmp_path: Path) -> None:
    assert end_token_ids(written(tmp_path, files, tokenizer_model=False), 100) == expected


CHATML: dict[str, Files] = {
    "tokenizer_config": {"tokenizer_config": {"eos_token": "<|im_end|>"}, **ADDED},
    "AddedToken": {"tokenizer_config": {"eos_token": {"__type": "AddedToken", **IM_END}}, **ADDED},
    "added_tokens_decoder": {"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": DECODER}},
    "special_tokens_map": {"special_tokens_map": {"eos_token": IM_END}, **ADDED},
    "special_tokens_map string": {"special_tokens_map": {"eos_token": "<|im_end|>"}, **ADDED},
    "the older file counts": {
        "tokenizer_config": {"eos_token": "</s>"},
        "special_tokens_map": {"eos_token": IM_END},
        **ADDED,
    },
    "in no list of added tokens": {"tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}},
}


@pytest.mark.parametrize("name", CHATML)
def test_token_named_by_the_tokenizer_files(name: str, tmp_path: Path) -> None:
    """The engine and the tokenizer agree, and with transformers' own resolution."""
    from transformers import PreTrainedTokenizerFast

    written(tmp_path, {"config": {"eos_token_id": 2, "vocab_size": 32002}, **CHATML[name]})
    assert end_token_ids(tmp_path, 32002) == Tokenizer(tmp_path).eos_token_ids == {2, 32001}
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).eos_token_id == 32001


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {2}),  # the vocabulary's own
        ({"eos_token": None}, set()),
        ({"eos_token": "<|im_end|>", "added_tokens_decoder": {"31999": {"content": "<|im_end|>"}}}, {31999}),
        ({"eos_token": "Hello", "added_tokens_decoder": {}}, {16230}),  # no special token, but one of the vocabulary
    ],
)
def test_tokenizer_model_alone(config: dict[str, Any], expected: set[int], tmp_path: Path) -> None:
    assert end_token_ids(written(tmp_path, {"tokenizer_config": config}), 32000) == expected


@pytest.mark.parametrize("vocabulary", ["BPE", "Unigram"])
def test_tokenizer_json(vocabulary: str, tmp_path: Path) -> None:
    pieces = {"a": 0, "<eos>": 1}
    vocab: Any = pieces if vocabulary == "BPE" else [[piece, 0.0] for piece in pieces]
    added = [{"id": 2, "content": "<|im_end|>", "special": True}]
    files: dict[str, Any] = {"tokenizer": {"added_tokens": added, "model": {"type": vocabulary, "vocab": vocab}}}
    assert end_token_ids(written(tmp_path, files, tokenizer_model=False), 10) == set()
    for token, token_id in (("<|im_end|>", 2), ("<eos>", 1), ("<new>", 3)):
        files["tokenizer_config"] = {"eos_token": token, "added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}
        assert end_token_ids(written(tmp_path, files, tokenizer_model=False), 10) == {token_id}


@pytest.mark.parametrize("special", [None, [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "</s>"}]])
def test_tekken(special: list[dict[str, Any]] | None, tmp_path: Path) -> None:
    content: dict[str, Any] = {"config": {"default_vocab_size": 1500}, "vocab": []}
    if special is not None:
        content["special_tokens"] = special
    written(tmp_path, {"tekken": content}, tokenizer_model=False)
    assert end_token_ids(tmp_path, 2000) == {2 if special is None else 1}


@pytest.mark.parametrize("token_id", [-1, 300, 10**30])
def test_ids_that_the_model_has_not_are_left_out_and_said(
    token_id: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, {"generation_config": {"eos_token_id": [2, token_id]}}, tokenizer_model=False)
    with caplog.at_level(logging.WARNING):
        assert end_token_ids(tmp_path, 300) == {2}
    assert "generation_config.json" in caplog.text
    assert str(token_id) in caplog.text


@pytest.mark.parametrize("name", ["generation_config", "config"])
@pytest.mark.parametrize("value", ["2", "</s>", 2.0, True, {"id": 2}, [2, None], [[2]], ["2"]])
def test_what_is_no_id_is_refused_by_file_and_key(name: str, value: object, tmp_path: Path) -> None:
    written(tmp_path, {name: {"eos_token_id": value}}, tokenizer_model=False)
    with pytest.raises(CheckpointError, match=rf"/{name}\.json: `eos_token_id` must be a token id"):
        end_token_ids(tmp_path, 300)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("value", [2, ["</s>"], {}, {"content": 2}, "", False])
def test_what_is_no_token_is_refused_by_file_and_key(name: str, value: object, tmp_path: Path) -> None:
    written(tmp_path, {name: {"eos_token": value}})
    with pytest.raises(CheckpointError, match=rf"/{name}\.json: `eos_token` must be a token's text"):
        end_token_ids(tmp_path, 300)


@pytest.mark.parametrize("name", ["generation_config", "config", "tokenizer_config", "special_tokens_map", "tokenizer"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_file_without_an_object_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    written(tmp_path, {"tokenizer_config": {"eos_token": "</s>"}})
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"/{name}\.json"):
        end_token_ids(tmp_path, 300)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens", {"<|im_end|>": "32000"}),
        ("tokenizer_config", {"eos_token": "a", "added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config", {"eos_token": "a", "added_tokens_decoder": ["a"]}),
        ("tokenizer", {"model": {}}),
        ("tekken", {"config": {}}),
    ],
)
def test_misshapen_vocabularies_are_named(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    files: dict[str, Any] = {"tokenizer_config": {"eos_token": "</s>"}, name: content}
    with pytest.raises(CheckpointError, match=rf"/{name}\.json"):
        end_token_ids(written(tmp_path, files), 300)


def test_needs_no_torch(tmp_path: Path) -> None:
    written(tmp_path, CHATML["tokenizer_config"])
    code = (
        "import sys, pathlib; from moe_ray.model.end_tokens import end_token_ids\n"
        "assert end_token_ids(pathlib.Path(sys.argv[1]), 40000) == {32001}\n"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
