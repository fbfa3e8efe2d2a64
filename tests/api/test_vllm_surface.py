"""What vLLM offers beside OpenAI's parameters: log-probabilities of prompts, token ids, best of, tokenizing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from in_process import Trunk, served
from transformers import MixtralForCausalLM

from moe_ray import __version__
from moe_ray.text.tokenizer import Tokenizer

PROMPT = [35, 86, 57, 78, 45, 62, 71]
HI = [{"role": "user", "content": "Hi"}]
ASK: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def log_probabilities(random_model: Path) -> Callable[[list[int]], torch.Tensor]:
    """transformers' own, [T, V]."""
    model = MixtralForCausalLM.from_pretrained(random_model, dtype=torch.float32).eval()

    def of(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    return of


@pytest.fixture
def ask(readable_model: Path, trunk: Trunk) -> Callable[[Callable[[httpx.AsyncClient], Awaitable[None]]], None]:
    """Runs a conversation with a server over the trunk."""

    def run(talk: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        async def connected() -> None:
            async with served(readable_model, [trunk.info]) as client:
                await talk(client)

        asyncio.run(connected())

    return run


async def complete(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/v1/completions", json={**ASK, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def refused(client: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> tuple[str, Any, Any]:
    response = await client.post(path, json=body if path != "/v1/completions" else {**ASK, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["message"], error["param"], error["code"]


def test_echo_with_logprobs_scores_the_prompt(ask: Any, log_probabilities: Any) -> None:
    """What evaluation harnesses ask for: the log-likelihood of a text under the model."""

    async def talk(client: httpx.AsyncClient) -> None:
        found = (await complete(client, echo=True, logprobs=2, max_tokens=0))["choices"][0]
        table = log_probabilities(PROMPT)
        said = found["logprobs"]
        assert said["token_logprobs"][0] is None
        assert said["top_logprobs"][0] is None
        expected = [table[i, token].item() for i, token in enumerate(PROMPT[1:])]
        assert said["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        assert len(said["tokens"]) == len(said["text_offset"]) == len(PROMPT)
        assert [found["text"][at:][:1] for at in said["text_offset"]] == [token[:1] for token in said["tokens"]]
        for i, top in enumerate(said["top_logprobs"][1:]):
            assert max(top.values()) == pytest.approx(table[i].max().item(), abs=1e-4)
        assert found["finish_reason"] == "length"
        more = (await complete(client, echo=True, logprobs=2, max_tokens=3))["choices"][0]["logprobs"]
        assert more["token_logprobs"][: len(PROMPT)] == pytest.approx(said["token_logprobs"], abs=1e-4)
        assert len(more["tokens"]) == len(PROMPT) + 3
        streamed: dict[str, list[Any]] = {name: [] for name in more}
        body = {**ASK, "echo": True, "logprobs": 2, "max_tokens": 3, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {") and (part := json.loads(line[6:])["choices"][0]["logprobs"]):
                    for name, values in part.items():
                        streamed[name] += values
        assert streamed["tokens"] == more["tokens"]
        assert streamed["text_offset"] == more["text_offset"]
        assert streamed["token_logprobs"] == pytest.approx(more["token_logprobs"], abs=1e-4)

    ask(talk)


def test_prompt_logprobs_in_vllms_form(ask: Any, log_probabilities: Any) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        found = (await complete(client, prompt_logprobs=1, n=2, temperature=1))["choices"]
        table = log_probabilities(PROMPT)
        for choice in found:
            first, *others = choice["prompt_logprobs"]
            assert first is None
            for i, (entry, token) in enumerate(zip(others, PROMPT[1:], strict=True)):
                own = entry[str(token)]
                assert own["logprob"] == pytest.approx(table[i, token].item(), abs=1e-4)
                assert own["rank"] == int((table[i] > table[i, token]).sum()) + 1
                best = str(int(table[i].argmax()))
                assert entry[best]["rank"] == 1
            assert choice["logprobs"] is None
        message, param, _ = await refused(client, prompt_logprobs=1, stream=True)
        assert (param, "stream" in message) == ("prompt_logprobs", True)

    ask(talk)


def test_the_best_of_several_are_the_likeliest(ask: Any) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        how = {"temperature": 1.5, "seed": 11, "logprobs": 0, "max_tokens": 6}
        every = (await complete(client, prompt=[PROMPT, PROMPT[:3]], n=5, **how))["choices"]
        best = await complete(client, prompt=[PROMPT, PROMPT[:3]], n=2, best_of=5, **how)
        assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
        assert best["usage"]["completion_tokens"] == 2 * 5 * 6, "all of them were computed"
        for prompt in range(2):
            own = every[5 * prompt : 5 * prompt + 5]
            own.sort(key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
            told = best["choices"][2 * prompt : 2 * prompt + 2]
            assert [choice["text"] for choice in told] == [choice["text"] for choice in own[:2]]
        without = await complete(client, prompt=[PROMPT, PROMPT[:3]], n=2, best_of=5, **{**how, "logprobs": None})
        assert [choice["text"] for choice in without["choices"]] == [choice["text"] for choice in best["choices"]]
        assert all(choice["logprobs"] is None for choice in without["choices"])
        assert (await refused(client, best_of=1, n=2))[1] == "best_of"
        assert (await refused(client, best_of=3, stream=True))[1] == "best_of"
        assert (await refused(client, best_of=21))[1] == "best_of"

    ask(talk)


def test_which_tokens_may_come(ask: Any, readable_model: Path) -> None:
    tokenizer = Tokenizer(readable_model)

    async def talk(client: httpx.AsyncClient) -> None:
        free = (await complete(client, return_token_ids=True, max_tokens=8))["choices"][0]
        assert free["prompt_token_ids"] == PROMPT
        assert len(free["token_ids"]) == 8
        allowed = [20, 21, 22]
        held = (await complete(client, return_token_ids=True, allowed_token_ids=allowed))["choices"][0]
        assert set(held["token_ids"]) <= set(allowed)
        word = tokenizer.decode(free["token_ids"][:1])
        without = (await complete(client, return_token_ids=True, bad_words=[word], max_tokens=8))["choices"][0]
        assert free["token_ids"][0] not in without["token_ids"]
        assert (await refused(client, allowed_token_ids=[]))[1] == "allowed_token_ids"
        assert (await refused(client, allowed_token_ids=[512]))[1] == "allowed_token_ids"
        assert (await refused(client, bad_words=[""]))[1] == "bad_words"
        named = (await complete(client, logprobs=1, return_tokens_as_token_ids=True))["choices"][0]["logprobs"]
        assert named["tokens"] == [f"token_id:{token_id}" for token_id in free["token_ids"][:4]]
        ids: list[int] = []
        async with client.stream(
            "POST", "/v1/completions", json={**ASK, "stream": True, "return_token_ids": True}
        ) as r:
            async for line in r.aiter_lines():
                if line.startswith("data: {"):
                    ids += json.loads(line[6:])["choices"][0]["token_ids"]
        assert ids == free["token_ids"][:4]

    ask(talk)


def test_a_long_prompt_is_cut_at_its_beginning_where_asked(ask: Any) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        long = list(range(30, 505)) * 2
        message, param, code = await refused(client, prompt=long)
        assert (param, code) == ("prompt", "context_length_exceeded"), message
        cut = await complete(client, prompt=long, truncate_prompt_tokens=7, return_token_ids=True)
        assert cut["choices"][0]["prompt_token_ids"] == long[-7:]
        same = await complete(client, prompt=long[-7:])
        assert cut["choices"][0]["text"] == same["choices"][0]["text"]
        filled = await complete(client, prompt=long, truncate_prompt_tokens=-1)
        assert filled["usage"]["prompt_tokens"] == 512 - ASK["max_tokens"]
        assert (await refused(client, truncate_prompt_tokens=0))[1] == "truncate_prompt_tokens"
        assert (await refused(client, truncate_prompt_tokens=-2))[1] == "truncate_prompt_tokens"

    ask(talk)


def test_tokenize_and_detokenize_are_what_a_request_sees(ask: Any) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        spelled = (await client.post("/tokenize", json={"prompt": "a b", "return_token_strs": True})).json()
        assert "".join(spelled["token_strs"]) == "a b"
        back = await client.post("/detokenize", json={"tokens": spelled["tokens"]})
        assert back.json() == {"prompt": "a b"}
        assert (await refused(client, "/tokenize"))[1] == "prompt"
        assert (await refused(client, "/tokenize", prompt="a", messages=HI))[1] == "prompt"
        assert (await refused(client, "/detokenize", tokens=[512]))[1] == "tokens"
        assert (await refused(client, "/detokenize", tokens=["a"]))[1] == "tokens[0]"
        missing = await client.post("/tokenize", json={"prompt": "a", "model": "other"})
        assert missing.status_code == 404

    ask(talk)


def test_what_a_conversation_comes_to(kernel_model: Path) -> None:
    trunk = Trunk(kernel_model, max_num_seqs=4)

    async def talk() -> None:
        async with served(kernel_model, [trunk.info]) as client:
            told = (await client.post("/tokenize", json={"messages": HI})).json()
            chat = {"messages": HI, "max_tokens": 2, "prompt_logprobs": 0, "return_token_ids": True}
            answer = (await client.post("/v1/chat/completions", json=chat)).json()
            assert answer["prompt_token_ids"] == told["tokens"]
            assert told["count"] == answer["usage"]["prompt_tokens"] == len(answer["prompt_logprobs"])
            assert answer["prompt_logprobs"][0] is None
            assert told["max_model_len"] == 512

    asyncio.run(talk())
    trunk.close()


def test_small_routes(ask: Any) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        assert (await client.get("/version")).json() == {"version": __version__}
        assert (await client.get("/load")).json() == {"server_load": 0}
        for method in ("GET", "POST"):
            assert (await client.request(method, "/ping")).status_code == 200
        started = asyncio.Event()

        async def stream() -> None:
            body = {**ASK, "stream": True, "max_tokens": 400}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    started.set()

        running = asyncio.create_task(stream())
        await started.wait()
        assert (await client.get("/load")).json() == {"server_load": 1}
        await running

    ask(talk)


def test_priority_is_taken_and_checked(ask: Any) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        plain = await complete(client)
        first = await complete(client, priority=-5)
        assert first["choices"][0]["text"] == plain["choices"][0]["text"]
        assert (await refused(client, priority="high"))[1] == "priority"
        typical = await complete(client, typical_p=0.5, temperature=1, seed=3)
        assert typical["choices"][0]["finish_reason"] == "length"
        assert (await refused(client, typical_p=0))[1] == "typical_p"

    ask(talk)
