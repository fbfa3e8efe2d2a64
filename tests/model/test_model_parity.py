"""Parity: fp32 greedy output through the engine equals transformers' token for token, however the work is cut up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_ray.core import Batch, Request, SamplingParams, Sequence
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.kv_cache import KVCache
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.layers import rope_table
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk import Trunk, interleave

torch.set_num_threads(1)  # a second thread only waits for the first on models this small
NEW_TOKENS = 64
Prompts = list[tuple[int, ...]]


@dataclass(frozen=True)
class Reference:
    """Prompts and what transformers continues them with."""

    prompts: Prompts
    outputs: list[list[int]]


def random_prompts(lengths: list[int], each: int, vocab: int = 512) -> Prompts:
    generator = torch.Generator().manual_seed(7)
    return [tuple(torch.randint(3, vocab, (n,), generator=generator).tolist()) for n in lengths for _ in range(each)]


def transformers_greedy(directory: Path, prompts: Prompts, new_tokens: int) -> Reference:
    """`generate` of transformers, prompts of one length at a time so that nothing is padded."""
    model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs: list[list[int]] = [[]] * len(prompts)
    for length in {len(p) for p in prompts}:
        rows = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] for i in rows])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        for i, row in zip(rows, out[:, length:].tolist(), strict=True):
            outputs[i] = row
    assert {len(o) for o in outputs} == {new_tokens}
    return Reference(prompts, outputs)


@pytest.fixture(scope="session")
def reference(random_model: Path) -> Reference:
    return transformers_greedy(random_model, random_prompts([1, 9, 32, 77], 5), NEW_TOKENS)


class Parts:
    """Trunk and in-process experts of one checkpoint, from which engines of any options are made."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        checkpoint = Checkpoint.open(directory)
        compute = Compute(Backend(str(dtype).removeprefix("torch."), device))
        self.pool = local_experts(checkpoint, compute)
        self.trunk = Trunk.load(checkpoint, self.pool, compute, 512)

    def engine(
        self, blocks: int = 512, block_size: int = 16, micro_batches: int = 1, max_model_len: int = 160, **limits: Any
    ) -> Engine:
        options = EngineOptions(blocks, block_size, SchedulerLimits(**limits), max_model_len, micro_batches)
        return Engine(self.trunk, options)


@pytest.fixture(scope="session")
def parts(random_model: Path) -> Parts:
    return Parts(random_model)


def greedy(index: int, prompt: tuple[int, ...], new_tokens: int) -> Request:
    return Request(str(index), prompt, SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True))


def generate(
    engine: Engine, requests: list[Request], every: int = 0, neighbours: list[Request] | None = None
) -> dict[str, list[int]]:
    """Run requests to their end; with `every`, one arrives each so many steps, else all at once."""
    outputs: dict[str, list[int]] = {}
    to_come, steps = [*(neighbours or []), *requests], 0
    while to_come or engine.has_work:
        while to_come and (not every or steps % every == 0):
            outputs[to_come[0].request_id] = []
            engine.submit(to_come.pop(0))
            if every:
                break
        for event in engine.step():
            assert event.error is None
            outputs[event.request_id] += event.token_ids
        engine.check_integrity()
        steps += 1
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total
    return outputs


def assert_parity(engine: Engine, reference: Reference, **how: Any) -> None:
    count = len(reference.outputs[0])
    requests = [greedy(i, prompt, count) for i, prompt in enumerate(reference.prompts)]
    outputs = generate(engine, requests, **how)
    for i, expected in enumerate(reference.outputs):
        assert outputs[str(i)] == expected, f"prompt {i} of {len(reference.prompts[i])} tokens"


def test_the_reference_is_worth_comparing_with(reference: Reference) -> None:
    assert len(reference.outputs) >= 20
    assert len({tuple(output) for output in reference.outputs}) == len(reference.outputs)
    assert sum(len(set(output)) for output in reference.outputs) / len(reference.outputs) > 30, "it repeats itself"


def test_plain(parts: Parts, reference: Reference) -> None:
    engine = parts.engine()
    assert_parity(engine, reference)
    stats = engine.stats()
    assert stats.prompt_tokens == sum(len(p) for p in reference.prompts)
    assert stats.generated_tokens == 20 * NEW_TOKENS
    assert stats.preemptions == stats.prefix_hit_tokens == 0


def test_chunked_prefill(parts: Parts, reference: Reference) -> None:
    engine = parts.engine(max_num_batched_tokens=23)
    assert_parity(engine, reference)
    assert engine.stats().prompt_tokens == sum(len(p) for p in reference.prompts)


def test_micro_batches(parts: Parts, reference: Reference) -> None:
    assert_parity(parts.engine(micro_batches=3, max_num_batched_tokens=50), reference)


def test_preemption_in_a_tiny_cache(parts: Parts, reference: Reference) -> None:
    engine = parts.engine(blocks=80, block_size=4, enable_prefix_caching=False)
    assert_parity(engine, reference)
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hit_tokens == 0


def test_preemption_with_recovery_from_the_prefix_cache(parts: Parts, reference: Reference) -> None:
    engine = parts.engine(blocks=80, block_size=4, micro_batches=2)
    assert_parity(engine, reference)
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hit_tokens > 0


def test_prefix_cache(parts: Parts, reference: Reference) -> None:
    engine = parts.engine(block_size=8)
    assert_parity(engine, reference)
    assert engine.stats().prefix_hit_tokens == 0
    assert_parity(engine, reference)
    assert engine.stats().prefix_hit_tokens == sum((len(p) - 1) // 8 * 8 for p in reference.prompts)
    # what another request generated serves as prompt
    middle = [
        greedy(i, (*prompt, *output[:40]), NEW_TOKENS - 40)
        for i, (prompt, output) in enumerate(zip(reference.prompts, reference.outputs, strict=True))
    ]
    before = engine.stats().prefix_hit_tokens
    outputs = generate(engine, middle)
    assert engine.stats().prefix_hit_tokens - before >= 20 * 40
    assert [outputs[str(i)] for i in range(20)] == [output[40:] for output in reference.outputs]


def test_staggered_arrivals(parts: Parts, reference: Reference) -> None:
    assert_parity(parts.engine(max_num_seqs=6, max_num_batched_tokens=40), reference, every=3)


def test_sampled_neighbours_change_nothing(parts: Parts, reference: Reference) -> None:
    def sampled() -> list[Request]:
        kinds = [{"top_p": 0.9}, {"top_k": 5}, {}, {"presence_penalty": 1.0}, {"logit_bias": {5: 3.0}, "logprobs": 2}]
        return [
            Request(f"n{i}", (7, i + 3), SamplingParams(max_tokens=40, seed=i, ignore_eos=True, **kind))  # type: ignore[arg-type]
            for i, kind in enumerate(kinds)
        ]

    alone = generate(parts.engine(), sampled())
    requests = [greedy(i, prompt, NEW_TOKENS) for i, prompt in enumerate(reference.prompts)]
    mixed = generate(parts.engine(micro_batches=2), requests, neighbours=sampled())
    assert [mixed[str(i)] for i in range(20)] == reference.outputs
    assert {name: mixed[name] for name in alone} == alone, "a sampled stream depends on who runs beside it"


def test_a_replayed_stream_goes_on_as_it_would_have(parts: Parts, reference: Reference) -> None:
    for given in (1, 17, NEW_TOKENS - 1):
        requests = [
            Request(r.request_id, r.prompt_token_ids, r.sampling, tuple(output[:given]))
            for r, output in zip(
                [greedy(i, p, NEW_TOKENS) for i, p in enumerate(reference.prompts)], reference.outputs, strict=True
            )
        ][::4]
        outputs = generate(parts.engine(), requests)
        for request in requests:
            assert outputs[request.request_id] == reference.outputs[int(request.request_id)][given:]
    sampling = SamplingParams(max_tokens=30, seed=5, top_p=0.95, ignore_eos=True, frequency_penalty=0.5)
    whole = generate(parts.engine(), [Request("a", (9, 8), sampling)])["a"]
    rest = generate(parts.engine(), [Request("a", (9, 8), sampling, tuple(whole[:11]))])["a"]
    assert whole[:11] + rest == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_on_cuda(random_model: Path, reference: Reference, micro_batches: int) -> None:
    engine = Parts(random_model, device="cuda").engine(micro_batches=micro_batches, max_num_batched_tokens=50)
    assert_parity(engine, reference)
    assert_parity(engine, reference)
    assert engine.stats().prefix_hit_tokens > 0


BASE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "sliding window": {"sliding_window": 24},
    "tied embeddings": {"tie_word_embeddings": True},
    "head_dim 16": {"head_dim": 16},
    "as many kv heads": {"num_key_value_heads": 6},
    "one kv head": {"num_key_value_heads": 1},
    "4 experts, top 3": {"num_local_experts": 4, "num_experts_per_tok": 3},
    "16 experts, top 1": {"num_local_experts": 16, "num_experts_per_tok": 1},
    "all experts": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "intermediate 20": {"intermediate_size": 20},
    "gelu": {"hidden_act": "gelu"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "yarn": {
        "head_dim": 8,  # transformers' own yarn fails where it is left out
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            **LLAMA3,
        }
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    MixtralForCausalLM(MixtralConfig(**{**BASE, **VARIANTS[name]})).save_pretrained(tmp_path)
    reference = transformers_greedy(tmp_path, random_prompts([3, 40], 3, 256), 24)
    parts = Parts(tmp_path)
    assert_parity(parts.engine(), reference)
    chunked = parts.engine(blocks=40, block_size=4, max_num_batched_tokens=19, micro_batches=2)
    assert_parity(chunked, reference)
    assert_parity(chunked, reference)
    assert chunked.stats().prefix_hit_tokens > 0


def test_yarn_without_a_head_dim(tmp_path: Path) -> None:
    torch.manual_seed(3)
    MixtralForCausalLM(MixtralConfig(**{**BASE, **VARIANTS["yarn"]})).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    tables = []
    for head_dim in (8, None):
        config = ModelConfig.from_dict({**raw, "head_dim": head_dim})
        tables.append(rope_table(config, 100, torch.float32, torch.device("cpu")))
    assert torch.equal(*tables)


def last_logits(parts: Parts, prompts: Prompts) -> torch.Tensor:
    """Logits [S, V] after each prompt, from one batch straight through the trunk."""
    size, config = 16, parts.trunk.config
    batch = Batch([], [], [], [], [0], [], [])
    for prompt in prompts:
        seq, used = Sequence(Request("r", prompt, SamplingParams()), list(prompt)), batch.num_tokens
        first = sum(len(s.block_table) for s in batch.sequences)
        seq.block_table = list(range(first, first - (-len(prompt) // size)))
        batch.sequences.append(seq)
        batch.token_ids += prompt
        batch.positions += range(len(prompt))
        batch.slot_mapping += range(first * size, first * size + len(prompt))
        batch.query_start.append(used + len(prompt))
        batch.context_lens.append(len(prompt))
        batch.num_sampled.append(1)
    blocks = sum(len(s.block_table) for s in batch.sequences)
    cache = KVCache(config, blocks, size, parts.trunk.dtype, parts.trunk.device)
    with torch.inference_mode():
        return interleave([parts.trunk.forward(batch, cache)])[0]


def transformers_logits(directory: Path, dtype: torch.dtype, prompts: Prompts) -> torch.Tensor:
    model = MixtralForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([p])).logits[0, -1].float() for p in prompts])


def test_fp32_logits(parts: Parts, reference: Reference, random_model: Path) -> None:
    theirs = transformers_logits(random_model, torch.float32, reference.prompts)
    torch.testing.assert_close(last_logits(parts, reference.prompts), theirs, rtol=1e-4, atol=1e-4)


def test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(random_model: Path, reference: Reference) -> None:
    prompts = reference.prompts
    exact = transformers_logits(random_model, torch.float32, prompts)
    theirs = transformers_logits(random_model, torch.bfloat16, prompts)
    ours = last_logits(Parts(random_model, torch.bfloat16), prompts)

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        # the median over prompts: a router that is undecided may take another expert after rounding
        return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).median())

    rounding = distance(theirs, exact)
    assert 0 < rounding < 0.2
    assert distance(ours, exact) < 1.5 * rounding
    assert distance(ours, theirs) < 2 * rounding
