"""The experts of each position: those of transformers' router, told once and in order, however the work is cut up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_mixtral import save_random_mixtral
from transformers import MixtralForCausalLM

from moe_ray.core import EngineStats, Request, RoutedExperts, SamplingParams
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.routed_experts import RoutedRows, as_array
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.errors import ProtocolError
from moe_ray.experts.local import local_experts
from moe_ray.llm import LLM
from moe_ray.model import moe
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.families import Router
from moe_ray.model.trunk import Trunk

torch.set_num_threads(1)
VOCAB, LAYERS, EXPERTS, TOP_K = 96, 2, 8, 3
DRAFTS = {"num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral whose output repeats itself, but not always: guesses come true and fail."""
    return save_random_mixtral(
        tmp_path_factory.mktemp("routed-mixtral"),
        seed=0,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # one that the native kernels know
        vocab_size=VOCAB,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=256,
        initializer_range=0.1,
    )


@pytest.fixture(scope="module")
def trunk(directory: Path) -> Iterator[Trunk]:
    checkpoint, compute = Checkpoint.open(directory), Compute(Backend("float32"))
    yield Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 256)
    checkpoint.close()


@pytest.fixture(scope="module")
def router(directory: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def theirs(router: MixtralForCausalLM, token_ids: list[int]) -> np.ndarray:
    """transformers' experts of each token, [T, L, K] ascending."""
    with torch.inference_mode():
        layers = router(torch.tensor([token_ids]), output_router_logits=True).router_logits
    return torch.stack([logits.topk(TOP_K, dim=-1).indices.sort(dim=-1).values for logits in layers], dim=1).numpy()


def ask(name: str, prompt: tuple[int, ...], wants: bool = True, tokens: int = 40, **sampling: Any) -> Request:
    kind = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, **sampling}
    return Request(name, prompt, SamplingParams(**kind, return_routed_experts=wants))


def run(trunk: Trunk, requests: list[Request], **options: Any) -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    """Tokens and experts of each request; two are added in each step."""
    engine = make(trunk, **options)
    return run_on(engine, requests)


def make(trunk: Trunk, blocks: int = 256, micro_batches: int = 1, **limits: Any) -> Engine:
    return Engine(trunk, EngineOptions(blocks, 8, SchedulerLimits(**limits), 200, micro_batches))


def run_on(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    tokens: dict[str, list[int]] = {r.request_id: [*r.prompt_token_ids, *r.output_token_ids] for r in requests}
    told: dict[str, list[RoutedExperts]] = {request.request_id: [] for request in requests}
    to_come = list(requests)
    while to_come or engine.has_work:
        for request in to_come[:2]:
            engine.submit(request)
        del to_come[:2]
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.token_ids
            if event.routed_experts is not None:
                told[event.request_id].append(event.routed_experts)
                assert event.routed_experts.start + event.routed_experts.shape[0] == len(tokens[event.request_id]) - 1
        engine.check_integrity()
    rows: dict[str, np.ndarray] = {}
    for request in requests:
        own = told[request.request_id]
        assert bool(own) == request.sampling.return_routed_experts
        if own:
            starts = [part.start for part in own]
            assert starts == [0, *np.cumsum([part.shape[0] for part in own])[:-1].tolist()], "each once, and in order"
            rows[request.request_id] = np.concatenate([as_array(part) for part in own])
    return tokens, rows


def assert_theirs(router: MixtralForCausalLM, tokens: dict[str, list[int]], rows: dict[str, np.ndarray]) -> None:
    for name, found in rows.items():
        assert found.shape == (len(tokens[name]) - 1, LAYERS, TOP_K), name
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, theirs(router, tokens[name][:-1]), err_msg=name)


def prompts(count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)

    def some(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    return [tuple(some(1 + i % 7) * 4 + some(i % 3) if i % 4 else some(20)) for i in range(count)]


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 7, "max_num_seqs": 4},
    "micro-batches": {"micro_batches": 2},
    "preemption": {"blocks": 26, "micro_batches": 2},
    "preemption, no prefix cache": {"blocks": 26, "enable_prefix_caching": False},
    "drafts": DRAFTS,
    "drafts, micro-batches, preemption": {**DRAFTS, "blocks": 26, "micro_batches": 2},
    "drafts, chunks": {**DRAFTS, "max_num_batched_tokens": 9},
}


@pytest.mark.parametrize("name", HOW)
def test_the_experts_are_those_of_transformers(trunk: Trunk, router: MixtralForCausalLM, name: str) -> None:
    engine = make(trunk, **HOW[name])
    tokens, rows = run_on(engine, [ask(f"r{i}", prompt, wants=i % 3 > 0) for i, prompt in enumerate(prompts(10))])
    assert list(rows) == [f"r{i}" for i in range(10) if i % 3]
    assert_theirs(router, tokens, rows)
    stats = engine.stats()
    assert (stats.preemptions > 0) == ("preemption" in name)
    assert (stats.draft_tokens > stats.accepted_draft_tokens > 0) == ("drafts" in name)


def test_asking_changes_no_token(trunk: Trunk) -> None:
    answers = [run(trunk, [ask(f"r{i}", p, wants) for i, p in enumerate(prompts(6))])[0] for wants in (False, True)]
    assert answers[0] == answers[1]


def test_sampled_tokens_and_an_early_end(trunk: Trunk, router: MixtralForCausalLM) -> None:
    likely = dict.fromkeys(range(10, 16), 4.0)
    stop = {"stop_token_ids": (12,), "min_tokens": 3}
    kinds = [{"temperature": 0.8, "seed": i, "logit_bias": likely, **(stop if i % 2 else {})} for i in range(6)]
    requests = [ask(f"r{i}", p, **kind) for i, (p, kind) in enumerate(zip(prompts(6), kinds, strict=True))]
    tokens, rows = run(trunk, requests, **DRAFTS)
    assert_theirs(router, tokens, rows)
    assert any(len(tokens[r.request_id]) < len(r.prompt_token_ids) + 40 for r in requests)


def test_what_the_prefix_cache_holds_is_computed_again(trunk: Trunk, router: MixtralForCausalLM) -> None:
    engine, prompt = make(trunk), prompts(1)[0] * 3
    run_on(engine, [ask("before", prompt, wants=False)])
    (hits, computed), stats = hits_and_prompt(engine.stats()), engine.stats
    tokens, rows = run_on(engine, [ask("asks", prompt)])
    assert_theirs(router, tokens, rows)
    assert hits_and_prompt(stats()) == (hits, computed + len(prompt))
    run_on(engine, [ask("after", prompt, wants=False)])
    assert hits_and_prompt(stats())[0] > hits, "who does not ask still takes what is there"


def hits_and_prompt(stats: EngineStats) -> tuple[int, int]:
    return stats.prefix_hit_tokens, stats.prompt_tokens


def test_after_preemption_the_prefix_cache_serves_what_is_known(trunk: Trunk, router: MixtralForCausalLM) -> None:
    engine = make(trunk, blocks=26)
    tokens, rows = run_on(engine, [ask(f"r{i}", prompt) for i, prompt in enumerate(prompts(10))])
    assert_theirs(router, tokens, rows)
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hit_tokens > 0


def test_a_replayed_request_is_told_from_its_beginning(trunk: Trunk, router: MixtralForCausalLM) -> None:
    prompt = prompts(2)[1]
    whole, whole_rows = run(trunk, [ask("r", prompt)])
    given = tuple(whole["r"][len(prompt) : len(prompt) + 13])
    request = ask("r", prompt)
    tokens, rows = run(trunk, [Request("r", prompt, request.sampling, given)])
    assert tokens == whole
    np.testing.assert_array_equal(rows["r"], whole_rows["r"])
    known = RoutedRows()
    known.take(of(whole_rows["r"][:20], 0))
    known.take(of(rows["r"][:25], 0))
    known.take(of(rows["r"][25:], 25))
    assert known.count == len(whole["r"]) - 1
    np.testing.assert_array_equal(known.rows(0, 10**6), theirs(router, whole["r"][:-1]))
    np.testing.assert_array_equal(known.rows(19, 22), rows["r"][19:22])


def of(rows: np.ndarray, start: int) -> RoutedExperts:
    return RoutedExperts(start, rows.shape, rows.tobytes())  # type: ignore[arg-type]


def test_nobody_asks_and_nothing_is_looked_at(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(routed: moe.Routed) -> np.ndarray:
        raise AssertionError("the experts of a batch were looked up for nobody")

    monkeypatch.setattr(moe, "experts_of", never)
    run(trunk, [ask("r", (5, 6, 7), wants=False)])
    with pytest.raises(AssertionError, match="for nobody"):
        run(trunk, [ask("r", (5, 6, 7))])


def test_experts_of_is_the_inverse_of_grouping() -> None:
    torch.manual_seed(1)
    for experts, top_k in ((8, 2), (5, 5), (300, 4), (16, 1)):
        chosen, weights = moe.route(torch.randn(30, 12), torch.randn(experts, 12), top_k, Router(renormalise=True))
        routed = moe.group(torch.randn(30, 12), chosen, weights, experts)
        np.testing.assert_array_equal(moe.experts_of(routed), chosen.numpy())


def test_more_than_256_experts_take_two_bytes() -> None:
    rows = np.array([[[1, 256]], [[257, 65535]]], "<u2")
    np.testing.assert_array_equal(as_array(of(rows, 3)), rows)
    known = RoutedRows()
    assert known.rows(0, 9).shape == (0, 0, 0)
    known.take(of(rows, 0))
    np.testing.assert_array_equal(known.rows(1, 9), rows[1:])


@pytest.mark.parametrize(
    "told",
    [
        RoutedExperts(2, (1, 2, 2), bytes(4)),  # position 1 is left out
        RoutedExperts(1, (1, 2, 2), bytes(5)),
        RoutedExperts(1, (1, 2, 2), b""),
        RoutedExperts(1, (0, 2, 2), b""),
        RoutedExperts(1, (1, 2, 1), bytes(2)),
        RoutedExperts(1, (1, 2, 2), bytes(8)),  # two bytes each, where it was one
    ],
)
def test_what_does_not_fit_is_a_protocol_error(told: RoutedExperts) -> None:
    known = RoutedRows()
    known.take(RoutedExperts(0, (1, 2, 2), bytes(4)))
    with pytest.raises(ProtocolError):
        known.take(told)


@pytest.fixture(scope="module")
def readable(directory: Path, demo_model: Path) -> Path:
    (directory / "tokenizer.json").write_bytes((demo_model / "tokenizer.json").read_bytes())
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offline_generation_returns_an_array(readable: Path, router: MixtralForCausalLM, dtype: str) -> None:
    engine = {"kv_cache_gib": 0.01, "prompt_lookup_min": 1, "speculative": "ngram"}
    llm = LLM(readable, dtype=dtype, engine=engine)
    letters = dict.fromkeys(range(20, 96), 3.0)
    base = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, "logit_bias": letters}
    prompt = [30, 31, 32, 33] * 4
    text = llm.generate(prompt, SamplingParams(**base))[0].text
    stops = (text[17], text[9:12])
    params = [SamplingParams(**base, return_routed_experts=True, stop=(stop,)) for stop in stops]
    plain, *outputs = llm.generate([prompt] * 3, [SamplingParams(**base), *params])
    assert plain.routed_experts is None
    for output in outputs:
        assert output.finish_reason == "stop"
        assert output.num_cached_tokens == 0
        assert output.routed_experts is not None
        token_ids = [*output.prompt_token_ids, *output.token_ids][:-1]
        assert output.routed_experts.shape == (len(token_ids), LAYERS, TOP_K)
        same = (output.routed_experts == theirs(router, token_ids)).mean()
        assert same == 1 if dtype == "float32" else same > 0.9, "an undecided router may choose otherwise in bfloat16"
