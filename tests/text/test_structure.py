"""What answers with calls must look like, compiled by xgrammar: whatever is generated so is read as valid calls."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar

from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar
from moe_ray.text.answers.formats import FORMATS
from moe_ray.text.answers.parts import Answer
from moe_ray.text.answers.structure import ANY_OBJECT, CallShape, Structure, either, grammar_of, structure_of

SPECIAL = {"[TOOL_CALLS]": 0, "[ARGS]": 1, "[CALL_ID]": 2}
END = 3
CHARACTERS = string.printable[:95] + "\n"
VOCABULARY = ["\xff0", "\xff1", "\xff2", "\xff3", *CHARACTERS]
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "tomorrow": {"type": "boolean"}},
        "required": ["city"],
    },
    "now": {"type": "object", "properties": {}},
}
TOKENS = {
    "hermes": {},
    "mistral": {"[TOOL_CALLS]": 0},
    "mistral, named": SPECIAL,
    "llama3_json": {},
    "json": {},
}


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    """A vocabulary of single characters, and special tokens that no text matches."""
    info = xgrammar.TokenizerInfo(
        [text.encode("latin-1") for text in VOCABULARY], xgrammar.VocabType.RAW, stop_token_ids=[END]
    )
    return xgrammar.GrammarCompiler(info, max_threads=1)


class Writer:
    """A model without any knowledge: of what the grammar allows, it writes anything."""

    def __init__(self, compiler: xgrammar.GrammarCompiler, structure: Structure, seed: int) -> None:
        self.text = ""
        self._matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(grammar_of(structure).source))
        self._rng = random.Random(seed)
        self._names = {i: name for name, i in SPECIAL.items()}

    def allowed(self) -> list[int]:
        bits = xgrammar.allocate_token_bitmask(1, len(VOCABULARY))
        self._matcher.fill_next_token_bitmask(bits)
        return np.flatnonzero(np.unpackbits(bits.numpy().view(np.uint8), bitorder="little")[: len(VOCABULARY)]).tolist()

    def take(self, token: int) -> None:
        assert self._matcher.accept_token(token), (self.text, token)
        if token != END:
            self.text += self._names.get(token) or VOCABULARY[token]

    def write(self, tokens: dict[str, int], *pieces: str) -> None:
        for piece in pieces:
            for token in [tokens[piece]] if piece in tokens else [VOCABULARY.index(c) for c in piece]:
                self.take(token)

    def steps(self, limit: int = 2000) -> Iterator[list[int]]:
        """Write on, telling what was allowed before each token, to the end."""
        for _ in range(limit):
            allowed = self.allowed()
            if not allowed:
                return
            yield allowed
            token = END if END in allowed and self._rng.random() < 0.5 else self._rng.choice(allowed)
            self.take(token)
            if token == END:
                return
        raise AssertionError(f"no end: {self.text[-200:]}")


def answer_of(name: str, tokens: dict[str, int], text: str, exact: bool = False) -> Answer:
    reader, answer = FORMATS[name.split(",")[0]].reader(frozenset(SCHEMAS), tokens, exact=exact), Answer()
    answer.take(reader.push(text) + reader.finish())
    return answer


def check(answer: Answer) -> None:
    for call in answer.calls:
        jsonschema.validate(json.loads(call.arguments), {**SCHEMAS[call.name], "additionalProperties": False})


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", TOKENS)
def test_what_must_be_calls_is_calls(compiler: xgrammar.GrammarCompiler, name: str, parallel: bool) -> None:
    tokens = TOKENS[name]
    structure = FORMATS[name.split(",")[0]].calls(CallShape(SCHEMAS, parallel, tokens))
    counts = set()
    for seed in range(8):
        writer = Writer(compiler, structure, seed)
        for _ in writer.steps():
            pass
        answer = answer_of(name, tokens, writer.text)
        assert answer.content == "", writer.text
        assert answer.calls
        check(answer)
        counts.add(len(answer.calls))
    assert counts == {1} if not parallel else len(counts) > 1


TRIGGERS = {
    "hermes": ["<tool_call>"],
    "mistral": ["[TOOL_CALLS]"],
    "mistral, named": ["[TOOL_CALLS]"],
    "llama3_json": ['{"name": "'],
    "json": ['{"name": "'],
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_call_that_was_begun_is_a_valid_one(compiler: xgrammar.GrammarCompiler, name: str) -> None:
    tokens = TOKENS[name]
    shape = CallShape(SCHEMAS, True, tokens)
    for seed in range(5):
        writer = Writer(compiler, FORMATS[name.split(",")[0]].text_with_calls(shape), seed)
        assert END in writer.allowed()
        writer.write({}, "Let me <look> up [it], {ok}: ")
        assert END in writer.allowed()
        writer.write(tokens, *TRIGGERS[name])
        assert END not in writer.allowed()
        for allowed in writer.steps():
            if END in allowed:
                break
        answer = answer_of(name, tokens, writer.text, exact=True)
        assert answer.content == "Let me <look> up [it], {ok}:"
        assert len(answer.calls) >= 1
        check(answer)


def test_any_object_is_any_object(compiler: xgrammar.GrammarCompiler) -> None:
    structure = FORMATS["hermes"].text_with_calls(CallShape({"f": ANY_OBJECT}, True, {}))
    writer = Writer(compiler, structure, 0)
    call = '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}"}], "c": null}}\n</tool_call>'
    writer.write({}, call, " And: ", call)
    assert END in writer.allowed()


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        (Grammar("json_object"), '{"a": 1}'),
        (Grammar("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}'), '{"a": 1}'),
        (Grammar("regex", "yes|no"), "yes"),
        (Grammar("ebnf", 'root ::= "yes" | "no"'), "no"),
        (
            Grammar("structural_tag", '{"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}'),
            "x",
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Grammar) else "",
)
def test_an_answer_is_calls_or_what_the_format_says(
    compiler: xgrammar.GrammarCompiler, grammar: Grammar, fits: str
) -> None:
    for name in ("json", "hermes"):
        calls = FORMATS[name].calls(CallShape(SCHEMAS, True, {}))
        structure = either([structure_of(grammar), calls])
        for text in (fits, FORMATS[name].written("now", "{}")):
            writer = Writer(compiler, structure, 0)
            writer.write({}, text)
            assert END in writer.allowed()


def test_a_structural_tag_of_the_old_form_does_not_go_with_tools() -> None:
    old = '{"structures": [], "triggers": []}'
    with pytest.raises(InvalidRequest, match="format"):
        structure_of(Grammar("structural_tag", old))
