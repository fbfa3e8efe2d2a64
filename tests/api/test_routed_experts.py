"""`return_routed_experts` over the real thing: what is served is what transformers' router chose, streamed or whole."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest
from served import Served, wait_ready

from moe_ray.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reference import Reference

LAYERS, TOP_K = 4, 2
ASK: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 24, "return_routed_experts": True}


@pytest.fixture(scope="module")
def http(served_random: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served_random.url, timeout=120, trust_env=False) as client:
        yield client


def theirs(reference: Reference, token_ids: list[int]) -> np.ndarray:
    """transformers' experts of each token, [T, L, K] ascending."""
    import torch

    with torch.inference_mode():
        layers = reference._model(torch.tensor([token_ids]), output_router_logits=True).router_logits
    return torch.stack([logits.topk(TOP_K, dim=-1).indices.sort(dim=-1).values for logits in layers], dim=1).numpy()


def decoded(told: str) -> list[Any]:
    """As users of vLLM read it."""
    return np.load(io.BytesIO(base64.b64decode(told)), allow_pickle=False).tolist()


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    for choice in answer["choices"]:
        if "routed_experts" in choice:
            choice["routed_experts"] = decoded(choice["routed_experts"])
    return answer


def streamed(
    http: httpx.Client, path: str, body: dict[str, Any], on_chunk: Callable[[int], None] | None = None
) -> dict[int, tuple[str, list[Any], int]]:
    """Text, experts and chunks with experts of each choice; that the chunks' positions follow each other is checked."""
    found: dict[int, tuple[str, list[Any], int]] = {}
    seen = 0
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                text, rows, count = found.get(choice["index"], ("", [], 0))
                text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
                assert ("routed_experts" in choice) == ("routed_experts_start" in choice)
                if "routed_experts" in choice:
                    assert choice["routed_experts_start"] == len(rows), "no position is lost or told twice"
                    told = decoded(choice["routed_experts"])
                    assert told
                    rows, count = rows + told, count + 1
                found[choice["index"]] = (text, rows, count)
            seen += 1
            if on_chunk is not None:
                on_chunk(seen)
    return found


def test_completions_tell_what_the_router_chose(http: httpx.Client, random_reference: Reference) -> None:
    prompt = list(range(40, 83))
    post(http, "/v1/completions", {**ASK, "prompt": prompt, "return_routed_experts": False})
    answer = post(http, "/v1/completions", {**ASK, "prompt": prompt})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "though the prompt is in the prefix cache"
    (choice,) = answer["choices"]
    output = random_reference.greedy(prompt, 24)
    assert len(output) == answer["usage"]["completion_tokens"] == 24
    rows = np.array(choice["routed_experts"])
    assert rows.shape == (len(prompt) + 24 - 1, LAYERS, TOP_K)
    np.testing.assert_array_equal(rows, theirs(random_reference, [*prompt, *output[:-1]]))
    (text, in_chunks, chunks) = streamed(http, "/v1/completions", {**ASK, "prompt": prompt})[0]
    assert (text, in_chunks) == (choice["text"], choice["routed_experts"])
    assert chunks > 5, "not all at the end"


def test_only_who_asks_is_told(http: httpx.Client) -> None:
    def one(index: int) -> dict[str, Any]:
        body = {**ASK, "prompt": [9, 8, 7 + index], "return_routed_experts": index % 2 == 0}
        return post(http, "/v1/completions", body)["choices"][0]

    with ThreadPoolExecutor(6) as threads:
        choices = list(threads.map(one, range(6)))
    assert [len(choice.get("routed_experts", [])) for choice in choices] == [26, 0] * 3
    refused = http.post("/v1/completions", json={"prompt": [9], "return_routed_experts": "surely"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "return_routed_experts")


def test_each_choice_has_its_own(http: httpx.Client) -> None:
    prompts = [list(range(100, 117)), list(range(9, 4, -1))]
    body = {**ASK, "prompt": prompts, "n": 2, "temperature": 0.9, "seed": 7}
    choices = post(http, "/v1/completions", body)["choices"]
    assert [len(choice["routed_experts"]) for choice in choices] == [17 + 23] * 2 + [5 + 23] * 2
    first, second, *_ = [choice["routed_experts"] for choice in choices]
    assert first[:17] == second[:17]
    assert first[17:] != second[17:]
    found = streamed(http, "/v1/completions", body)
    assert [found[i][:2] for i in range(4)] == [(c["text"], c["routed_experts"]) for c in choices]


def test_a_stop_string_ends_the_positions_too(http: httpx.Client) -> None:
    prompt = list(range(200, 230))
    whole = post(http, "/v1/completions", {**ASK, "prompt": prompt})["choices"][0]
    stop = next(c for c in whole["text"][6:] if c.isascii())
    body = {**ASK, "prompt": prompt, "stop": stop}
    answer = post(http, "/v1/completions", body)
    (choice,) = answer["choices"]
    computed = answer["usage"]["total_tokens"] - 1
    assert choice["finish_reason"] == "stop"
    assert choice["routed_experts"] == whole["routed_experts"][:computed]
    assert len(choice["routed_experts"]) == computed
    assert streamed(http, "/v1/completions", body)[0][:2] == (choice["text"], choice["routed_experts"])


def test_chat(served_demo: Served) -> None:
    client = openai.OpenAI(base_url=f"{served_demo.url}/v1", api_key="none", max_retries=0, timeout=120)
    asked = [{"role": "user", "content": "Name three rivers."}]
    answer = client.chat.completions.create(
        model="demo",
        messages=asked,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=12,
        extra_body={"return_routed_experts": True},
    )
    extra = answer.choices[0].model_extra
    assert extra is not None
    assert answer.usage is not None
    routed = decoded(extra["routed_experts"])
    assert np.array(routed).shape == (answer.usage.total_tokens - 1, 30, 2)
    body = {"messages": asked, "temperature": 0, "max_tokens": 12, "return_routed_experts": True}
    prompt = Tokenizer(served_demo.config.model.path).apply_chat_template(asked)
    with httpx.Client(base_url=served_demo.url, timeout=120, trust_env=False) as http:
        text, rows, _ = streamed(http, "/v1/chat/completions", body)[0]
        assert (text, rows) == (answer.choices[0].message.content, routed)
        same = {**body, "prompt": list(prompt)}
        del same["messages"]
        assert post(http, "/v1/completions", same)["choices"][0]["routed_experts"] == rows


def test_a_trunk_killed_in_mid_stream_loses_and_doubles_no_position(served_random: Served, http: httpx.Client) -> None:
    from ray import serve

    body = {**ASK, "prompt": list(range(300, 340)), "max_tokens": 60}
    whole = post(http, "/v1/completions", body)["choices"][0]
    (trunk,) = serve.get_deployment_handle("Trunk", served_random.app_name).broadcast("status").results(timeout_s=10)

    def kill(chunks: int) -> None:
        if chunks == 8:
            os.kill(trunk["pid"], signal.SIGKILL)

    text, rows, chunks = streamed(http, "/v1/completions", body, kill)[0]
    assert (text, rows) == (whole["text"], whole["routed_experts"])
    assert chunks > 8
    wait_ready(served_random.url)
