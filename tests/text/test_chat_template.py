"""Chat templates: the checkpoint's own, Mistral's formats where there is none, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizer_forms import sentencepiece_model

from moe_ray.errors import InvalidRequest
from moe_ray.text.tokenizer import Tokenizer

# What Mixtral-8x7B-Instruct-v0.1 shipped until mid 2024: it raises on a system role.
STRICT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


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


@pytest.mark.parametrize("template", [None, STRICT_TEMPLATE], ids=["built-in", "checkpoint's"])
@pytest.mark.parametrize("system", [[""], ["", ""]])
def test_an_empty_system_message_is_as_if_it_were_not_there(
    template: str | None, system: list[str], mixtral_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(mixtral_dir / "tokenizer.model", tmp_path)
    if template is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer(tmp_path)
    user = {"role": "user", "content": "Hi"}
    empty = [{"role": "system", "content": text} for text in system]
    brief = {"role": "system", "content": "Be brief."}
    assert tokenizer.render_chat([*empty, user]) == tokenizer.render_chat([user])
    assert tokenizer.render_chat([*empty, brief, user]) == tokenizer.render_chat([brief, user])
    with pytest.raises(InvalidRequest):
        tokenizer.render_chat(empty)


def test_empty_texts_go_to_a_template_that_takes_them(smol: Tokenizer) -> None:
    chat = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
    turns = "".join(f"<|im_start|>{role}\n<|im_end|>\n" for role in ("system", "user", "assistant"))
    assert smol.render_chat(chat) == f"{turns}<|im_start|>assistant\n"
    assert smol.render_chat([*chat[:2], {"role": "assistant"}]) == smol.render_chat(chat)
    assert smol.render_chat([*chat[:2], {"role": "assistant", "content": None}]) == smol.render_chat(chat)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user"}, "`messages[1].content` is required"),
        ({"role": "user", "content": None}, "`messages[1].content` is required"),
        ({"role": "system", "content": None}, "`messages[1].content` is required"),
        ({"role": "user", "content": []}, "`messages[1].content` is a list without parts"),
        ({"role": "user", "content": 5}, "`messages[1].content` must be a string or a list of text parts, got int"),
        ({"role": "user", "content": {"text": "a"}}, "`messages[1].content` must be a string"),
        ({"role": "user", "content": [5]}, "`messages[1].content[0]` must be a text part, got int"),
        ({"role": "user", "content": ["a", {"type": "text"}]}, "`messages[1].content[1].text` must be a string"),
        ({"role": "user", "content": [{"text": "a"}]}, "`messages[1].content[0]` is of type None"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "`messages[1].content[0]` is of type 'image_url'"),
        ({"content": "a"}, "`messages[1].role` must be a string, got null"),
        ("a", "`messages[1]` must be an object"),
    ],
)
def test_what_is_no_message_is_refused_by_name(smol: Tokenizer, message: object, named: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        smol.render_chat([{"role": "user", "content": "Hi"}, message])  # type: ignore[list-item]
    assert named in str(error.value)
    assert error.value.param == "messages"


def test_one_message_is_no_list_of_messages(smol: Tokenizer) -> None:
    for messages in ({"role": "user", "content": "a"}, "a"):
        with pytest.raises(InvalidRequest, match="`messages` must be a list"):
            smol.render_chat(messages)  # type: ignore[arg-type]


def test_an_answer_is_continued_as_it_stands(tmp_path: Path) -> None:
    """Mistral's formats drop spaces behind an answer, but the text that a client gives to go on from is its own."""
    tokenizer = Tokenizer(sentencepiece_model(tmp_path, "v3"))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x \n "}]
    assert tokenizer.render_chat(chat, False, continue_final_message=True) == "<s>[INST]Hi[/INST]x \n "


@pytest.mark.parametrize("version", ["v3", "v7"])
def test_mistral_formats_refuse_other_roles_and_orders(version: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_model(tmp_path, version))
    user, other = {"role": "user", "content": "Hi"}, {"role": "tool", "content": "x"}
    for chat in (
        [user, user],
        [user, other],
        [{"role": "assistant", "content": "x"}],
        [{"role": "system", "content": "x"}],
    ):
        with pytest.raises(InvalidRequest, match=r"must alternate|Only user and assistant|must be a user message"):
            tokenizer.render_chat(chat)
