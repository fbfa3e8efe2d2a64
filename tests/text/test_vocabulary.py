"""The vocabulary of each form of tokenizer, as an engine holds outputs to a grammar with it: bytes are never lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizer_forms import mixtral_config, old_tokenizer_json, sentencepiece_model, tekken

from moe_ray.core import SamplingParams
from moe_ray.engine.grammar.source import compile_source, grammar_compiler, tokenizer_info
from moe_ray.engine.grammar.state import CompiledSource, GrammarState
from moe_ray.sampling import Grammar
from moe_ray.text.detokenizer import IncrementalDetokenizer
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.text.vocabulary import token_bytes, token_bytes_of

SCHEMA = {
    "type": "object",
    "properties": {"größe": {"enum": ["naïve 日本語", "😀👩‍👩‍👧"]}, "name": {"type": "string"}},
    "required": ["größe", "name"],
}
TEXT = '{"größe": "😀👩‍👩‍👧", "name": "é中ไทย 😀"}'


def padded(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """With a model of more ids than the tokenizer has."""

    def directory(path: Path) -> Path:
        made = make(path)
        mixtral_config(made, vocab_size=len(Tokenizer(made)._hf) + 37)
        return made

    return directory


FORMS = {
    "sentencepiece": padded(sentencepiece_model),
    "tokenizer.json of Mixtral": padded(old_tokenizer_json),
    "tekken": padded(lambda path: tekken(path, size=6000)),
}


@pytest.fixture(scope="module", params=["byte-level", *FORMS])
def directory(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = FORMS.get(request.param)
    return demo_model if make is None else make(tmp_path_factory.mktemp("form"))


def masked(state: GrammarState, size: int) -> set[int]:
    """The tokens of a vocabulary that may come next."""
    bits = np.zeros((1, size // 32 + 1), np.uint32)
    state.fill(bits, ())
    assert state.failure is None
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:size]).tolist())


def test_an_answer_with_characters_of_several_bytes(directory: Path) -> None:
    """In the longest tokens and byte by byte: all of them are allowed, and the text comes out whole."""
    tokenizer = Tokenizer(directory)
    vocabulary = token_bytes_of(directory)
    size = tokenizer.vocab_size
    assert len(vocabulary) == size
    compiler = grammar_compiler(tokenizer_info(vocabulary, size, tokenizer.eos_token_ids))
    compiled = CompiledSource(compile_source(compiler, Grammar("json_schema", json.dumps(SCHEMA))), size, 1)
    one = {vocabulary[i]: i for i in reversed(range(size))}
    for tokens in (longest(one, TEXT.encode()), [one[bytes([byte])] for byte in TEXT.encode()]):
        assert b"".join(vocabulary[token] or b"" for token in tokens) == TEXT.encode()
        state = GrammarState(compiled, sorted(tokenizer.eos_token_ids), ())
        shown = IncrementalDetokenizer(tokenizer, tokenizer.encode("Answer:\n"), SamplingParams())
        text = ""
        for token in tokens:
            allowed = masked(state, size)
            assert token in allowed, (text, vocabulary[token])
            assert not allowed & tokenizer.special_ids
            assert max(allowed) < len(tokenizer._hf)
            assert state.accept(token)
            text += shown.push([token])
        assert state.ended
        assert text + shown.finish() == TEXT


def longest(one: dict[bytes | None, int], text: bytes) -> list[int]:
    """Tokens of `text`, each the longest that fits."""
    tokens = []
    while text:
        size = next(n for n in range(len(text), 0, -1) if text[:n] in one)
        tokens.append(one[text[:size]])
        text = text[size:]
    return tokens


def test_special_tokens_are_no_text(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    vocabulary = token_bytes(tokenizer)
    assert {i for i, text in enumerate(vocabulary) if text is None} == {
        i for i in tokenizer.special_ids if i < tokenizer.vocab_size
    }
    compiler = grammar_compiler(tokenizer_info(vocabulary, tokenizer.vocab_size, tokenizer.eos_token_ids))
    special = min(tokenizer.special_ids - tokenizer.eos_token_ids)

    def first(grammar: Grammar) -> set[int]:
        compiled = CompiledSource(compile_source(compiler, grammar), tokenizer.vocab_size, 1)
        return masked(GrammarState(compiled, (), ()), tokenizer.vocab_size)

    assert not first(Grammar("regex", "(.|\\n)*")) & tokenizer.special_ids
    tag = {"type": "structural_tag", "format": {"type": "token", "token": special}}
    assert first(Grammar("structural_tag", json.dumps(tag))) == {special}
