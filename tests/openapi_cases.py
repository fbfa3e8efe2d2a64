"""Requests that schemathesis makes from an OpenAPI document, and what must hold for the answers to them."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from requests import Session
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.openapi.loaders import from_dict
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS: Final = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
MOST_TOKENS: Final = 3
_LIMITS: Final = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens", "num_predict")
_COUNTS: Final = ("n", "best_of", "min_tokens")
_INNER: Final = {"inputs": ("parameters", "max_new_tokens"), "input": ("", "max_output_tokens")}
"""Field that tells a body's API → the object and the field in it that say how many tokens."""

Change = Callable[[Case], None]


@schemathesis.deserializer("application/x-ndjson")
def _lines(_: object, response: schemathesis.Response) -> list[Any]:
    return [json.loads(line) for line in response.content.decode().split("\n") if line]


def operations(document: dict[str, Any]) -> Iterator[APIOperation]:
    """Every operation of a document."""
    document = copy.deepcopy(document)
    for answer in _answers(document):
        lines = answer.get("content", {}).get("application/x-ndjson")
        if lines is not None:  # schemathesis reads `itemSchema` of server-sent events alone
            lines["schema"] = {"type": "array", "items": lines["itemSchema"]}
    for found in from_dict(document).get_all_operations():
        yield found.ok()


def ask(operation: APIOperation, url: str, mode: GenerationMode, examples: int, change: Change) -> Counter[int]:
    """Ask so many requests of an operation and check the answers; returns their statuses. `change` alters each before.

    Of a request that follows the schema, the same is asked with a required field wrong or left out: it is refused.
    """
    statuses = Counter[int]()
    session = Session()
    session.trust_env = False

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def each(case: Case) -> None:
        change(case)
        bound(case)
        response = case.call(base_url=url, session=session, timeout=60)
        case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] += 1
        if mode.is_positive:
            statuses.update(_refused(case, session, url))

    each()
    session.close()
    return statuses


def examples_of(operation: APIOperation) -> list[dict[str, Any]]:
    """The bodies that the document shows for an operation."""
    content = operation.definition.raw.get("requestBody", {}).get("content", {})
    return [shown["value"] for body in content.values() for shown in body.get("examples", {}).values()]


def mixed(example: dict[str, Any], generated: dict[str, Any], turn: int) -> dict[str, Any]:
    """An example with two of the fields that were generated."""
    names = sorted(generated)
    body = dict(example)
    for name in names[turn % len(names) :][:2] if names else ():
        value, shown = generated[name], example.get(name)
        body[name] = mixed(shown, value, turn) if isinstance(shown, dict) and isinstance(value, dict) else value
    return body


def bound(case: Case) -> None:
    """Keep what a request asks for small."""
    body = case.body if isinstance(case.body, dict) else {}
    instances = body.get("instances")
    for each in [body, *(instances if isinstance(instances, list) else [])]:
        if isinstance(each, dict):
            _limit(each, case.operation.path)
    _shrink(body)


def _limit(body: dict[str, Any], path: str) -> None:
    if path.startswith("/api/"):
        inner, field = "options", "num_predict"
    else:
        inner, field = next((where for name, where in _INNER.items() if name in body), ("", "max_tokens"))
    if not {"messages", "prompt", *_INNER} & body.keys() or "tokenize" in path or path.endswith("count_tokens"):
        return
    if inner and body.get(inner) is None:
        body[inner] = {}
    holder = body[inner] if inner else body
    if isinstance(holder, dict):
        holder.setdefault(field, MOST_TOKENS)


def _shrink(value: Any) -> None:
    if isinstance(value, list):
        for each in value:
            _shrink(each)
    if not isinstance(value, dict):
        return
    for name, each in value.items():
        is_number = isinstance(each, int | float) and not isinstance(each, bool)
        if (is_number and name in (*_LIMITS, *_COUNTS) and each > MOST_TOKENS) or (name in _LIMITS and each is None):
            value[name] = MOST_TOKENS
        _shrink(each)


def _refused(case: Case, session: Session, url: str) -> Iterator[int]:
    """Ask the same without each required field of the body, and with a value that no field takes; yield statuses."""
    schema: Any = next((each.definition.get("schema") for each in case.operation.body), {})
    required = schema.get("required", ()) if isinstance(case.body, dict) else ()
    for name in required:
        without = {key: value for key, value in case.body.items() if key != name}
        for body in (without, {**case.body, name: {"no such thing": [name]}}):
            answer = session.request(case.method, url + case.formatted_path, json=body, timeout=60)
            assert answer.status_code in (400, 422), f"{name}: {answer.status_code} {answer.text}"
            assert name in answer.text, f"{name} is not named: {answer.text}"
            yield answer.status_code


def as_events(media: dict[str, Any], *others: dict[str, Any], last: str = "") -> None:
    """Say of a stream, whose `schema` is that of the JSON in each event, what OpenAPI 3.2 says of it.

    `others`: schemas of further events. `last`: the data of the last one, where it is no JSON.
    """
    told = {"anyOf": [media.pop("schema"), *others]}
    data = [{"type": "string", "contentMediaType": "application/json", "contentSchema": told}]
    media["itemSchema"] = {"type": "object", "properties": {"data": {"anyOf": [{"const": last}, *data]}}}


def _answers(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in document["paths"].values():
        for operation in methods.values():
            yield from operation.get("responses", {}).values()
