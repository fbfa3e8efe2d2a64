"""The sampling parameters: taken as vLLM takes them, and refused by name."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from moe_ray.core import Request, SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.sampling import _RULES, Grammar, range_of, rule_of
from moe_ray.trunk.wire import pack_request, unpack_request

TEXT_ONLY = {"stop", "bad_words", "include_stop_str_in_output", "skip_special_tokens"}


def test_every_field_has_a_rule_and_its_place_on_the_wire() -> None:
    names = {each.name for each in fields(SamplingParams)}
    assert set(_RULES) == names
    assert {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} == names - TEXT_ONLY


def test_none_is_not_set() -> None:
    names = [each.name for each in fields(SamplingParams)]
    unset = SamplingParams(**dict.fromkeys(names))
    assert unset == SamplingParams(max_tokens=None)
    assert unset.temperature == 1.0
    assert unset.logit_bias == {}


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": []}, {"stop": ()}),
        ({"stop_token_ids": [1, np.int64(2)]}, {"stop_token_ids": (1, 2)}),
        ({"logit_bias": {"5": 1, 6: -100}}, {"logit_bias": {5: 1.0, 6: -100.0}}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": "0.5"}, {"temperature": 0.5}),
        ({"max_tokens": 16.0}, {"max_tokens": 16}),
        ({"max_tokens": 0}, {"max_tokens": 0}),
        ({"top_p": 0}, {"top_p": 0.0}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"top_k": -1}, {"top_k": -1}),
        ({"seed": -(2**63)}, {"seed": -(2**63)}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
        ({"logprobs": 20}, {"logprobs": 20}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
    ],
)
def test_what_is_taken(given: dict[str, Any], taken: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    for name, value in taken.items():
        assert getattr(params, name) == value
        assert type(getattr(params, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "many"),
        ("min_tokens", 17),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", [1.0]),
        ("top_k", -2),
        ("top_k", 2**31),
        ("top_p", -0.01),
        ("top_p", 1.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.01),
        ("frequency_penalty", -2.01),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", [5]),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", "x"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 5),
        ("stop", b"x"),
        ("stop", {"a": 1}),
        ("stop", ["x"] * 17),
        ("stop_token_ids", "12"),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["5"]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1.0]),
        ("logprobs", 21),
        ("logprobs", True),
        ("ignore_eos", "yes"),
        ("return_routed_experts", 2),
        ("grammar", "a|b"),
        ("grammar", {"kind": "regex", "source": "a|b"}),
    ],
)
def test_what_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^`{name}` must be ") as error:
        SamplingParams(**{name: value})
    assert error.value.param == name
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(max_tokens=None, seed=-(2**63), top_k=2**31 - 1, top_p=0, min_p=1),
        SamplingParams(max_tokens=2**31 - 1, min_tokens=2**31 - 1, seed=2**63 - 1, logprobs=0, temperature=2),
        SamplingParams(stop_token_ids=[0, 2**31 - 1], logit_bias={0: -100, 2**31 - 1: 100}, repetition_penalty=1e4),
        SamplingParams(grammar=Grammar("json_object")),
        SamplingParams(grammar=Grammar("regex", "é{2}")),
    ],
)
def test_the_wire_carries_what_is_allowed(params: SamplingParams) -> None:
    there = unpack_request(pack_request(Request("r", (1, 2), params, (3,)))).sampling
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        wanted = getattr(params, field.name)
        assert getattr(there, field.name) == (0 if field.name == "seed" and wanted is None else wanted)


def test_a_grammar_of_no_known_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="json_object, json_schema, regex, ebnf, structural_tag") as error:
        Grammar("lark", "start: x")  # type: ignore[arg-type]
    assert error.value.param == "grammar"
    message = pb.Submit(request_id="r", prompt_token_ids=[1], sampling=pb.SamplingParams(grammar=pb.Grammar(kind="x")))
    with pytest.raises(InvalidRequest, match="`grammar`"):
        unpack_request(message)


def test_the_range_that_is_told_is_the_one_that_is_taken() -> None:
    told = {name: bounds for name in _RULES if (bounds := range_of(name)) is not None}
    assert {"temperature", "top_p", "max_tokens", "seed", "prompt_logprobs"} <= set(told)
    for name, (low, high) in told.items():
        for value in (low, high):
            assert getattr(SamplingParams(**{"max_tokens": None, name: value}), name) in (value, None)
        step = 1 if isinstance(low, int) else 0.001
        for value in (low - step, high + step):
            with pytest.raises(InvalidRequest, match=re.escape(f"`{name}` must be {rule_of(name)}")):
                SamplingParams(**{"max_tokens": None, name: value})
