"""TGI's `grammar` over a trunk in this process: what is generated matches it."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient

pytest.importorskip("moe_ray.engine.grammar", reason="this engine has no grammars")

SCHEMA: dict[str, Any] = {
    "properties": {"open": {"type": "boolean"}, "level": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["open", "level"],
}


def generate(url: str, grammar: Any, **parameters: Any) -> dict[str, Any]:
    body = {
        "inputs": "A valve:",
        "parameters": {"max_new_tokens": 60, "grammar": grammar, "details": True, **parameters},
    }
    response = httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json", "value": json.dumps(SCHEMA)},
        {"type": "json_schema", "value": {"name": "valve", "schema": SCHEMA}},
    ],
    ids=["json", "json_object", "text", "json_schema"],
)
def test_a_schema_makes_an_object(text_url: str, grammar: dict[str, Any]) -> None:
    whole = generate(text_url, grammar, do_sample=True, seed=3)
    valve = json.loads(whole["generated_text"])
    assert set(valve) == {"open", "level"}
    assert (type(valve["open"]), type(valve["level"])) == (bool, int)
    assert whole["details"]["finish_reason"] == "eos_token"


def test_a_regular_expression_is_matched(text_url: str) -> None:
    whole = generate(text_url, {"type": "regex", "value": "[0-9]{3}-[a-c]+x"}, do_sample=True, seed=1)
    assert re.fullmatch("[0-9]{3}-[a-c]+x", whole["generated_text"])


def test_the_hubs_client_asks_for_a_grammar(text_url: str) -> None:
    hub = InferenceClient(base_url=text_url, token="none", timeout=60)
    grammar = {"type": "regex", "value": "(yes|no)"}
    text = hub.text_generation("Is it?", max_new_tokens=20, grammar=grammar, return_full_text=False)  # type: ignore[arg-type]
    assert text in ("yes", "no")
    assert "".join(hub.text_generation("Is it?", max_new_tokens=20, grammar=grammar, stream=True)).startswith(text)  # type: ignore[arg-type]


def test_the_hubs_client_chats_in_a_form(text_url: str) -> None:
    hub = InferenceClient(base_url=text_url, token="none", timeout=60)
    form: Any = {"type": "json_object", "value": SCHEMA}
    said = hub.chat_completion([{"role": "user", "content": "Open it"}], response_format=form, max_tokens=60, seed=2)
    assert set(json.loads(said.choices[0].message.content or "")) == {"open", "level"}
    form = {"type": "regex", "value": "(yes|no)"}
    said = hub.chat_completion([{"role": "user", "content": "Is it?"}], response_format=form, max_tokens=60)
    assert said.choices[0].message.content in ("yes", "no")


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "regex", "value": "("},
        {"type": "json", "value": {"properties": {"a": {"type": "no such type"}}}},
    ],
    ids=["regex", "schema"],
)
def test_a_grammar_that_is_none_is_refused(text_url: str, grammar: dict[str, Any]) -> None:
    body = {"inputs": "A valve:", "parameters": {"grammar": grammar}}
    refused = httpx.post(f"{text_url}/generate", json=body, timeout=60, trust_env=False)
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation"), refused.text
