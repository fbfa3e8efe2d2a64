"""A step waits for a card once, whatever its sequences ask for, with the tokens of a sampler that always waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_waits import Waits, host_waits
from stepping import events_of
from waiting_sampler import sample as sample_waiting

from moe_ray.core import Batch, Request, SamplingParams, Sequence
from moe_ray.engine import engine as engines
from moe_ray.engine import sampler
from moe_ray.engine.adjustments import GrammarMasks
from moe_ray.engine.draws import TOP_CANDIDATES
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.sampler import NO_TOKEN, sample
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.trunk import Trunk

torch.set_num_threads(1)
VOCAB, EOS = 3 * TOP_CANDIDATES, frozenset({2})
KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, logprobs=5),
    SamplingParams(),
    SamplingParams(temperature=0.6, logprobs=0),
    SamplingParams(top_k=5),
    SamplingParams(top_k=1500),
    SamplingParams(top_p=0.7),
    SamplingParams(top_p=0.99, temperature=2.0, logprobs=20),
    SamplingParams(top_p=0.0),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1e-4, temperature=2.0),
    SamplingParams(top_k=40, top_p=0.9, min_p=0.02, temperature=0.8),
    SamplingParams(typical_p=0.6),
    SamplingParams(top_k=60, typical_p=0.9, temperature=1.2),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, top_p=0.9),
    SamplingParams(repetition_penalty=0.8, temperature=0),
    SamplingParams(logit_bias={3: 5.0, 9: -100.0}),
    SamplingParams(min_tokens=6, max_tokens=9, stop_token_ids=(5,)),
    SamplingParams(allowed_token_ids=(7, 9, 30), logit_bias={5: 100.0}, min_tokens=6, stop_token_ids=(7,)),
    SamplingParams(bad_words_ids=((4,), (8, 8, 3)), temperature=0.1),
]


def sequences(kinds: list[SamplingParams], rng: random.Random) -> list[Sequence]:
    made = []
    for number, kind in enumerate(kinds):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
        output = [rng.choice([3, 8, 8, rng.randrange(VOCAB)]) for _ in range(rng.randrange(9))]
        params = replace(kind, seed=rng.getrandbits(60))
        made.append(Sequence(Request(str(number), tuple(prompt), params), [*prompt, *output]))
    return made


def logits_of(rows: int, kind: str, seed: int) -> torch.Tensor:
    scale = {"spiky": 3.0, "flat": 0.03, "ties": 1.0}[kind]
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    return (2 * logits).round() / 2 if kind == "ties" else logits


def some_masks(group: list[Sequence], rng: random.Random) -> tuple[GrammarMasks, list[int]]:
    """Masks of every third row, and which of these rows may become no token: one at most, of which nothing is told."""
    masked = sorted(rng.sample(range(len(group)), len(group) // 3))
    bits = np.random.default_rng(3).integers(0, 2**32, (len(masked), VOCAB // 32 + 1), np.uint32)
    silent = [i for i, row in enumerate(masked) if group[row].request.sampling.logprobs is None][:1]
    bits[silent] = 0
    return GrammarMasks(masked, bits), [masked[i] for i in silent]


@pytest.mark.parametrize("kind", ["spiky", "flat", "ties"])
@pytest.mark.parametrize("grammar", [False, True], ids=["", "grammar"])
@pytest.mark.parametrize("free", [False, True], ids=["card", "cpu"])
@torch.inference_mode()
def test_tokens_are_those_of_a_sampler_that_waits(
    kind: str, grammar: bool, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kinds in one batch, in batches of one kind, and behind drafts; and what is told of them."""
    monkeypatch.setattr(sampler, "reads_are_free", lambda device: free)
    rng = random.Random(4)
    for kinds in (KINDS * 2, *([each] * 3 for each in KINDS)):
        rows = len(kinds)
        group, logits = sequences(kinds, rng), logits_of(rows, kind, rng.randrange(999))
        drafts = [[rng.randrange(9) for _ in range(rng.randrange(3))] for _ in range(rows)]
        masks, without = some_masks(group, rng) if grammar else (None, [])
        for ahead in ([], drafts):
            before = logits.clone()
            got = sample(logits, group, EOS, ahead, masks)
            wanted = sample_waiting(logits, group, EOS, ahead, masks)
            assert got == wanted
            assert torch.equal(logits, before)
            assert [i for i, token in enumerate(got.token_ids) if token == NO_TOKEN] == without


@pytest.mark.parametrize("kind", [*KINDS, None], ids=lambda kind: str(KINDS.index(kind)) if kind else "all")
@pytest.mark.parametrize("grammar", [False, True], ids=["", "grammar"])
@torch.inference_mode()
def test_sampling_waits_once(kind: SamplingParams | None, grammar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "reads_are_free", lambda device: False)
    rng = random.Random(5)
    kinds = KINDS if kind is None else [kind] * 3
    group = sequences(kinds, rng)
    masks = some_masks(group, rng)[0] if grammar else None
    for shape in ("spiky", "flat"):
        logits = logits_of(len(kinds), shape, 6)
        with host_waits() as waits:
            sample(logits, group, EOS, [], masks)
        assert waits == Waits(readbacks=1)


def test_a_row_without_a_token_is_told_nothing_of() -> None:
    group = sequences([SamplingParams(logprobs=2), SamplingParams(logprobs=2)], random.Random(1))
    masks = GrammarMasks([1], np.zeros((1, VOCAB // 32 + 1), np.uint32))
    got = sample(logits_of(2, "spiky", 1), group, masks=masks)
    assert got.token_ids[1] == NO_TOKEN
    assert got.logprobs[0] is not None
    assert got.logprobs[1] is None


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.to("cpu"),
        lambda x: bool(x[0] > 1),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 1),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.index_put_((x > 1,), torch.tensor(0.0)),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: sample_waiting(x[None], sequences([SamplingParams(temperature=0)], random.Random(1))),
    ],
)
def test_what_waits_is_noticed_by_these_tests(wait: Callable[[torch.Tensor], Any]) -> None:
    values = torch.arange(float(VOCAB))
    with host_waits() as waits:
        wait(values)
    assert waits.others


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_step_of_an_engine_waits_once(random_model: Path, draft_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all of its sequences, log-probabilities of prompts, and drafts."""
    monkeypatch.setattr(sampler, "reads_are_free", lambda device: False)
    counted: list[Waits] = []
    inner = engines.step_tokens

    def step_tokens(batch: Batch, logits: torch.Tensor, ends: frozenset[int]) -> Any:
        with host_waits() as waits:
            found = inner(batch, logits, ends)
        counted.append(waits)
        return found

    monkeypatch.setattr(engines, "step_tokens", step_tokens)
    checkpoint, compute = Checkpoint.open(random_model), Compute(Backend("float32"))
    trunk = Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 64)
    limits = SchedulerLimits(max_num_batched_tokens=32, num_speculative_tokens=draft_tokens)
    engine = Engine(trunk, EngineOptions(300, 4, limits, 64))
    rng, requests = random.Random(2), list[Request]()
    for number, kind in enumerate(KINDS):
        prompt = tuple(rng.randrange(3, 6) for _ in range(rng.randint(1, 24)))
        params = replace(kind, max_tokens=9, seed=number, prompt_logprobs=2 if number % 3 == 0 else None)
        requests.append(Request(str(number), prompt, params))
    events = events_of(engine, requests, [1] * len(requests))
    assert all(any(event.prompt_logprobs for event in events[str(number)]) for number in (3, 6, 9))
    assert len(counted) > 10
    assert counted == [Waits(readbacks=1)] * len(counted)
