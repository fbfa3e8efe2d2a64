"""Answers taken apart into text and calls: the same parts however the text is cut into pieces, and nothing lost."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import get_args

import pytest

from moe_ray.config.gateway import GatewaySection
from moe_ray.text.answers.formats import FORMATS, format_taught_by
from moe_ray.text.answers.parts import Answer, CallArguments, CallBegun, PlainReader, Text

NAMES = frozenset({"weather", "add"})
ONE = '{"name": "weather", "arguments": {"city": "Pa\\"ri}s", "days": [1, {"a": 2}]}}'
ARGUMENTS = '{"city": "Pa\\"ri}s", "days": [1, {"a": 2}]}'
Read = tuple[str, list[tuple[str, str]]]
CASES: dict[str, list[tuple[str, Read]]] = {  # format → (answer, (content, [(name, arguments)]))
    "hermes": [
        (f"<tool_call>\n{ONE}\n</tool_call>", ("", [("weather", ARGUMENTS)])),
        (
            f'Let me look.\n\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{{"name": "add"}}</tool_call>\n',
            ("Let me look.", [("weather", ARGUMENTS), ("add", "{}")]),
        ),
        ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', ("", [("add", '{"a": 1}')])),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("add", '{"a": 1}')])),
        ('<tool_call>{"name": "add", "arguments": null, "x": [1]}</tool_call> ok', (" ok", [("add", "{}")])),
        (
            '<tool_call>[{"name": "add"}, {"name": "weather"}]</tool_call>',
            ("", [("add", "{}"), ("weather", "{}")]),
        ),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', ("", [("add", '{"a": 1')])),  # cut by max_tokens
        ('a<tool_call>{"name": "add", "arguments": {"a": 1}}</tool', ("a", [("add", '{"a": 1}')])),
        ("if a < b: <tool> <tool_call", ("if a < b: <tool> <tool_call", [])),
        ("  two spaces  ", ("  two spaces  ", [])),
        ('<tool_call>{"name": "nobody"}</tool_call>', ('<tool_call>{"name": "nobody"}</tool_call>', [])),
        ("<tool_call> no JSON </tool_call>", ("<tool_call> no JSON </tool_call>", [])),
        ('<tool_call>{"name": "add", "arguments": [1]}', ('<tool_call>{"name": "add", "arguments": [1]}', [])),
        ('<tool_call><tool_call>{"name": "add"}</tool_call>', ("<tool_call>", [("add", "{}")])),
        ('<tool_call>{"name": "add", "arguments": {}} or so', (" or so", [("add", "{}")])),
    ],
    "mistral": [
        (
            f'[TOOL_CALLS] [{ONE[:-1]}, "id": "123456789"}}, {{"name": "add", "arguments": {{}}}}]',
            ("", [("weather", ARGUMENTS), ("add", "{}")]),
        ),
        (f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}", ("", [("weather", ARGUMENTS)])),
        (
            'Yes.[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}[TOOL_CALLS]weather{}',
            ("Yes.", [("add", '{"a": 1}'), ("weather", "{}")]),
        ),
        ('[TOOL_CALLS][{"name": "add"}, ', ("", [("add", "{}")])),
        ("[TOOL_CALLS][]", ("[TOOL_CALLS][]", [])),
        ("[TOOL_CALLS]nobody[ARGS]{}", ("[TOOL_CALLS]nobody[ARGS]{}", [])),
        ("[TOOL_CALLS]what is this?", ("[TOOL_CALLS]what is this?", [])),
        ("[TOOL", ("[TOOL", [])),
    ],
    "llama3_json": [
        ('{"name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
        ('<|python_tag|>{"name": "add", "parameters": {}}', ("", [("add", "{}")])),
        (
            '{"name": "add", "parameters": {}}; {"name": "weather", "parameters": {}}',
            ("", [("add", "{}"), ("weather", "{}")]),
        ),
        ('Well: {"name": "add", "parameters": {}}', ('Well: {"name": "add", "parameters": {}}', [])),
        ('{"a": {"name": "add"}}', ('{"a": {"name": "add"}}', [])),
    ],
    "json": [
        (ONE, ("", [("weather", ARGUMENTS)])),
        (f'Sure:\n```json\n{ONE}\n```\n{{"name": "add"}}', ("Sure:", [("weather", ARGUMENTS), ("add", "{}")])),
        ('[{"name": "add"},\n {"name": "weather"}]', ("", [("add", "{}"), ("weather", "{}")])),
        ('{"name": "add"}\n{"name": "weather"}\nDone.', ("\nDone.", [("add", "{}"), ("weather", "{}")])),
        ('{"name": "Bob", "age": 3}', ('{"name": "Bob", "age": 3}', [])),
        ("[1, 2] and {}", ("[1, 2] and {}", [])),
        ('```python\nx = {"name": "add"}\n```', ('```python\nx = {"name": "add"}\n```', [])),
        ('in a line {"name": "add"}', ('in a line {"name": "add"}', [])),
        ('{"name": "ad', ('{"name": "ad', [])),
    ],
}
FLAT = [(name, answer, read) for name, cases in CASES.items() for answer, read in cases]


def read(name: str, pieces: list[str], parallel: bool = True, exact: bool = False) -> Read:
    """What the pieces of an answer come to; that parts come in order is checked, too."""
    reader, answer = FORMATS[name].reader(NAMES, {}, parallel, exact), Answer()
    begun = 0
    for parts in [*(reader.push(piece) for piece in pieces), reader.finish()]:
        for part in parts:
            if isinstance(part, CallBegun):
                assert part.index == begun
                begun += 1
            assert not isinstance(part, CallArguments) or part.index == begun - 1
            assert part != Text("")
        answer.take(parts)
    assert len({call.call_id for call in answer.calls}) == begun
    return answer.content, [(call.name, call.arguments) for call in answer.calls]


@pytest.mark.parametrize(("name", "answer", "expected"), FLAT)
def test_every_cut_gives_the_same_parts(name: str, answer: str, expected: Read) -> None:
    assert read(name, [answer]) == expected
    assert read(name, list(answer)) == expected
    for at in range(len(answer)):
        assert read(name, [answer[:at], answer[at:]]) == expected
    rng = random.Random(4)
    for _ in range(60):
        cuts = [0, *sorted(rng.randrange(len(answer) + 1) for _ in range(5)), len(answer)]
        assert read(name, [answer[a:b] for a, b in itertools.pairwise(cuts)]) == expected


@pytest.mark.parametrize(("name", "answer", "expected"), FLAT)
def test_every_prefix_keeps_what_a_longer_one_tells(name: str, answer: str, expected: Read) -> None:
    """What was told is never taken back, and an answer that is cut anywhere loses nothing that is no syntax."""
    for at in range(len(answer)):
        content, calls = read(name, [answer[:at]])
        names = [call for call, _ in calls]
        assert names == [call for call, _ in expected[1]][: len(names)]
        if not names:
            assert content == answer[:at]
        assert all(full.startswith(part) for (_, part), (_, full) in zip(calls, expected[1], strict=False))


def test_text_is_told_at_once_and_arguments_as_they_come() -> None:
    reader = FORMATS["hermes"].reader(NAMES, {})
    assert reader.push("Hello, ") == [Text("Hello,")]
    assert reader.push("you <") == [Text(" you")]
    assert reader.push("b> <tool_") == [Text(" <b>")]
    assert reader.push('call>{"name": "ad') == []
    assert reader.push('d", "arguments": ') == []
    begun, arguments = reader.push('{"a"')
    assert isinstance(begun, CallBegun)
    assert (begun.name, arguments) == ("add", CallArguments(0, '{"a"'))
    assert reader.push(": 1") == [CallArguments(0, ": 1")]
    assert reader.push("}}</tool_call>") == [CallArguments(0, "}")]
    assert reader.finish() == []


def test_a_long_json_answer_is_not_held_back() -> None:
    for name in ("json", "llama3_json"):
        reader = FORMATS[name].reader(NAMES, {})
        assert reader.push('{"users": [') == [Text('{"users": [')]
        assert reader.push("1, 2") == [Text("1, 2")]


def test_one_call_at_most_where_calls_are_not_parallel() -> None:
    two = '<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "weather"}</tool_call>'
    content, calls = read("hermes", list(two), parallel=False)
    assert calls == [("add", "{}")]
    assert content == '<tool_call>{"name": "weather"}</tool_call>'
    content, calls = read("mistral", ['[TOOL_CALLS][{"name": "add"}, {"name": "weather"}]'], parallel=False)
    assert (content, calls) == (', {"name": "weather"}]', [("add", "{}")])


def test_strict_calls_without_a_marker_are_read_exactly() -> None:
    assert read("json", list(f"Well, {ONE}"), exact=True) == ("Well,", [("weather", ARGUMENTS)])
    other = ONE.replace('{"name"', '{ "name"')
    assert read("json", list(other), exact=True) == (other, [])
    assert read("hermes", [f"<tool_call>{ONE}</tool_call>"], exact=True) == ("", [("weather", ARGUMENTS)])


def test_ids_and_special_tokens() -> None:
    def call_id(name: str) -> str:
        written = FORMATS[name].written("add", "{}")
        answer = Answer()
        answer.take(FORMATS[name].reader(NAMES, {}).push(written))
        (call,) = answer.calls
        assert json.loads(call.arguments) == {}
        return call.call_id

    assert re.fullmatch(r"[a-zA-Z0-9]{9}", call_id("mistral"))
    for name in ("hermes", "llama3_json", "json"):
        assert re.fullmatch(r"call_[0-9a-f]{24}", call_id(name))
    tokens = {"[TOOL_CALLS]": 5, "[ARGS]": 32, "<s>": 1, "</tool_call>": 9}
    assert FORMATS["mistral"].reader(NAMES, tokens).shown_ids == {5, 32}
    assert FORMATS["hermes"].reader(NAMES, tokens).shown_ids == {9}
    assert PlainReader().shown_ids == frozenset()


def test_the_configuration_names_every_format() -> None:
    named = get_args(GatewaySection.model_fields["tool_call_parser"].annotation)
    assert set(named) == {"auto", *FORMATS}


def test_templates_that_teach_a_format() -> None:
    assert format_taught_by("{% for t in tools %}<tool_call>{% endfor %}") == "hermes"
    assert format_taught_by("[AVAILABLE_TOOLS]{{ tools }} [TOOL_CALLS]") == "mistral"
    assert format_taught_by('Environment: ipython {{ tools }} {"name": ..., "parameters": ...}') == "llama3_json"
    assert format_taught_by("{{ tools }}<tool_call><function=name>") is None
    assert format_taught_by("{{ tools }}") is None
