"""Two models that share six of eight experts, served at once: each answers as it does alone, on experts held once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from random_mixtral import save_random_mixtral
from served import Served, by_hand, complete, deploy, eventually, kill, statuses
from variant_models import save_variant

from moe_ray.commands.planned import Planned, planned
from moe_ray.core import ExpertKey, SamplingParams
from moe_ray.llm import LLM

LAYERS, TOKENS = 3, 48
HEADERS = 512
"""Bytes of what describes the two blocks of a key's weights in memory, beside them; no plan counts these."""
PROMPTS = tuple(
    24 * text for text in ("The house has many rooms. ", "Two models on one floor, ", "What the router chose ")
)
"""Long enough that experts have something to compute when they are read."""


def own_two(key: ExpertKey) -> int | None:
    """Experts 2 and 5 are the variant's own, 0 and 1 change places in the last layer."""
    layer, expert = key
    if expert in (2, 5):
        return None
    return 1 - expert if layer == LAYERS - 1 and expert < 2 else expert


@dataclass(frozen=True)
class Pair:
    """A model and its variant on the cluster, what each says alone, and what they were planned to take."""

    served: Served
    alone: dict[str, list[str]]
    plan: Planned
    per_actor: int
    """Experts an actor."""

    def actor_of(self, expert: int) -> str:
        first = expert // self.per_actor * self.per_actor
        return f"Expert{expert}" if self.per_actor == 1 else f"Experts{first}-{first + self.per_actor - 1}"

    @property
    def actors(self) -> list[str]:
        return [self.actor_of(expert) for expert in range(0, 8, self.per_actor)]

    def answer(self, name: str, index: int, on_chunk: Callable[[int], None] | None = None) -> str:
        return complete(self.served, PROMPTS[index], on_chunk, model=name, max_tokens=TOKENS)


@pytest.fixture(scope="module")
def models(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("variants")
    base = save_random_mixtral(
        directory / "base",
        seed=11,
        like=demo_model,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    tuned = save_variant(base, directory / "tuned", own_two, max_position_embeddings=256)
    (tuned / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.25}))
    return {"base": base, "tuned": tuned}


ALONE, GROUPED = pytest.param((None, 1), id="float32"), pytest.param(("int8", 8), id="int8, eight experts an actor")


@pytest.fixture(scope="module", params=[ALONE, GROUPED])
def pair(models: dict[str, Path], http_port: int, request: pytest.FixtureRequest) -> Iterator[Pair]:
    from ray import serve

    quantize, per_actor = request.param
    alone = {}
    for name, path in models.items():
        llm = LLM(path, dtype="float32", quantize=quantize, engine={"kv_cache_gib": 0.05})
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        alone[name] = [output.text for output in llm.generate(list(PROMPTS), sampling)]
    assert not set(alone["base"]) & set(alone["tuned"]), "they are two models"
    flags: dict[str, Any] = {
        "model": {"path": str(models["base"]), "served_name": "base", "dtype": "float32"},
        "variants": [{"name": "tuned", "path": str(models["tuned"])}],
        "engine": {"kv_cache_gib": 0.05, "micro_batches": 1, "enable_prefix_caching": per_actor == 1},
        "experts": {"quantize": quantize, "experts_per_actor": per_actor},
    }
    served = deploy(f"variants-{quantize}", http_port, flags)
    yield Pair(served, alone, planned(served.config, models["base"]), per_actor)
    serve.delete(served.app_name)


def ask(pair: Pair, path: str, body: dict[str, Any] | None = None, **headers: str) -> Any:
    method = "GET" if body is None else "POST"
    answer = httpx.request(method, pair.served.url + path, json=body, headers=headers, timeout=60, trust_env=False)
    return answer.json() if answer.status_code == 200 else answer


def test_both_answer_at_once_as_each_does_alone(pair: Pair) -> None:
    asked = [(name, index) for index in range(len(PROMPTS)) for name in ("base", "tuned")] * 2
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda each: pair.answer(*each), asked))
    for (name, index), text in zip(asked, answers, strict=True):
        assert text == pair.alone[name][index], (name, index)


@pytest.mark.parametrize("pair", [GROUPED], indirect=True)
def test_rows_of_both_models_are_computed_in_one_batch(pair: Pair) -> None:
    """A trunk has one call of an expert in flight at a time: calls that share a batch are of two trunks, two models."""

    def joined() -> int:
        told = [statuses(pair.served, actor)[0] for actor in pair.actors]
        return sum(each["calls"] - each["batches"] for each in told)

    asked = [(("base", "tuned")[i % 2], i // 2 % len(PROMPTS)) for i in range(12)]
    before, rounds = joined(), 0
    while joined() == before:
        rounds += 1
        assert rounds < 16, "no batch of calls of both trunks"
        with ThreadPoolExecutor(len(asked)) as threads:
            answers = list(threads.map(lambda each: pair.answer(*each), asked))
        assert answers == [pair.alone[name][index] for name, index in asked]


def test_equal_experts_are_held_once(pair: Pair) -> None:
    told = {actor: statuses(pair.served, actor)[0] for actor in pair.actors}
    expected = {actor.name: actor.weight_bytes for actor in pair.plan.plan.actors}
    assert sum(each["keys"] for each in told.values()) == 10 * LAYERS
    for actor, each in told.items():
        beside = each["weight_bytes"] - expected[actor]
        assert 0 <= beside <= HEADERS * each["keys"], actor
    shared, experts = pair.plan.shared, sum(expected[actor] for actor in told)
    assert shared is not None
    assert shared.added_expert_bytes * 5 == experts, "two experts of ten are the variant's alone"
    assert experts / (experts - shared.added_expert_bytes) <= 1.35
    assert experts + expected["Trunk"] + expected["Trunk-tuned"] == shared.total_bytes
    shown = ask(pair, "/experts")["experts"]
    assert [expert["expert"] for expert in shown] == list(range(8)), "an expert of a variant has no number of its own"
    replicas = {replica["replica_id"]: replica["weight_bytes"] for expert in shown for replica in expert["replicas"]}
    assert sum(replicas.values()) == sum(each["weight_bytes"] for each in told.values())


def test_a_killed_expert_changes_no_token_of_either(pair: Pair) -> None:
    (victim,) = statuses(pair.served, pair.actor_of(2))
    (other,) = statuses(pair.served, pair.actor_of(7))
    reached = threading.Barrier(2, timeout=30)

    def on_chunk(chunks: int) -> None:
        if chunks == 8:
            if reached.wait() == 0:
                for pid in {victim["pid"], other["pid"]}:
                    kill(pid)
            reached.wait()

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda name: pair.answer(name, 0, on_chunk), ("base", "tuned")))
    assert answers == [pair.alone["base"][0], pair.alone["tuned"][0]]
    eventually(lambda: statuses(pair.served, pair.actor_of(2))[0]["pid"] != victim["pid"], 60)


@pytest.mark.parametrize("pair", [ALONE], indirect=True)
def test_a_second_replica_holds_all_models_and_answers_for_each(pair: Pair) -> None:
    by_hand(pair.served, [5], 2)

    def loaded() -> list[dict[str, Any]]:
        told = statuses(pair.served, "Expert5")
        return told if len(told) == 2 and all(each["loaded_keys"] == 2 * LAYERS for each in told) else []

    first, second = eventually(loaded, 60)
    assert first["weight_bytes"] == second["weight_bytes"]

    def both_work() -> bool:
        assert [pair.answer(name, 1) for name in ("base", "tuned")] == [pair.alone[name][1] for name in pair.alone]
        return all(each["calls"] for each in statuses(pair.served, "Expert5"))

    eventually(both_work, 60)
    by_hand(pair.served, [5], None)


def test_each_api_knows_both_models_and_no_other(pair: Pair) -> None:
    cards = {card["id"]: card for card in ask(pair, "/v1/models")["data"]}
    assert set(cards) == {"base", "tuned"}
    assert (cards["base"]["max_model_len"], cards["tuned"]["max_model_len"]) == (512, 256)
    assert cards["tuned"]["sampling_defaults"] == {"temperature": 0.25}
    assert ask(pair, "/v1/models/tuned")["root"] == "tuned"
    anthropic = ask(pair, "/v1/models", **{"anthropic-version": "2023-06-01"})
    assert [card["id"] for card in anthropic["data"]] == ["base", "tuned"]
    assert [card["model"] for card in ask(pair, "/api/tags")["models"]] == ["base:latest", "tuned:latest"]
    shown = ask(pair, "/api/show", {"model": "tuned"})
    assert shown["model_info"]["mixtral.context_length"] == 256
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/responses", {"input": "x"}),
        ("/api/generate", {"prompt": "x"}),
    ):
        assert ask(pair, path, {"model": "another", **body}).status_code == 404, path
    generated = {
        name: ask(
            pair,
            "/api/generate",
            {
                "model": name,
                "prompt": PROMPTS[0],
                "raw": True,
                "stream": False,
                "options": {"temperature": 0, "num_predict": 4},
            },
        )["response"]
        for name in ("base", "tuned")
    }
    for name, text in generated.items():
        assert text
        assert pair.alone[name][0].startswith(text)
    turn = [{"role": "user", "content": "Who is there?"}]
    for path, body, said in (
        ("/v1/chat/completions", {"messages": turn, "max_tokens": 3}, "tuned"),
        ("/v1/messages", {"messages": turn, "max_tokens": 3}, "tuned"),
        ("/v1/responses", {"input": turn, "max_output_tokens": 3}, "tuned"),
    ):
        assert ask(pair, path, {"model": "tuned", **body})["model"] == said, path


def test_one_model_goes_on_with_what_another_said(pair: Pair) -> None:
    first = ask(pair, "/v1/responses", {"model": "tuned", "input": "Who is there?", "max_output_tokens": 3})
    body = {"model": "base", "input": "And now?", "previous_response_id": first["id"], "max_output_tokens": 3}
    second = ask(pair, "/v1/responses", body)
    assert second["model"] == "base"
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]


def test_metrics_and_status_tell_the_models_apart(pair: Pair) -> None:
    pair.answer("tuned", 2)
    text = httpx.get(f"{pair.served.url}/metrics", timeout=60, trust_env=False).text
    for name in ("base", "tuned"):
        assert f'vllm:generation_tokens_total{{model_name="{name}"}}' in text
        assert 'vllm:num_requests_running{engine="' in text
    assert [statuses(pair.served, each)[0]["model"] for each in ("Trunk", "Trunk-tuned")] == ["base", "tuned"]
    house = ask(pair, "/house")
    assert sorted(trunk["model"] for trunk in house["trunks"]) == ["base", "tuned"]
