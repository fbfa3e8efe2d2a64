"""Speculative decoding end to end: with drafts the engine says, token for token, what it says without."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_mixtral import save_random_mixtral

from moe_ray.api.output import ChoiceOutput
from moe_ray.config import load_config
from moe_ray.core import EngineStats, Request, SamplingParams, TokenEvent, TokenLogprobs
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.errors import ConfigError
from moe_ray.experts.local import local_experts
from moe_ray.llm import LLM, RequestOutput
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.trunk import Trunk
from moe_ray.text.tokenizer import Tokenizer

torch.set_num_threads(1)
VOCAB, EOS = 96, 2
DRAFTS = {"num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral whose output repeats itself, but not always: guesses come true and fail."""
    return save_random_mixtral(
        tmp_path_factory.mktemp("repeating-mixtral"),
        seed=0,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        eos_token_id=EOS,
    )


@pytest.fixture(scope="module")
def trunk(directory: Path) -> Iterator[Trunk]:
    checkpoint, compute = Checkpoint.open(directory), Compute(Backend("float32"))
    yield Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 256)
    checkpoint.close()


@dataclass(frozen=True)
class Answer:
    """All that came of one request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None
    stop_token_id: int | None
    num_events: int


def answers(trunk: Trunk, requests: list[Request], **options: Any) -> tuple[dict[str, Answer], EngineStats]:
    """Run the requests to their end, two of them added in each step."""
    micro_batches, blocks = options.pop("micro_batches", 1), options.pop("blocks", 256)
    engine = Engine(trunk, EngineOptions(blocks, 8, SchedulerLimits(**options), 200, micro_batches, frozenset({EOS})))
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    to_come = list(requests)
    while to_come or engine.has_work:
        for request in to_come[:2]:
            engine.submit(request)
        del to_come[:2]
        for event in engine.step():
            assert event.error is None
            assert len(event.token_ids) >= 1
            events[event.request_id].append(event)
        engine.check_integrity()
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert stats.generated_tokens == sum(len(e.token_ids) for own in events.values() for e in own)
    return {name: joined(own) for name, own in events.items()}, stats


def joined(events: list[TokenEvent]) -> Answer:
    assert [event.last for event in events] == [False] * (len(events) - 1) + [True]
    return Answer(
        token_ids=tuple(token for event in events for token in event.token_ids),
        logprobs=tuple(entry for event in events for entry in event.logprobs),
        finish_reason=events[-1].finish_reason,
        stop_token_id=events[-1].stop_token_id,
        num_events=len(events),
    )


def assert_same(with_drafts: dict[str, Answer], without: dict[str, Answer]) -> None:
    for name, wanted in without.items():
        found = with_drafts[name]
        assert found.token_ids == wanted.token_ids, name
        assert (found.finish_reason, found.stop_token_id) == (wanted.finish_reason, wanted.stop_token_id)
        assert [e.token_id for e in found.logprobs] == [e.token_id for e in wanted.logprobs]
        ours, theirs = ([v for e in a.logprobs for v in (e.logprob, *(v for _, v in e.top))] for a in (found, wanted))
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert all(e.token_id == t for e, t in zip(found.logprobs, found.token_ids, strict=bool(found.logprobs)))


def prompts(count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)

    def some(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    return [tuple(some(1 + i % 7) * 4 + some(i % 3) if i % 4 else some(20)) for i in range(count)]


GREEDY = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
FEW = dict.fromkeys(range(10, 16), 4.0)  # few likely tokens, so that what is sampled repeats itself at times
KINDS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(max_tokens=60, temperature=0.7, seed=5, logit_bias=FEW, ignore_eos=True),
    "cut": SamplingParams(max_tokens=60, temperature=0.9, top_k=6, top_p=0.8, min_p=0.05, seed=6, logprobs=2),
    "penalties": replace(GREEDY, repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.1, logit_bias=FEW),
    "logprobs": replace(GREEDY, logprobs=3),
    "min_tokens": replace(GREEDY, min_tokens=25, ignore_eos=False, logit_bias={EOS: 30.0}),
    "stop ids": replace(GREEDY, stop_token_ids=tuple(range(20, 60)), min_tokens=12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_nothing(trunk: Trunk, kind: str) -> None:
    requests = [
        Request(f"r{i}", prompt, replace(KINDS[kind], seed=i if KINDS[kind].seed is not None else None))
        for i, prompt in enumerate(prompts(8))
    ]
    without, plain = answers(trunk, requests)
    with_drafts, stats = answers(trunk, requests, **DRAFTS)
    assert_same(with_drafts, without)
    assert plain.draft_tokens == plain.accepted_draft_tokens == 0
    assert stats.draft_tokens > stats.accepted_draft_tokens > 0, stats
    assert stats.steps <= plain.steps
    assert stats.prompt_tokens == plain.prompt_tokens


MIXED = {
    "roomy": {},
    "micro-batches": {"micro_batches": 2},
    "preemption": {"blocks": 26},
    "preemption, no prefix cache": {"blocks": 26, "enable_prefix_caching": False, "micro_batches": 2},
    "chunks": {"max_num_batched_tokens": 7, "max_num_seqs": 4},
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_load(trunk: Trunk, name: str) -> None:
    kinds = list(KINDS.values())
    requests = [Request(f"r{i}", prompt, kinds[i % len(kinds)]) for i, prompt in enumerate(prompts(14))]
    requests = [replace(r, sampling=replace(r.sampling, seed=i)) for i, r in enumerate(requests)]
    without, _ = answers(trunk, requests)
    options = MIXED[name]
    with_drafts, stats = answers(trunk, requests, **DRAFTS, **options)
    assert_same(with_drafts, without)
    assert stats.draft_tokens > stats.accepted_draft_tokens > 0
    assert (stats.preemptions > 0) == ("preemption" in name)
    assert any(a.num_events < len(a.token_ids) for a in with_drafts.values())


def test_a_replayed_stream_goes_on_as_before(trunk: Trunk) -> None:
    sampling = KINDS["sampled"]
    whole, _ = answers(trunk, [Request("r", prompts(2)[1], sampling)])
    tokens = whole["r"].token_ids
    for given in (1, 13, 40, 59):
        rest, stats = answers(trunk, [Request("r", prompts(2)[1], sampling, tokens[:given])], **DRAFTS)
        assert tokens[:given] + rest["r"].token_ids == tokens
        assert stats.generated_tokens == 60 - given


def test_drafts_pay_in_steps_where_the_text_goes_round(trunk: Trunk) -> None:
    requests = [Request("r", (9, 8, 7), replace(GREEDY, logit_bias={11: 100.0}))]
    _, plain = answers(trunk, requests)
    _, stats = answers(trunk, requests, **DRAFTS)
    assert plain.steps == 60
    assert stats.steps < 20
    assert stats.accepted_draft_tokens / stats.draft_tokens > 0.9


@pytest.fixture(scope="module")
def readable(directory: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with the demo's tokenizer: its tokens are special ones and single characters."""
    copy = shutil.copytree(directory, tmp_path_factory.mktemp("readable") / "model")
    shutil.copy(demo_model / "tokenizer.json", copy)
    return copy


@pytest.fixture(scope="module")
def tokenizer(readable: Path) -> Tokenizer:
    return Tokenizer(readable)


def test_stop_strings_cut_where_they_would_token_by_token(readable: Path) -> None:
    plain, guessing = (
        LLM(readable, dtype="float32", engine={"kv_cache_gib": 0.01, "prompt_lookup_min": 1, "speculative": mode})
        for mode in ("off", "ngram")
    )
    letters = dict.fromkeys(range(20, 96), 3.0)  # text, not the special tokens before
    base = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, logprobs=0, logit_bias=letters)
    prompt = [30, 31, 32, 33] * 4
    whole = plain.generate(prompt, base)[0].text
    assert len(whole) == 60
    stops = sorted({whole[at : at + length] for at in range(0, 50, 3) for length in (1, 2, 5)})
    params = [replace(base, stop=(stop,), include_stop_str_in_output=i % 2 == 0) for i, stop in enumerate(stops)]
    many = [[*prompt] for _ in params]
    wanted, found = ([outline(o) for o in llm.generate(many, params)] for llm in (plain, guessing))
    assert found == wanted
    assert {finish for _, _, finish, _ in wanted} == {"stop"}
    assert guessing.stats.accepted_draft_tokens > 10
    assert "".join(guessing.stream(prompt, params[1])) == wanted[1][0]


def outline(output: RequestOutput) -> tuple[str, list[int], str | None, list[int]]:
    return output.text, output.token_ids, output.finish_reason, [entry.token_id for entry in output.logprobs]


@pytest.mark.parametrize("seed", range(20))
def test_a_response_is_the_same_however_many_tokens_come_in_a_step(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(30, 34) for _ in range(40)]
    stop = tokenizer.decode([rng.randrange(30, 34) for _ in range(rng.choice([1, 3, 4]))])
    params = SamplingParams(stop=(stop,) if seed % 5 else (), stop_token_ids=(33,), logprobs=0)
    request = Request("r", (30,), params)
    whole = [TokenEvent("r", (t,), (TokenLogprobs(t, -1.0),)) for t in tokens]
    whole[-1] = replace(whole[-1], finish_reason="stop", stop_token_id=tokens[-1])

    def told(sizes: list[int]) -> tuple[Any, ...]:
        choice, at = ChoiceOutput(tokenizer, request), 0
        while choice.finish_reason is None:
            part = whole[at : at + sizes[at]]
            event = replace(part[-1], token_ids=tuple(t for e in part for t in e.token_ids))
            choice.take(replace(event, logprobs=tuple(x for e in part for x in e.logprobs)))
            at += sizes[at]
        visible = choice.logprobs[: choice.num_visible]
        return "".join(choice.text), visible, choice.num_tokens, choice.finish_reason, choice.stop_reason

    assert told([rng.randint(2, 6) for _ in tokens]) == told([1] * len(tokens))


def test_the_options_name_themselves() -> None:
    with pytest.raises(ConfigError, match=r"`engine\.prompt_lookup_min`.*at most prompt_lookup_max \(1\), got 2"):
        load_config({"engine": {"prompt_lookup_max": 1}})
    with pytest.raises(ConfigError, match=r"`engine\.num_speculative_tokens`"):
        load_config({"engine": {"num_speculative_tokens": 17}})
    with pytest.raises(ConfigError, match=r"`engine\.speculative`.*'off', 'ngram', 'draft' or 'auto'"):
        load_config({"engine": {"speculative": "eagle"}})
    for engine, message in (
        ({"speculative": "draft"}, "`engine.draft_model`: .*name the model that drafts"),
        ({"draft_model": "a/b"}, "`engine.draft_model`: .*speculative is off"),
        ({"speculative": "auto", "draft_quantize": "int8"}, "`engine.draft_quantize`: .*no draft_model"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config({"engine": engine})
    assert load_config().engine.speculative == "off"
    assert load_config({"engine": {"prompt_lookup_max": 1, "prompt_lookup_min": 1}}).engine.prompt_lookup_max == 1
