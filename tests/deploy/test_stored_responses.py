"""Two gateways that share what /v1/responses stores: whichever is asked knows every response."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from served import Served, deploy, eventually, statuses

from moe_ray.config import load_config
from moe_ray.deploy.app import shared_responses
from moe_ray.deploy.stored_responses import response_store

ASKED = 12
"""So often in a row Serve's proxy does not choose one gateway of two: by chance once in 2,000 times."""
GREEDY: dict[str, Any] = {"model": "two", "temperature": 0}


@pytest.fixture(scope="module")
def two(kernel_model: Path, http_port: int) -> Iterator[Served]:
    from ray import serve

    flags = {
        "model": {"path": str(kernel_model), "served_name": "two", "dtype": "float32"},
        "engine": {"kv_cache_gib": 0.05},
        "transport": "local",
        "gateway": {"num_replicas": 2},
    }
    yield deploy("two-gateways", http_port, flags)
    serve.delete("two-gateways")


@pytest.fixture(scope="module")
def client(two: Served) -> Iterator[openai.OpenAI]:
    # Without kept connections the proxy chooses a gateway for each request.
    headers = {"Connection": "close"}
    with openai.OpenAI(
        base_url=f"{two.url}/v1", api_key="none", max_retries=0, timeout=60, default_headers=headers
    ) as client:
        yield client


def test_every_gateway_knows_every_response(two: Served, client: openai.OpenAI) -> None:
    assert len(statuses(two, "Gateway")) == 2
    made = client.responses.create(input="Hello", max_output_tokens=4, **GREEDY)
    for _ in range(ASKED):
        assert client.responses.retrieve(made.id) == made
    last = made
    for _ in range(ASKED // 2):
        last = client.responses.create(input="More", max_output_tokens=4, previous_response_id=last.id, **GREEDY)
    (kept,) = statuses(two, "StoredResponses")
    assert kept["stored_responses"] == 1 + ASKED // 2
    client.responses.delete(made.id)
    for _ in range(ASKED):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)


def test_a_background_response_is_read_and_cancelled_by_any_gateway(two: Served, client: openai.OpenAI) -> None:
    events = list(client.responses.create(input="Hello", max_output_tokens=6, background=True, stream=True, **GREEDY))
    response_id = events[0].response.id  # type: ignore[union-attr]
    for _ in range(ASKED // 2):
        again = list(client.responses.retrieve(response_id, stream=True, starting_after=2))
        assert again == events[3:]

    def idle() -> bool:
        (trunk,) = statuses(two, "Trunk")
        return trunk["num_running"] == trunk["num_waiting"] == 0

    for _ in range(3):
        started = client.responses.create(input="Hello", background=True, extra_body={"ignore_eos": True}, **GREEDY)
        assert client.responses.cancel(started.id).status == "cancelled"
        eventually(idle)
        assert client.responses.retrieve(started.id).status == "cancelled"


@pytest.mark.parametrize(("gateways", "mib", "expected"), [(1, 64, False), (2, 64, True), (2, 0, False)])
def test_the_deployment_is_there_only_where_it_is_needed(gateways: int, mib: int, expected: bool) -> None:
    config = load_config({"gateway": {"num_replicas": gateways, "responses_memory_mib": mib}})
    assert (shared_responses(config) is not None) == expected
    assert (response_store(config.gateway, None) is not None) == bool(mib)
