"""The API against its own OpenAPI document and TGI's: no server error, no answer that is not declared."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from house_in_process import HouseInProcess
from in_process import Trunk, served_beside
from openapi_cases import CHECKS, Change, as_events, ask, bound, examples_of, mixed, operations
from schemathesis import Case, GenerationMode

from moe_ray.api.examples import EXAMPLES
from moe_ray.api.examples import examples_of as shown_for
from moe_ray.api.responses.memory import ResponseMemory

SHARED = Path(os.environ.get("MOE_RAY_SHARED") or Path(__file__).parents[3] / "shared")
OPENAI = {400: "errors of /v1 are OpenAI's", 404: "so are those of a model that is not served"}
UNSAID = {  # path → statuses that TGI's document does not name, and why there are some
    "/chat_tokenize": {422: "TGI's server answers so, too"},
    "/tokenize": {**OPENAI, 422: "TGI's server answers so, too"},
    "/invocations": OPENAI,
    "/v1/chat/completions": OPENAI,
    "/v1/completions": OPENAI,
}
STORED = {"input": "x", "max_output_tokens": 1, "background": True, "stream": True}


@pytest.fixture(scope="module")
def url(chat_trunk: Trunk, chat_model: Path) -> Iterator[str]:
    house, kept = HouseInProcess(chat_model, chat_trunk), ResponseMemory(10**7, 100)
    with served_beside(chat_model, [chat_trunk.info], house=house, responses=kept) as found:
        yield found


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/openapi.json", timeout=60, trust_env=False).json()


def answerable(url: str) -> Change:
    """What makes requests that can be answered: of the model and the responses that are there.

    A body that is all random has a field that does not fit the others, nearly always. So the next one is an example,
    and the two behind it are examples with fields of the random ones.
    """
    turns = itertools.count()

    def change(case: Case) -> None:
        turn, shown = next(turns), examples_of(case.operation)
        if shown and turn % 4 and isinstance(case.body, dict):
            declared = {name: value for name, value in case.body.items() if name.isidentifier() and name != "model"}
            case.body = mixed(shown[turn % len(shown)], declared if turn % 4 > 1 else {}, turn)
        elif isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "random"
        if "response_id" in case.path_parameters:
            events = httpx.post(f"{url}/v1/responses", json=STORED, timeout=60, trust_env=False).text
            case.path_parameters["response_id"] = events.partition('"id":"')[2].partition('"')[0]
        if "model" in case.path_parameters and turn:
            case.path_parameters["model"] = "random"

    return change


def test_the_document_shows_requests_that_are_answered(url: str, document: dict[str, Any]) -> None:
    for operation in operations(document):
        shown = examples_of(operation)
        assert bool(shown) == bool(operation.body), operation.label
        for body in shown:
            case = operation.Case(body=body, media_type="application/json")
            bound(case)
            response = case.call(base_url=url, timeout=60)
            assert response.status_code == 200, f"{operation.label} {body}: {response.text}"
            case.validate_response(response, checks=CHECKS)


def test_every_answer_is_a_declared_one(url: str, document: dict[str, Any]) -> None:
    for operation in operations(document):
        changeable = operation.body or operation.query or operation.path_parameters
        statuses = ask(operation, url, GenerationMode.POSITIVE, 4 if changeable else 1, answerable(url))
        assert statuses[200] or "200" not in operation.responses.status_codes, f"{operation.label}: {statuses}"


def test_every_refusal_is_a_declared_one(url: str, document: dict[str, Any]) -> None:
    for operation in operations(document):
        if operation.body or operation.query:  # any text is a path
            ask(operation, url, GenerationMode.NEGATIVE, 2, lambda case: None)


@pytest.fixture(scope="module")
def tgi() -> dict[str, Any]:
    """TGI's document, its faults mended, with the differences that are meant."""
    file = SHARED / "data" / "tgi-openapi.json"
    if not file.exists():
        pytest.skip(f"TGI's OpenAPI document is not at {file} (MOE_RAY_SHARED names another directory)")
    document: dict[str, Any] = json.loads(file.read_text(), object_hook=_bounds_of_30)
    failed = {"$ref": "#/components/schemas/ErrorResponse"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                events = answer.get("content", {}).get("text/event-stream")
                if events is not None and status == "200":
                    as_events(events, failed, last="[DONE]" if path.startswith(("/v1/", "/inv")) else "")
                elif events is not None:  # a status of its own has an answer of its own
                    answer["content"] = {"application/json": events}
            operation["responses"] |= {
                str(status): {"description": why} for status, why in UNSAID.get(path, {}).items()
            }
            if path in EXAMPLES:
                bodies = shown_for(path, "random")
                if path == "/tokenize":  # the others are of vLLM's route
                    bodies = {"TGI": bodies["TGI"]}
                shown = {name: {"value": body} for name, body in bodies.items()}
                operation["requestBody"]["content"]["application/json"]["examples"] = shown
    # GET /v1/models is a list, of TGI's server as well.
    models = document["paths"]["/v1/models"]["get"]["responses"]["200"]["content"]["application/json"]
    models["schema"] = {"type": "object", "properties": {"data": {"type": "array", "items": models["schema"]}}}
    return document


def _bounds_of_30(schema: dict[str, Any]) -> dict[str, Any]:
    """TGI's document is one of OpenAPI 3.0, where an exclusive bound is true or false, and has numbers there."""
    for name in ("Minimum", "Maximum"):
        bound = schema.get(f"exclusive{name}")
        if isinstance(bound, int | float) and not isinstance(bound, bool):
            schema |= {name.lower(): bound, f"exclusive{name}": True}
    return schema


def test_answers_are_those_that_tgi_declares(url: str, tgi: dict[str, Any]) -> None:
    for operation in operations(tgi):
        statuses = ask(operation, url, GenerationMode.POSITIVE, 4 if operation.body else 1, answerable(url))
        assert statuses[200], f"{operation.label}: {statuses}"
        if operation.body:
            ask(operation, url, GenerationMode.NEGATIVE, 1, lambda case: None)
