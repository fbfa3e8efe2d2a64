"""Mixtral's own text: long conversations through its real vocabulary have the ids of mistral_common, and stream."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizer_forms import TEXTS, new_tokenizer_json, old_tokenizer_json, sentencepiece_model

from moe_ray.core import SamplingParams
from moe_ray.text.detokenizer import IncrementalDetokenizer
from moe_ray.text.tokenizer import Tokenizer

Turn = tuple[str, str]
Form = tuple[Tokenizer, MistralTokenizer, int]
KINDS: dict[str, Any] = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}
NUM_TURNS = 31
# As checkpoints of Mixtral-8x7B-Instruct carry it. The first, of 2023, knows no system text and leaves spaces to its
# tokenizer.json, which puts one before every text; the second goes with one that does so at the start only. The first
# lacks the space before an answer, so only its first turn is mistral_common's.
OF_2023 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
OF_2024 = (
    "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{{ bos_token }}{% for m in turns %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def with_template(write: Callable[[Path], Path], template: str) -> Callable[[Path], Path]:
    def form(directory: Path) -> Path:
        write(directory)
        config = directory / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
        return directory

    return form


FORMS: dict[str, tuple[Callable[[Path], Path], Callable[[], MistralTokenizer], int]] = {
    "tokenizer.model of 8x7B": (sentencepiece_model, MistralTokenizer.v1, NUM_TURNS),
    "8x7B of 2023": (with_template(old_tokenizer_json, OF_2023), MistralTokenizer.v1, 1),
    "8x7B of 2024": (with_template(new_tokenizer_json, OF_2024), MistralTokenizer.v1, NUM_TURNS),
    "tokenizer.model of 8x22B": (lambda to: sentencepiece_model(to, "v3"), MistralTokenizer.v3, NUM_TURNS),
}


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Form:
    """Ours of a form of Mixtral's files, mistral_common's, and the turns for which they must be the same."""
    write, theirs, num_turns = FORMS[request.param]
    return Tokenizer(write(tmp_path_factory.mktemp("mixtral"))), theirs(), num_turns


def conversation(seed: int, num_turns: int = NUM_TURNS) -> list[Turn]:
    """A long one, with a system text, about everything that is hard to spell."""
    rng = random.Random(seed)
    sentences = [text.strip() for text in TEXTS]

    def said() -> str:
        return rng.choice((" ", "\n", "\n\n", "  ")).join(rng.choices(sentences, k=rng.randint(1, 5)))

    turns = [("user" if i % 2 == 0 else "assistant", said()) for i in range(num_turns)]
    return [("system", said()), *turns]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_long_conversation_has_the_ids_of_mistral_common(form: Form, seed: int) -> None:
    ours, theirs, num_turns = form
    turns = conversation(seed, num_turns)
    request: Any = ChatCompletionRequest(messages=[KINDS[role](content=text) for role, text in turns])
    expected = theirs.encode_chat_completion(request).tokens
    assert len(expected) > 30 * num_turns
    assert ours.apply_chat_template([{"role": role, "content": text} for role, text in turns]) == expected


def test_an_answer_streams_as_mistral_common_spells_it(form: Form) -> None:
    """The tokens of each answer of a conversation, one by one behind the prompt that they answer."""
    ours, theirs, _ = form
    turns = conversation(4)
    raw = theirs.instruct_tokenizer.tokenizer
    for number in range(1, len(turns), 2):
        prompt = ours.apply_chat_template([{"role": role, "content": text} for role, text in turns[: number + 1]])
        answer = turns[(number + 1) % len(turns)][1]
        ids = raw.encode(answer, bos=False, eos=True)
        detokenizer = IncrementalDetokenizer(ours, prompt, SamplingParams())
        pieces = [detokenizer.push([token_id]) for token_id in ids]
        assert ("".join(pieces) + detokenizer.finish()).strip(" ") == answer.strip(" ")
        assert not any("\ufffd" in piece for piece in pieces)
        assert sum(map(bool, pieces)) > len(answer) // 12, "it streams, rather than coming at the end"
