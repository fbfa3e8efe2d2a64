"""The id of a request, from its header into its response and its log line; JSON logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import Trunk, served
from on_a_loop import on_a_loop

from moe_ray.api.observation import accepted_id
from moe_ray.api.service import HttpOptions, ServedModel
from moe_ray.telemetry import FIELDS, FORMATTERS, configure, current_request_id

ASK: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
GOOD, BAD = "abc-123_{}/!", "x" * 129


class Kept(logging.Handler):
    """Lines as a format writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(FORMATTERS["json"])
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler, logger = Kept(), logging.getLogger("moe_ray")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_which_ids_are_accepted() -> None:
    assert accepted_id(GOOD.encode()) == GOOD
    for refused in (None, b"", BAD.encode(), b"two words", b"tab\t", "é".encode(), b"line\nbreak"):
        own = accepted_id(refused)
        assert len(own) == 32
        assert own != accepted_id(refused)


@on_a_loop
async def test_every_response_tells_the_id_of_its_request(
    trunk: Trunk, readable_model: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(readable_model, [trunk.info], HttpOptions(api_keys=("k",))) as client:
        key = {"Authorization": "Bearer k", "X-Request-Id": GOOD}
        whole = await client.post("/v1/completions", json=ASK, headers=key)
        streamed = await client.post("/v1/completions", json={**ASK, "stream": True}, headers=key)
        refused = await client.post("/v1/completions", json={**ASK, "temperature": -1}, headers=key)
        without_key = await client.get("/v1/models", headers={"X-Request-Id": GOOD})
        nowhere = await client.get("/nowhere", headers=key)
        health = await client.get("/health", headers=key)
        for response in (whole, streamed, refused, without_key, nowhere, health):
            assert response.headers.get_list("x-request-id") == [GOOD]
        assert whole.json()["id"].startswith("cmpl-"), "OpenAI's id stays"
        for sent in ({}, {"X-Request-Id": BAD}):
            own = await client.get("/v1/models", headers={"Authorization": "Bearer k", **sent})
            assert len(own.headers["x-request-id"]) == 32

        async def breaks(self: ServedModel, *_: object) -> None:
            logging.getLogger("moe_ray.test").warning("about to break")
            raise RuntimeError("unforeseen")

        monkeypatch.setattr(ServedModel, "respond", breaks)
        broken = await client.post("/v1/completions", json=ASK, headers=key)
        assert broken.status_code == 500
        assert broken.headers["x-request-id"] == GOOD
        assert broken.json()["error"]["type"] == "server_error"

    access = [line for line in kept.lines if line["logger"] == "moe_ray.access"]
    statuses = [line["status"] for line in access]
    assert statuses == [200, 200, 400, 401, 404, 200, 200, 500], "one line a request; none for a probe at level info"
    for line in (*access[:5], access[-1]):
        assert line["request_id"] == GOOD
        assert line["duration_ms"] > 0
        assert GOOD in line["message"]
    assert access[0]["path"] == "/v1/completions"
    assert access[0]["method"] == "POST"
    assert access[0]["prompt_tokens"] == 3
    assert access[0]["generated_tokens"] == access[1]["generated_tokens"] == 4
    assert access[1]["finish_reasons"] == ["length"]
    assert "generated_tokens" not in access[2]
    (warned,) = (line for line in kept.lines if line["logger"] == "moe_ray.test")
    assert warned["request_id"] == GOOD, "whatever is logged while a request is answered names it"
    (failed,) = (line for line in kept.lines if "exception" in line)
    assert "RuntimeError: unforeseen" in failed["exception"]


def test_a_json_line_is_one_line() -> None:
    record = logging.LogRecord("moe_ray.x", logging.INFO, "f", 1, "two\nlines %s", ("ü",), None)
    setattr(record, FIELDS, {"tokens": 3})
    token = current_request_id.set("r1")
    text = FORMATTERS["json"].format(record)
    current_request_id.reset(token)
    assert "\n" not in text
    told = json.loads(text)
    assert told.pop("timestamp").endswith("+00:00")
    expected = {"level": "INFO", "logger": "moe_ray.x", "message": "two\nlines ü", "request_id": "r1", "tokens": 3}
    assert told == expected


def test_the_format_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("moe_ray")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    configure("warning", "json")
    (handler,) = logger.handlers
    assert handler.formatter is FORMATTERS["json"]
    logger.setLevel(level)
