"""Every form of tokenizer files: the ids of sentencepiece, AutoTokenizer and mistral_common, and exact streaming."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor
from tokenizer_forms import (
    IM_END,
    IM_START,
    MODELS,
    TEXTS,
    WITHOUT_WAY_BACK,
    chatml_tokenizer,
    mixtral_config,
    new_tokenizer_json,
    old_tokenizer_json,
    sentencepiece_model,
    tekken,
    write_json,
)
from transformers import AutoTokenizer

from moe_ray.core import SamplingParams
from moe_ray.errors import CheckpointError
from moe_ray.text.detokenizer import IncrementalDetokenizer
from moe_ray.text.tokenizer import Tokenizer

Form = Callable[[Path], Path]
MISTRAL_FORMS: dict[str, tuple[Form, Callable[[], MistralTokenizer] | None]] = {  # how to write it, its format
    "model alone": (sentencepiece_model, MistralTokenizer.v1),
    "new tokenizer.json": (new_tokenizer_json, MistralTokenizer.v1),
    "old tokenizer.json": (old_tokenizer_json, MistralTokenizer.v1),
    "model v2": (lambda d: sentencepiece_model(d, "v2"), MistralTokenizer.v2),
    "model v3": (lambda d: sentencepiece_model(d, "v3"), MistralTokenizer.v3),
    "model v7": (lambda d: sentencepiece_model(d, "v7"), MistralTokenizer.v7),
    "tekken v3": (lambda d: tekken(d, "v3", listed=False, size=4000), None),  # None: the file itself says it
    "tekken v7": (lambda d: tekken(d, "v7", size=4000), None),
    "tekken v13": (lambda d: tekken(d, "v13", size=4000), None),
}
CHATML_FORMS: dict[str, Form] = {
    "added tokens in tokenizer.json": lambda d: chatml_tokenizer(d, "json"),
    "added_tokens_decoder": lambda d: chatml_tokenizer(d, "decoder"),
    "added_tokens.json": lambda d: chatml_tokenizer(d, "added_tokens"),
}
CHATS = {
    "one turn": [("user", "Hello, who are you?")],
    "three turns": [("user", "  two leading"), ("assistant", "A model."), ("user", "中文 😀? ")],
    "system": [("system", "Be brief."), ("user", "Hi")],
    "system and turns": [("system", "Be brief."), ("user", "Hi"), ("assistant", " ok"), ("user", "b")],
    "empty system": [("system", ""), ("user", "Hi")],
    "spaces after the answer": [("user", "Hi"), ("assistant", "ok  "), ("user", "b")],
    "two systems": [("system", "One"), ("system", "Two"), ("user", "Hi"), ("assistant", "x"), ("user", "y")],
}


@pytest.fixture(scope="module", params=MISTRAL_FORMS)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, MISTRAL_FORMS[request.param][0](tmp_path_factory.mktemp("form"))


@pytest.fixture(scope="module")
def tokenizer(form: tuple[str, Path]) -> Tokenizer:
    return Tokenizer(form[1])


@pytest.fixture(scope="module")
def mistral(form: tuple[str, Path]) -> MistralTokenizer:
    name, directory = form
    make = MISTRAL_FORMS[name][1]
    return MistralTokenizer.from_file(str(directory / "tekken.json")) if make is None else make()


@pytest.mark.parametrize("chat", CHATS)
def test_chat_has_the_ids_of_mistral_common(tokenizer: Tokenizer, mistral: MistralTokenizer, chat: str) -> None:
    kinds: dict[str, Any] = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}
    theirs = ChatCompletionRequest(messages=[kinds[role](content=text) for role, text in CHATS[chat]])
    ours = [{"role": role, "content": text} for role, text in CHATS[chat]]
    assert tokenizer.apply_chat_template(ours) == mistral.encode_chat_completion(theirs).tokens


def test_text_has_the_ids_of_mistral_common(
    form: tuple[str, Path], tokenizer: Tokenizer, mistral: MistralTokenizer
) -> None:
    raw = mistral.instruct_tokenizer.tokenizer
    for text in [*TEXTS, *WITHOUT_WAY_BACK]:
        # transformers does not add a second space in front there, and we do as it does
        if form[0] != "new tokenizer.json" or not text.startswith((" ", "▁")):
            assert tokenizer.encode(text, False) == raw.encode(text, bos=False, eos=False)
        assert tokenizer.encode(text) == [tokenizer.bos_token_id, *tokenizer.encode(text, False)]


@pytest.mark.parametrize("version", MODELS)
def test_tokenizer_model_alone_has_the_ids_of_sentencepiece(version: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_model(tmp_path, version))
    model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    rng = random.Random(5)
    characters = sorted(set("".join(TEXTS)) | set("   <>[]")) + [" "] * 40
    for text in [*TEXTS, *WITHOUT_WAY_BACK, *("".join(rng.choices(characters, k=30)) for _ in range(200))]:
        assert tokenizer.encode(text, False) == model.encode(text), repr(text)


@pytest.mark.parametrize(
    ("kind", "legacy"), [("LlamaTokenizer", None), ("LlamaTokenizer", False), ("LlamaTokenizerFast", True)]
)
@pytest.mark.parametrize(
    "write",
    [sentencepiece_model, new_tokenizer_json, old_tokenizer_json, lambda d: chatml_tokenizer(d, "added_tokens")],
    ids=["model", "new", "old", "added"],
)
def test_agrees_with_autotokenizer_whatever_the_config_names(
    write: Form, kind: str, legacy: bool | None, tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    config |= {"tokenizer_class": kind, "add_bos_token": True}
    config.pop("legacy", None)
    write_json(path, config if legacy is None else {**config, "legacy": legacy})
    mixtral_config(tmp_path)
    reference, tokenizer = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    special = ["[INST] Hi [/INST] a</s> <s>b", "<|im_start|>user\nHi<|im_end|>\n", "x<unk>y"]
    for text in [*TEXTS, *WITHOUT_WAY_BACK, *special]:
        assert tokenizer.encode(text) == reference.encode(text), repr(text)
    assert tokenizer.eos_token_ids == {reference.eos_token_id}


@pytest.mark.parametrize("name", CHATML_FORMS)
def test_added_tokens_are_one_id_each(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(CHATML_FORMS[name](tmp_path))
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>", False)
    assert (ids[0], ids[-1]) == (IM_START, IM_END)
    assert tokenizer.eos_token_ids == {IM_END}
    assert IM_END in tokenizer.special_ids
    assert tokenizer.decode(ids[1:]) == "user\nHi"
    assert_streams_exactly(tokenizer)


def test_byte_level_file_whose_config_names_llama(demo_model: Path, smol: Tokenizer, tmp_path: Path) -> None:
    shutil.copy(demo_model / "tokenizer.json", tmp_path)
    for kind in ("LlamaTokenizer", "LlamaTokenizerFast"):
        write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": kind, "eos_token": "<|im_end|>"})
        mixtral_config(tmp_path)
        tokenizer, reference = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for text in TEXTS:
            assert tokenizer.encode(text) == smol.encode(text) == reference.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_streams_exactly_and_spells_tokens(tokenizer: Tokenizer) -> None:
    assert_streams_exactly(tokenizer)


def assert_streams_exactly(tokenizer: Tokenizer) -> None:
    rng = random.Random(6)
    for text in TEXTS:
        ids = tokenizer.encode(text, False)
        spelled = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
        assert spelled.removeprefix(" ").lstrip(" ") == text.lstrip(" ")
        for cut in {0, rng.randrange(len(ids)), rng.randrange(len(ids))}:
            before = tokenizer.decode(ids[:cut])
            if before.endswith("\ufffd"):
                continue
            detokenizer = IncrementalDetokenizer(tokenizer, ids[:cut], SamplingParams())
            streamed = "".join(detokenizer.push([i]) for i in ids[cut:]) + detokenizer.finish()
            assert before + streamed == tokenizer.decode(ids)


def test_published_tekken_file(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tekken(tmp_path, listed=False))
    reference = MistralTokenizer.from_file(str(tmp_path / "tekken.json")).instruct_tokenizer.tokenizer
    for text in [*TEXTS, *WITHOUT_WAY_BACK]:
        assert tokenizer.encode(text) == reference.encode(text, bos=True, eos=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (1, {2}, 131072)


def test_old_tekken_file_without_mistral_common_names_the_package(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['mistral_common'] = None\n"
        "import transformers.utils.import_utils as known; known.is_mistral_common_available = lambda: False\n"
        "from moe_ray.text.tokenizer import Tokenizer; from moe_ray.errors import CheckpointError\n"
        "try: print(len(Tokenizer(sys.argv[1]).encode('Hello')))\n"
        "except CheckpointError as error: print(error)\n"
    )

    def said(directory: Path) -> str:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(directory)], capture_output=True, text=True, timeout=60
        ).stdout

    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    assert "mistral-common" in said(tekken(tmp_path / "old", listed=False, size=500))
    assert int(said(tekken(tmp_path / "new", listed=True, size=500))) > 1


def test_added_token_with_a_hole_before_it_is_refused(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path)
    write_json(tmp_path / "added_tokens.json", {"<|im_end|>": 32001})
    with pytest.raises(CheckpointError, match=r"added_tokens\.json.*'<\|im_end\|>' has id 32001"):
        Tokenizer(tmp_path)


def test_other_files_beside_it_do_not_matter(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path)
    shutil.copy(tmp_path / "tokenizer.model", tmp_path / "tokenizer.model.v3")
    shutil.copy(tmp_path / "tokenizer.model", tmp_path / "a-tokenizer.model")
    assert Tokenizer(tmp_path).encode("Hello") == [1, 22557]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tekken.json"])
@pytest.mark.parametrize("content", ["", "{}", "[]", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_broken_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "tekken_240911.json", "vocab.json"])
def test_a_vocabulary_of_another_name_is_told_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json \(or tokenizer\.model\) is missing.*{name} is there"):
        Tokenizer(tmp_path)
