"""Encoding, chat templates and streaming decode, on a byte-level tokenizer and on Mixtral's own sentencepiece model."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from moe_ray.core import SamplingParams
from moe_ray.errors import CheckpointError, InvalidRequest
from moe_ray.text.tokenizer import IncrementalDetokenizer, Tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "  two leading spaces, a\ttab,\r\n\nnewlines   and trailing  ",
    "中文、日本語、한국어 混在 text",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji 🇫🇷",
    "नमस्ते مرحبا שלום ไทย",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b zero width, e\u0301 combining",
    "def f(x):\n    return x ** 2  # ✓\n",
]

# What Mixtral-8x7B-Instruct-v0.1 shipped until mid 2024: it raises on a system role.
STRICT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    with resources.as_file(resources.files("mistral_common") / "data" / "tokenizer.model.v1") as model:
        shutil.copy(model, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def mixtral(mixtral_dir: Path) -> Tokenizer:
    return Tokenizer(mixtral_dir)


@pytest.fixture(scope="module")
def smol(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


def test_agrees_with_autotokenizer(demo_model: Path, smol: Tokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(demo_model)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "?"}]
    assert smol.apply_chat_template(chat) == reference.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    for text in TEXTS:
        assert smol.encode(text) == reference.encode(text)
        assert smol.decode(smol.encode(text)) == text


def test_never_imports_torch(demo_model: Path, mixtral_dir: Path) -> None:
    code = (
        "import sys; from moe_ray.text.tokenizer import Tokenizer; a = Tokenizer(sys.argv[1]);"
        "b = Tokenizer(sys.argv[2]);"
        "a.apply_chat_template([{'role': 'user', 'content': 'x'}]); b.decode(b.encode('x'));"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(demo_model), str(mixtral_dir)], check=True, timeout=60)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_without_template_gives_the_ids_of_mistral_common(mixtral: Tokenizer, system: str | None) -> None:
    turns = [("user", "Hello, who are you?"), ("assistant", "A model."), ("user", "中文 😀?")]
    kinds = {"user": UserMessage, "assistant": AssistantMessage}
    theirs = [kinds[role](content=text) for role, text in turns]
    ours = [{"role": role, "content": text} for role, text in turns]
    if system is not None:
        theirs.insert(0, SystemMessage(content=system))
        ours.insert(0, {"role": "system", "content": system})
    expected = MistralTokenizer.v1().encode_chat_completion(ChatCompletionRequest(messages=theirs)).tokens
    assert mixtral.apply_chat_template(ours) == expected


def test_bos_is_added_once(mixtral: Tokenizer) -> None:
    assert mixtral.encode("Hi")[0] == mixtral.bos_token_id == 1
    spelled_out = "<s> [INST] Hi [/INST]"
    assert mixtral.encode(spelled_out) == mixtral.encode(spelled_out, add_special_tokens=False)
    assert mixtral.encode("Hi", add_special_tokens=False)[0] != 1
    chat = [{"role": "user", "content": "Hi"}]
    assert mixtral.apply_chat_template(chat, add_special_tokens=True) == mixtral.apply_chat_template(chat)
    assert mixtral.apply_chat_template(chat).count(1) == 1


def test_system_role_is_merged_only_when_the_template_refuses_it(mixtral_dir: Path, tmp_path: Path) -> None:
    shutil.copy(mixtral_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": STRICT_TEMPLATE}))
    strict = Tokenizer(tmp_path)
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    merged = {"role": "user", "content": "Be brief.\n\nHi"}
    assert strict.render_chat([system, user]) == strict.render_chat([merged]) == "<s> [INST] Be brief.\n\nHi [/INST]"
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        strict.apply_chat_template([user, user])
    assert error.value.param == "messages"
    with pytest.raises(InvalidRequest, match="Conversation roles"):  # no user turn to merge into
        strict.apply_chat_template([system])


def test_system_role_goes_to_a_template_that_takes_it(smol: Tokenizer) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert smol.render_chat(chat).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_content_parts(smol: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert smol.apply_chat_template([{"role": "user", "content": parts}]) == smol.apply_chat_template(
        [{"role": "user", "content": "a\nb"}]
    )
    with pytest.raises(InvalidRequest, match="image_url"):
        smol.apply_chat_template([{"role": "user", "content": [*parts, {"type": "image_url", "image_url": {}}]}])


def test_continue_final_message(smol: Tokenizer) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer"}]
    assert smol.render_chat(chat, False, continue_final_message=True).endswith("assistant\nThe answer")
    with pytest.raises(InvalidRequest, match="not compatible"):
        smol.render_chat(chat, True, continue_final_message=True)


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "tools", "self"])
def test_template_variables_cannot_take_over(smol: Tokenizer, name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        smol.apply_chat_template([{"role": "user", "content": "Hi"}], template_kwargs={name: "x"})


def test_no_template_and_no_inst_tokens(demo_model: Path, tmp_path: Path) -> None:
    shutil.copy(demo_model / "tokenizer.json", tmp_path)
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "Hi"}])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json \(or tokenizer\.model\) is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer(tmp_path)


def test_eos_and_vocabulary_come_from_every_file(mixtral_dir: Path, tmp_path: Path) -> None:
    shutil.copy(mixtral_dir / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "vocab_size": 32064}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == {2, 7, 8, 9}
    assert tokenizer.vocab_size == 32064
    assert Tokenizer(mixtral_dir).vocab_size == 32000
    assert tokenizer.decode([32063]) == ""


@pytest.mark.parametrize("name", ["smol", "mixtral"])
def test_token_bytes_joined_are_the_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in TEXTS:
        spelled = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text, add_special_tokens=False))
        # sentencepiece puts a space in front of a text that has none
        assert spelled.decode().removeprefix("" if name == "smol" or text[0] == " " else " ") == text
    special = next(iter(tokenizer.eos_token_ids))
    assert tokenizer.token_to_str(special) in ("</s>", "<|im_end|>")


def stream(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, prompt: list[int], rng: random.Random
) -> tuple[list[str], IncrementalDetokenizer]:
    """Push `ids` in random portions; return the deltas, `finish()` last."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, params)
    deltas, at = [], 0
    while at < len(ids):
        size = rng.choice([1, 1, 1, 2, 5])
        deltas.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*deltas, detokenizer.finish()], detokenizer


@pytest.mark.parametrize("skip", [True, False])
def test_stream_equals_decode_on_random_byte_level_tokens(smol: Tokenizer, skip: bool) -> None:
    rng = random.Random(1)
    params = SamplingParams(skip_special_tokens=skip)
    for _ in range(300):
        ids = [rng.choice([rng.randrange(smol.vocab_size), rng.randrange(300)]) for _ in range(rng.randrange(1, 60))]
        deltas, _ = stream(smol, ids, params, [], rng)
        assert "".join(deltas) == smol.decode(ids, skip)


def test_stream_equals_decode_on_random_mixtral_tokens(mixtral: Tokenizer) -> None:
    rng = random.Random(2)
    characters = list("".join(TEXTS))
    for _ in range(300):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 12)):
            if rng.random() < 0.5:
                ids += [rng.randrange(259, 32000) for _ in range(rng.randrange(1, 5))]
            else:  # characters that are not in the vocabulary become runs of byte tokens
                ids += mixtral.encode("".join(rng.choices(characters, k=4)), add_special_tokens=False)
        prompt = rng.choice([[], [1], mixtral.encode("A prompt: 😀")])
        deltas, _ = stream(mixtral, ids, SamplingParams(), prompt, rng)
        before = mixtral.decode(prompt)
        assert before + "".join(deltas) == mixtral.decode(prompt + ids)
        assert "\ufffd" not in "".join(deltas)


def test_stream_survives_bytes_that_are_not_utf8(mixtral: Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.randrange(3, 259) if rng.random() < 0.7 else rng.randrange(32000) for _ in range(40)]
        deltas, _ = stream(mixtral, ids, SamplingParams(), rng.choice([[], ids[:5]]), rng)
        text = "".join(deltas)
        for i in ids:  # every token that is text comes through, whatever the bytes around it are
            if i > 258:
                assert mixtral.token_to_str(i).strip() in text
        assert text.count("\ufffd") <= len(ids)


def test_a_broken_byte_does_not_disturb_the_characters_before_it(mixtral: Tokenizer) -> None:
    llama = [3 + byte for byte in "🦙".encode()]
    ids = [*llama, 3 + 0xE6, *mixtral.encode("b", add_special_tokens=False)]
    assert mixtral.decode(ids) == "\ufffd" * 5 + " b"  # byte fallback gives up the whole run; what was sent stays sent
    detokenizer = IncrementalDetokenizer(mixtral, [], SamplingParams())
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == "🦙\ufffd b"


@pytest.mark.parametrize("name", ["smol", "mixtral"])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_continues_a_prompt_and_never_shows_half_a_character(
    name: str, text: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    for cut in range(len(ids)):
        prompt, rest = ids[:cut], ids[cut:]
        before = tokenizer.decode(prompt)
        detokenizer = IncrementalDetokenizer(tokenizer, prompt, SamplingParams())
        deltas = [detokenizer.push([i]) for i in rest]
        if not before.endswith("\ufffd"):  # else the prompt ends inside a character
            assert "\ufffd" not in "".join(deltas)
            assert before + "".join(deltas) + detokenizer.finish() == tokenizer.decode(ids)
            assert tokenizer.decode(ids).strip() == text.strip()


@pytest.mark.parametrize("name", ["smol", "mixtral"])
def test_half_a_character_is_flushed_at_the_end(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("x🦙", add_special_tokens=False)
    assert len(ids) > 2
    detokenizer = IncrementalDetokenizer(tokenizer, [], SamplingParams())
    assert [detokenizer.push([i]) for i in ids[:-1]] == ["x"] + [""] * (len(ids) - 2)
    assert set(detokenizer.finish()) == {"\ufffd"}
    assert detokenizer.finish() == ""


def test_stop_string_over_several_tokens(smol: Tokenizer) -> None:
    ids = [i for c in "abcSTOPdef" for i in smol.encode(c)]
    detokenizer = IncrementalDetokenizer(smol, [], SamplingParams(stop=("STOP", "zzz")))
    assert [detokenizer.push([i]) for i in ids] == ["a", "b", "c", *[""] * 7]
    assert (detokenizer.stopped_on, detokenizer.finish()) == ("STOP", "")
    detokenizer = IncrementalDetokenizer(smol, [], SamplingParams(stop=("STOP",), include_stop_str_in_output=True))
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == "abcSTOP"


def test_held_back_text_comes_when_the_stop_string_does_not(smol: Tokenizer) -> None:
    ids = [i for c in "aSTSTOabST" for i in smol.encode(c)]
    detokenizer = IncrementalDetokenizer(smol, [], SamplingParams(stop=("STOP",)))
    assert [detokenizer.push([i]) for i in ids] == ["a", "", "", "ST", "", "", "STOa", "b", "", ""]
    assert (detokenizer.finish(), detokenizer.stopped_on) == ("ST", None)


@pytest.mark.parametrize("include", [True, False])
def test_stop_strings_against_a_character_by_character_search(smol: Tokenizer, include: bool) -> None:
    rng = random.Random(4)
    hits = 0
    for _ in range(400):
        text = "".join(rng.choices("ab中", k=rng.randrange(1, 25)))
        stops = tuple("".join(rng.choices("ab中", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4)))
        expected, met = text, None
        for end in range(1, len(text) + 1):
            met = max((s for s in stops if text[:end].endswith(s)), key=len, default=None)
            if met is not None:
                expected = text[:end] if include else text[: end - len(met)]
                break
        params = SamplingParams(stop=stops, include_stop_str_in_output=include)
        one_by_one = [i for c in text for i in smol.encode(c)]
        for ids in (smol.encode(text), one_by_one):
            deltas, detokenizer = stream(smol, ids, params, [], rng)
            assert ("".join(deltas), detokenizer.stopped_on) == (expected, met)
        hits += met is not None
    assert 100 < hits < 400


def test_stop_strings_wait_for_min_tokens(smol: Tokenizer) -> None:
    ids = [i for c in "aXbXc" for i in smol.encode(c)]
    detokenizer = IncrementalDetokenizer(smol, [], SamplingParams(stop=("X",), min_tokens=3))
    assert detokenizer.push(ids) == "aXb"
    assert detokenizer.stopped_on == "X"


def test_long_runs_without_text_do_not_grow_the_window(smol: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(smol, smol.encode("Hi"), SamplingParams())
    eos = next(iter(smol.eos_token_ids))
    broken = smol.encode("🦙")[0]  # the beginning of a character, over and over
    assert detokenizer.push([eos] * 1000) == ""
    text = detokenizer.push([broken] * 1000) + detokenizer.push(smol.encode(" ok")) + detokenizer.finish()
    assert text.endswith(" ok")
    assert len(detokenizer._ids) < 100
