"""A draft model beside the trunk: no token changes; one that is right is always believed, whatever happens."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_llama import save_mixture_of, save_random_llama

from moe_ray.core import EngineStats, Request, SamplingParams, TokenEvent
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.grammar.grammars import Grammars
from moe_ray.engine.kv_cache import KVCache
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.engine.trunk_drafts import TrunkDrafts
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.expert_reader import read_experts
from moe_ray.model.inline_experts import InlineExperts
from moe_ray.model.trunk import Trunk
from moe_ray.sampling import Grammar

torch.set_num_threads(1)
VOCAB, EOS, SIZE, LONGEST = 96, 2, 8, 200
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
}


def load(directory: Path, inline: bool) -> Trunk:
    checkpoint, compute = Checkpoint.open(directory), Compute(Backend("float32"))
    config = checkpoint.config
    keys = [(layer, expert) for layer in range(config.num_hidden_layers) for expert in range(config.num_local_experts)]
    experts = InlineExperts(read_experts(checkpoint, keys, compute)) if inline else local_experts(checkpoint, compute)
    trunk = Trunk.load(checkpoint, experts, compute, 256)
    checkpoint.close()
    return trunk


@dataclass(frozen=True)
class Models:
    """A target, and what drafts for it."""

    target: Trunk
    drafts: dict[str, Trunk]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("dense"), seed=0, **SHAPE)


@pytest.fixture(scope="module")
def models(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Drafts by what the target was made of, by the target itself, and by a stranger."""
    mixture = save_mixture_of(dense, tmp_path_factory.mktemp("of-dense") / "mixture")
    stranger = save_random_llama(tmp_path_factory.mktemp("stranger"), seed=1, **{**SHAPE, "num_hidden_layers": 1})
    drafts = {"origin": dense, "itself": mixture, "stranger": stranger}
    return Models(load(mixture, inline=False), {name: load(path, inline=True) for name, path in drafts.items()})


def make_engine(models: Models, draft: str | None, **options: Any) -> Engine:
    blocks, micro_batches = options.pop("blocks", 256), options.pop("micro_batches", 1)
    catch_up, grammars = options.pop("catch_up", 64), options.pop("grammars", None)
    model = None
    if draft is not None:
        options = {"num_speculative_tokens": 4, "speculation": "draft", **options}
        trunk = models.drafts[draft]
        cache = KVCache(trunk.config, blocks, SIZE, torch.float32, trunk.device)
        ends = frozenset({EOS})
        model = TrunkDrafts(trunk, cache, end_token_ids=ends, max_positions=256, most_tokens=catch_up)
    limits = SchedulerLimits(**options)
    return Engine(
        models.target,
        EngineOptions(blocks, SIZE, limits, LONGEST, micro_batches, frozenset({EOS})),
        grammars,
        model,
    )


def run(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[TokenEvent]], EngineStats]:
    """Run the requests to their end, two of them added in each step."""
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    to_come = list(requests)
    while to_come or engine.has_work:
        for request in to_come[:2]:
            engine.submit(request)
        del to_come[:2]
        for event in engine.step():
            assert event.error is None
            events[event.request_id].append(event)
        engine.check_integrity()
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    return events, stats


def said(events: dict[str, list[TokenEvent]]) -> dict[str, tuple[Any, ...]]:
    """Everything of the events that must not depend on drafts."""
    return {
        name: (
            [token for event in own for token in event.token_ids],
            [entry.token_id for event in own for entry in event.logprobs],
            [entry.token_id for event in own for entry in event.prompt_logprobs],
            own[-1].finish_reason,
            own[-1].stop_token_id,
        )
        for name, own in events.items()
    }


def prompts(count: int, seed: int = 3) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    stem = [rng.randrange(3, VOCAB) for _ in range(20)]
    tails = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(count)]
    return [tuple(stem * (i % 3 == 0) + tail) for i, tail in enumerate(tails)]


GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
FEW = dict.fromkeys(range(10, 16), 4.0)
KINDS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.8, seed=5),
    "cut": SamplingParams(max_tokens=30, temperature=0.9, top_k=6, top_p=0.8, seed=6, logprobs=2),
    "penalties": replace(GREEDY, repetition_penalty=1.1, frequency_penalty=0.4, logit_bias=FEW),
    "logprobs": replace(GREEDY, logprobs=3, prompt_logprobs=1),
    "min_tokens": replace(GREEDY, min_tokens=25, ignore_eos=False, logit_bias={EOS: 30.0}),
    "bad words": replace(GREEDY, bad_words_ids=((11, 12), (13,)), logit_bias=FEW),
}
LOADS: dict[str, dict[str, Any]] = {
    "micro-batches": {"micro_batches": 2},
    "preemption, no prefix cache": {"blocks": 26, "enable_prefix_caching": False, "max_num_seqs": 6},
    "chunks": {"max_num_batched_tokens": 9, "max_num_seqs": 4, "catch_up": 5},
}


def test_a_dense_llama_says_what_transformers_says(dense: Path, models: Models) -> None:
    from transformers import LlamaForCausalLM

    prompt = list(prompts(1)[0])
    with torch.inference_mode():
        wanted = LlamaForCausalLM.from_pretrained(dense)(torch.tensor([prompt])).logits[0, -1]
    for name in ("origin", "itself"):
        trunk = models.drafts[name]
        limits = SchedulerLimits()
        engine = Engine(trunk, EngineOptions(32, SIZE, limits, LONGEST))
        engine.submit(Request("r", tuple(prompt), replace(GREEDY, max_tokens=1, logprobs=5)))
        (event,) = engine.step()
        expected = wanted.log_softmax(-1).topk(5)
        assert [token for token, _ in event.logprobs[0].top] == expected.indices.tolist(), name
        assert [value for _, value in event.logprobs[0].top] == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_of_a_model_change_nothing(models: Models, kind: str) -> None:
    requests = [Request(f"r{i}", prompt, replace(KINDS[kind], seed=i)) for i, prompt in enumerate(prompts(4))]
    without, plain = run(make_engine(models, None), requests)
    shares = {}
    for draft in ("origin", "stranger"):
        events, stats = run(make_engine(models, draft), requests)
        assert said(events) == said(without), draft
        assert stats.prompt_tokens == plain.prompt_tokens
        shares[draft] = stats.accepted_draft_tokens / stats.draft_tokens
        assert stats.draft_tokens > 30, draft
    assert shares["origin"] > 0.97, "sampled tokens, too: its noise is the target's"
    assert shares["stranger"] < 0.4
    if kind == "greedy":
        assert shares["origin"] == 1.0
        assert stats.steps <= plain.steps


@pytest.mark.parametrize("load", LOADS)
def test_mixed_load(models: Models, load: str) -> None:
    kinds = list(KINDS.values())
    requests = [Request(f"r{i}", p, replace(kinds[i % len(kinds)], seed=i)) for i, p in enumerate(prompts(10))]
    requests[3] = replace(requests[3], output_token_ids=(7, 9, 11))  # a stream that another trunk began
    without, _ = run(make_engine(models, None), requests)
    for draft, speculation in (("itself", "draft"), ("stranger", "auto")):
        events, stats = run(make_engine(models, draft, speculation=speculation, **LOADS[load]), requests)
        assert said(events) == said(without), (draft, speculation)
        assert stats.draft_tokens > 0
        assert (stats.preemptions > 0) == ("preemption" in load)


def test_a_model_that_is_right_is_believed_whatever_happens(models: Models) -> None:
    """A draft that fails here was made of K and V that are not its sequence's own."""
    reached: Counter[str] = Counter()
    for seed in range(6):
        rng = random.Random(seed)
        options = {
            "blocks": rng.choice([26, 26, 40]),
            "max_num_batched_tokens": rng.choice([5, 16, 64]),
            "max_num_seqs": rng.randint(3, 6),
            "enable_prefix_caching": rng.random() < 0.7,
            "num_speculative_tokens": rng.randint(1, 5),
            "catch_up": rng.choice([3, 16, 64]),
        }
        engine = make_engine(models, rng.choice(["origin", "itself"]), **options)
        to_come = [
            Request(f"r{i}", prompt, replace(GREEDY, max_tokens=rng.randint(20, 90)))
            for i, prompt in enumerate(prompts(8, seed % 4))
        ]
        tokens: dict[str, list[int]] = {request.request_id: [] for request in to_come}
        requests = {request.request_id: request for request in to_come}
        aborted: set[str] = set()
        while to_come or engine.has_work:
            while to_come and rng.random() < 0.9:
                engine.submit(to_come.pop(0))
            if rng.random() < 0.08 and engine._live:
                aborted.add(name := rng.choice(sorted(engine._live)))
                assert engine.abort(name)
            for event in engine.step():
                assert event.error is None
                tokens[event.request_id] += event.token_ids
            engine.check_integrity()
        stats = engine.stats()
        assert stats.accepted_draft_tokens == stats.draft_tokens, f"seed {seed}"
        drafting = engine.drafting
        assert drafting is not None
        assert isinstance(drafting._model, TrunkDrafts)
        assert not drafting._model._progress, "a sequence was not forgotten"
        alone = make_engine(models, None)
        for name in rng.sample(sorted(requests.keys() - aborted), 2):
            wanted, _ = run(alone, [requests[name]])
            assert tokens[name] == said(wanted)[name][0], f"seed {seed}, {name}"
        reached += Counter(preemptions=stats.preemptions, hits=stats.prefix_hit_tokens, aborts=len(aborted))
        reached["drafts"] += stats.draft_tokens
    assert all(reached[corner] >= 3 for corner in ("preemptions", "hits", "aborts", "drafts")), reached


def test_a_long_prompt_is_caught_up_with_in_bounded_passes(models: Models) -> None:
    engine = make_engine(models, "origin", catch_up=16, max_num_batched_tokens=150)
    engine.submit(Request("short", (5, 6, 7), GREEDY))
    for _ in range(3):
        engine.step()
    engine.submit(Request("long", prompts(1)[0] * 3, GREEDY))
    drafting = engine.drafting
    assert drafting is not None
    model = drafting._model
    assert isinstance(model, TrunkDrafts)
    brought: Counter[str] = Counter()
    largest = 0
    while engine.has_work:
        for event in engine.step():
            brought[event.request_id] = max(brought[event.request_id], len(event.token_ids))
        largest = max([largest, *(each.tokens for each in model.passes)])
    assert largest == 16
    assert brought == {"short": 5, "long": 5}


def test_grammars_hold_drafts_as_they_hold_tokens(models: Models) -> None:
    """Drafts are drawn under the grammar's masks, so that a model which is right stays right."""
    letters = [None, None, None, *(bytes([i]) for i in range(32, 32 + VOCAB - 3))]
    source = Grammar("regex", "([a-f]{3}-[0-9]{2} ){2}end")
    requests = [
        Request(f"r{i}", p, replace(GREEDY, temperature=0.7 * (i % 2), seed=i, grammar=source, ignore_eos=False))
        for i, p in enumerate(prompts(4))
    ]
    grammars = Grammars(lambda: letters, VOCAB, frozenset({EOS}))

    def answers(draft: str | None) -> tuple[dict[str, tuple[Any, ...]], EngineStats]:
        engine = make_engine(models, draft, grammars=grammars)
        events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
        for request in requests:
            engine.submit(request)
        while any(not own or not own[-1].last for own in events.values()):
            engine.wait()
            for event in engine.step():
                assert event.error is None
                events[event.request_id].append(event)
            engine.check_integrity()
        return said(events), engine.stats()

    without, _ = answers(None)
    assert all(reason == "stop" for _, _, _, reason, _ in without.values())
    for draft in ("origin", "stranger"):
        found, stats = answers(draft)
        assert found == without
        share = stats.accepted_draft_tokens / stats.draft_tokens
        assert share > 0.95 if draft == "origin" else stats.draft_tokens > 0
    grammars.close()


def test_beyond_its_positions_it_says_nothing(models: Models) -> None:
    engine = make_engine(models, "origin")
    drafting = engine.drafting
    assert drafting is not None
    assert isinstance(drafting._model, TrunkDrafts)
    drafting._model._max_positions = 30
    request = Request("r", prompts(2)[1][:10], replace(GREEDY, max_tokens=60))
    without, _ = run(make_engine(models, None), [request])
    events, stats = run(engine, [request])
    assert said(events) == said(without)
    assert 10 <= stats.draft_tokens <= 20
