"""Log-probabilities of prompts: those of transformers, each told once and in order, however the work is cut up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from moe_ray.core import Request, SamplingParams, TokenEvent, TokenLogprobs
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.errors import InvalidRequest
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.trunk import Trunk

VOCAB, MAX_MODEL_LEN = 512, 64
DRAFTS = {"num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 4}


@pytest.fixture(scope="module")
def trunk(random_model: Path) -> Iterator[Trunk]:
    torch.set_num_threads(1)
    checkpoint, compute = Checkpoint.open(random_model), Compute(Backend("float32"))
    yield Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, MAX_MODEL_LEN)
    checkpoint.close()


@pytest.fixture(scope="module")
def theirs(random_model: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(random_model, dtype=torch.float32).eval()


def make(trunk: Trunk, blocks: int = 64, micro_batches: int = 1, **limits: Any) -> Engine:
    return Engine(trunk, EngineOptions(blocks, 8, SchedulerLimits(**limits), MAX_MODEL_LEN, micro_batches))


def ask(name: str, prompt: tuple[int, ...], count: int | None = 3, **sampling: Any) -> Request:
    kind = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, **sampling}
    return Request(name, prompt, SamplingParams(**kind, prompt_logprobs=count))


def run(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[TokenEvent]], dict[str, list[TokenLogprobs]]]:
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    told: dict[str, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
    to_come = list(requests)
    while to_come or engine.has_work:
        for request in to_come[:2]:
            engine.submit(request)
        del to_come[:2]
        for event in engine.step():
            own = told[event.request_id]
            if event.prompt_logprobs:
                assert event.prompt_logprobs_start == len(own) + 1, "each once, and in order"
            own += event.prompt_logprobs
            events[event.request_id].append(event)
        engine.check_integrity()
    return events, told


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)

    def some(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    shared = some(16)  # two blocks that the prefix cache holds
    return [tuple(some(20)), tuple(shared + some(9)), tuple(some(4) * 5), tuple(shared + some(3)), (7,), (8, 9)]


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 7, "max_num_seqs": 4},
    "micro-batches": {"micro_batches": 2},
    "preemption": {"blocks": 11},
    "preemption, no prefix cache": {"blocks": 11, "enable_prefix_caching": False},
    "drafts, chunks": {**DRAFTS, "max_num_batched_tokens": 9},
}


@pytest.mark.parametrize("name", HOW)
def test_they_are_those_of_transformers(trunk: Trunk, theirs: MixtralForCausalLM, name: str) -> None:
    engine = make(trunk, **HOW[name])
    requests = [ask(f"r{i}", prompt, None if i == 2 else 3) for i, prompt in enumerate(prompts())]
    events, told = run(engine, requests)
    assert (engine.stats().preemptions > 0) == ("preemption" in name)
    for request in requests:
        prompt = list(request.prompt_token_ids)
        wanted = [] if request.request_id == "r2" else prompt[1:]
        assert [entry.token_id for entry in told[request.request_id]] == wanted
        with torch.inference_mode():
            table = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for position, entry in enumerate(told[request.request_id]):
            row = table[position]
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
            assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
            assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
        assert sum(len(event.token_ids) for event in events[request.request_id]) == 12


def test_tokens_are_the_same_with_and_without_them(trunk: Trunk) -> None:
    def tokens(count: int | None) -> list[tuple[int, ...]]:
        events, _ = run(make(trunk), [ask(f"r{i}", prompt, count) for i, prompt in enumerate(prompts())])
        return [tuple(token for event in own for token in event.token_ids) for own in events.values()]

    assert tokens(None) == tokens(5)


def test_a_prompt_alone_may_fill_the_context(trunk: Trunk) -> None:
    prompt = tuple(range(3, 3 + MAX_MODEL_LEN))
    events, told = run(make(trunk, max_num_batched_tokens=20), [ask("r", prompt, 0, max_tokens=0)])
    assert len(told["r"]) == MAX_MODEL_LEN - 1
    assert [event.finish_reason for event in events["r"]] == [None, None, None, "length"]
    assert not any(event.token_ids for event in events["r"])


def test_a_replayed_request_is_told_them_again(trunk: Trunk) -> None:
    prompt = prompts()[0]
    events, told = run(make(trunk), [ask("r", prompt)])
    output = tuple(token for event in events["r"] for token in event.token_ids)
    replayed = Request("r", prompt, ask("r", prompt).sampling, output[:7])
    events, again = run(make(trunk, max_num_batched_tokens=6), [replayed])
    assert tuple(token for event in events["r"] for token in event.token_ids) == output[7:]
    assert [(entry.token_id, entry.rank, entry.top[0][0]) for entry in again["r"]] == [
        (entry.token_id, entry.rank, entry.top[0][0]) for entry in told["r"]
    ]


def test_no_token_and_nothing_of_the_prompt_is_no_work(trunk: Trunk) -> None:
    with pytest.raises(InvalidRequest, match="max_tokens"):
        make(trunk).submit(ask("r", (1, 2), None, max_tokens=0))
