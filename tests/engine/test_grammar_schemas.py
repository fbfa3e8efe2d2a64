"""JSON schemas: what a random model writes is valid, and what outputs could not be held to is refused by name."""

from __future__ import annotations

import json
import random
from concurrent.futures import wait
from typing import Any

import jsonschema
import pytest
from constrained import Rig, ask
from random_schemas import random_schema

from moe_ray.engine.grammar.schema_rules import unsupported
from moe_ray.engine.grammar.state import GrammarState
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar


def grammar(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 200), marks=pytest.mark.slow)])
def test_random_models_write_valid_json_for_random_schemas(rig: Rig, seeds: range) -> None:
    """Half of them greedily; blanks are discouraged, so that answers end in time."""
    schemas = [random_schema(random.Random(seed)) for seed in seeds]
    requests = [
        ask(grammar(s), f"r{i}", seed=i, temperature=i % 2, max_tokens=150, logit_bias=rig.blanks)
        for i, s in enumerate(schemas)
    ]
    found, _ = rig.answers(requests)
    ended = 0
    for i, schema in enumerate(schemas):
        answer = found[f"r{i}"]
        assert answer.error is None, (schema, answer.error)
        if answer.finish_reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(answer.text), schema)
    assert ended > 0.9 * len(seeds)


IGNORED_BY_THE_COMPILER: dict[str, tuple[dict[str, Any], Any]] = {  # name → (schema, a value that is not valid)
    "not": ({"type": "integer", "not": {"const": 3}}, 3),
    "if": ({"type": "integer", "if": {"type": "integer", "minimum": 5}, "then": {"const": 9}}, 7),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        {"a": 1},
    ),
    "uniqueItems": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [1, 1]),
    "contains": ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 2}}, [1]),
    "multipleOf of a number": ({"type": "number", "multipleOf": 0.5}, 0.3),
    "multipleOf that is large": ({"type": "integer", "multipleOf": 100000}, 7),
    "beside $ref": ({"$defs": {"i": {"type": "integer"}}, "$ref": "#/$defs/i", "minimum": 5}, 3),
    "allOf": ({"allOf": [{"type": "integer"}, {"type": "integer", "minimum": 5}]}, 3),
    "beside allOf": ({"required": ["b"], "allOf": [{"type": "object", "properties": {"a": {}}}]}, {"a": 1}),
    "beside anyOf": ({"required": ["a"], "anyOf": [{"type": "object", "properties": {"b": {}}}]}, {"b": 1}),
    "type beside anyOf": ({"type": "string", "anyOf": [{"const": 1}, {"const": "a"}]}, 1),
    "type beside enum": ({"type": "string", "enum": ["a", 1]}, 1),
    "minimum beside enum": ({"enum": [1, 5], "minimum": 3}, 1),
    "pattern and minLength": ({"type": "string", "pattern": "^a*$", "minLength": 3}, "a"),
    "format and maxLength": ({"type": "string", "format": "email", "maxLength": 3}, "a@bc.de"),
    "minimum alone": ({"minimum": 3}, 1),
    "required alone": ({"required": ["a"]}, {}),
    "required without its property": ({"type": "object", "properties": {"a": {}}, "required": ["c"]}, {"a": 1}),
    "an anchor": ({"$defs": {"i": {"$anchor": "q", "type": "integer"}}, "$ref": "#q"}, "s"),
    "oneOf that overlaps": ({"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 5}]}, 3),
}


@pytest.mark.parametrize("name", IGNORED_BY_THE_COMPILER)
def test_what_would_be_ignored_is_refused(rig: Rig, name: str) -> None:
    schema, wrong = IGNORED_BY_THE_COMPILER[name]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
    answer = rig.answer(ask(grammar({"type": "object", "properties": {"inner": schema}})))
    assert isinstance(answer.error, InvalidRequest)
    assert answer.error.param == "grammar"
    assert str(answer.error).startswith("`grammar`")
    if name != "oneOf that overlaps":
        assert "at #/properties/inner" in str(answer.error)


INTEGER = {"type": "integer"}
HELD_TO: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {  # name → (schema, valid values, wrong ones)
    "multipleOf": ({"type": "integer", "multipleOf": 3}, [3, 12], [4]),
    "patternProperties": ({"type": "object", "patternProperties": {"^a.*$": INTEGER}}, [{"ab": 1}], [{"ab": "x"}]),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a$"}}, [{}, {"a": 2}], [{"b": 1}]),
    "minProperties": (
        {"type": "object", "minProperties": 2, "additionalProperties": INTEGER},
        [{"a": 1, "b": 2}],
        [{"a": 1}],
    ),
    "one of disjoint": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
    "definitions": ({"definitions": {"i": {"type": "integer"}}, "$ref": "#/definitions/i"}, [1], ["s"]),
    "an object of anything": ({"type": "object"}, [{}, {"a": {"b": [1, None]}}], [[], 1]),
    "anything": ({}, [1, "a", [None]], []),
    "recursion": (
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
        [{"next": {"next": {}}}],
        [{"next": 1}],
    ),
    "as pydantic writes them": (
        {
            "$defs": {"Kind": {"enum": ["a", "b"], "title": "Kind", "type": "string"}},
            "properties": {
                "kind": {"$ref": "#/$defs/Kind", "description": "which"},
                "size": {"anyOf": [{"exclusiveMinimum": 0, "type": "integer"}, {"type": "null"}], "default": None},
                "also": {"allOf": [{"$ref": "#/$defs/Kind"}], "default": "a"},
            },
            "required": ["kind"],
            "title": "Thing",
            "type": "object",
        },
        [{"kind": "a"}, {"kind": "b", "size": None}, {"kind": "a", "size": 3, "also": "b"}],
        [{"kind": "c"}, {"size": 1}, {"kind": "a", "size": 0}, {"kind": "a", "also": "z"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD_TO)
def test_what_is_supported_is_held_to(rig: Rig, name: str) -> None:
    schema, valid, wrong = HELD_TO[name]
    for value in [*valid, *wrong]:
        assert matches(rig, grammar(schema), json.dumps(value)) == (value in valid), value


@pytest.mark.parametrize(
    ("text", "good"),
    [('"a中é"', True), ('"\t"', False), ('"\x00"', False), ('"\\u00e9"', False), ('"abcdef"', False), ("\t", False)],
)
def test_a_string_of_bounded_length_is_json(rig: Rig, text: str, good: bool) -> None:
    assert matches(rig, grammar({"type": "string", "maxLength": 5}), text) == good


def test_blanks_are_bounded(rig: Rig) -> None:
    assert matches(rig, Grammar("json_object"), '{\n        "a": 1}')
    assert not matches(rig, Grammar("json_object"), "{" + " " * 40 + '"a": 1}')


def test_the_rules_leave_no_place_out() -> None:
    bad = {"type": "string", "minLength": 1, "pattern": "a"}
    places = [
        {"properties": {"a": bad}},
        {"$defs": {"a": bad}},
        {"definitions": {"a": bad}},
        {"type": "object", "patternProperties": {"^a": bad}},
        {"anyOf": [{}, bad]},
        {"oneOf": [bad]},
        {"allOf": [bad]},
        {"type": "array", "prefixItems": [bad]},
        {"items": bad},
        {"type": "object", "propertyNames": bad},
        {"additionalProperties": {"additionalProperties": bad}},
    ]
    for schema in places:
        assert "`minLength` beside `pattern`" in str(unsupported(schema)), schema
    assert unsupported({"properties": {"not": {"type": "integer"}}}) is None, "a property, not a keyword"
    assert unsupported({"enum": [{"not": 1, "$ref": "x"}]}) is None, "a value"
    assert unsupported(True) is None


def matches(rig: Rig, source: Grammar, text: str) -> bool:
    """The bytes of `text`, one token each, are a whole output."""
    future = rig.grammars.state(ask(source))
    wait([future])
    state: GrammarState = future.result()
    one = {rig.tokenizer.token_bytes(i): i for i in range(512)}
    return all(not state.ended and state.accept(one[bytes([byte])]) for byte in text.encode()) and state.complete
