"""Every model family computes what transformers computes, however its work is cut up, and refuses what it does not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from random_families import CASES, LONGROPE, SHAPE, save_random_family
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_ray.core import Request, SamplingParams, TokenLogprobs
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.errors import CheckpointError
from moe_ray.experts.local import local_experts
from moe_ray.llm import LLM
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute, open_compute
from moe_ray.model.compute.resolve import Backend, Wanted
from moe_ray.model.families import FAMILIES
from moe_ray.model.foreign import SINGLE
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.moe import sparse_mixer
from moe_ray.model.surplus import check_surplus
from moe_ray.model.trunk import Trunk
from moe_ray.model.weights import weights_of_model
from moe_ray.native.build import kernels_here

NEW_TOKENS = 8
PROMPTS = [tuple(torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (9, 40)]
CACHE = Path.home() / ".cache" / "moe-ray"


@dataclass(frozen=True)
class Case:
    """A random model, and what transformers says of it."""

    name: str
    directory: Path
    tokens: list[list[int]]
    logprobs: list[torch.Tensor]  # of each prompt [NEW_TOKENS, V]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = save_random_family(tmp_path_factory.mktemp("family"), request.param)
    return Case(request.param, directory, *transformers_says(directory))


def trunk_of(directory: Path, compute: Compute | None = None) -> Trunk:
    compute = compute or Compute(Backend("float32"))
    checkpoint = Checkpoint.open(directory)
    return Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 128)


def generate(engine: Engine) -> tuple[list[list[int]], list[list[TokenLogprobs]]]:
    """Greedy tokens after each prompt, and the likeliest ones at each position with their log-probabilities."""
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    likeliest: list[list[TokenLogprobs]] = [[] for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=20)
        engine.submit(Request(str(i), prompt, sampling))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens[int(event.request_id)] += event.token_ids
            likeliest[int(event.request_id)] += event.logprobs
        engine.check_integrity()
    return tokens, likeliest


def transformers_says(directory: Path) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens after each prompt, and the log-probabilities at their positions, [NEW_TOKENS, V]."""
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    tokens, logits = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0},
                **{"output_logits": True, "return_dict_in_generate": True},
            )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(out.logits).log_softmax(-1))
    return tokens, logits


def assert_same(engine: Engine, case: Case) -> None:
    tokens, likeliest = generate(engine)
    assert tokens == case.tokens
    for found, theirs in zip(likeliest, case.logprobs, strict=True):
        assert len(found) == NEW_TOKENS
        for position, row in zip(found, theirs, strict=True):
            ids, ours = zip(*position.top, strict=True)
            torch.testing.assert_close(torch.tensor(ours), row[list(ids)], rtol=0, atol=1e-4)


def test_torch_computes_what_transformers_does(case: Case) -> None:
    assert case.tokens[0] != case.tokens[1]
    check_surplus(Checkpoint.open(case.directory))
    limits = SchedulerLimits(max_num_batched_tokens=11)
    engine = Engine(trunk_of(case.directory), EngineOptions(64, 4, limits, max_model_len=96, micro_batches=2))
    assert_same(engine, case)
    assert_same(engine, case)
    assert engine.stats().prefix_hit_tokens > 0


@pytest.mark.skipif(kernels_here() is None, reason="this CPU has no native kernels")
def test_native_kernels_compute_what_transformers_does(case: Case) -> None:
    compute = open_compute(ModelConfig.load(case.directory), Wanted("float32", "cpu", "auto"), CACHE)
    assert compute.backend.experts == "native"
    assert compute.backend.trunk == ("torch" if "phimoe" in case.name else "native")
    assert_same(Engine(trunk_of(case.directory, compute), EngineOptions(64, 8, max_model_len=96)), case)
    assert ("LayerNorm, SparseMixer" in compute.backend.slower_because) == ("phimoe" in case.name)


def test_the_layout_that_transformers_holds(case: Case, tmp_path: Path) -> None:
    if "," in case.name or not ModelConfig.load(case.directory).routed:
        pytest.skip("dense, or the tensors of another case")
    theirs = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float32)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / SINGLE))
    assert_same(Engine(trunk_of(tmp_path), EngineOptions(64, 8, max_model_len=96)), case)


def test_no_layout_names_two_weights_alike() -> None:
    for case in CASES:
        config = ModelConfig.from_dict(raw_config(case.partition(",")[0]))
        weights = list(weights_of_model(config))
        for layout in config.family.layouts:
            assert len({layout.place(weight, config.num_local_experts) for weight in weights}) == len(weights)


def test_llm_without_a_tokenizer_file(tmp_path: Path) -> None:
    save_random_family(tmp_path, "qwen2_moe")
    with pytest.raises(CheckpointError, match="tokenizer"):
        LLM(tmp_path)


def raw_config(model_type: str) -> dict[str, Any]:
    case = next(case for case in CASES if case.partition(",")[0] == model_type)
    return {"model_type": model_type, **SHAPE, **CASES[case]}


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, "`mlp_only_layers` is [0]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "`decoder_sparse_step` is 2"),
        ("qwen2_moe", {"use_sliding_window": True}, "`use_sliding_window` is True"),
        ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "`layer_types`"),
        ("qwen2_moe", {"norm_topk_prob": 1}, "`norm_topk_prob` must be true or false"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "`shared_expert_intermediate_size`"),
        ("olmoe", {"clip_qkv": 8.0}, "`clip_qkv` is 8.0"),
        ("olmoe", {"sliding_window": 128}, "`sliding_window` is 128"),
        ("olmoe", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds num_experts 6"),
        ("granitemoe", {"shared_intermediate_size": 64}, "`shared_intermediate_size` is 64"),
        ("granitemoe", {"logits_scaling": 0}, "`logits_scaling` must be a positive number"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3, supported: 2"),
        ("phimoe", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("llama", {"mlp_bias": True}, "`mlp_bias` is True"),
        ("llama", {"num_local_experts": 8}, "`num_local_experts` is 8"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("mistral", {"attention_bias": True}, "`attention_bias` is True"),
        ("mixtral", {"qkv_bias": True, "num_local_experts": 8, "intermediate_size": 96}, "`qkv_bias` is True"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(model_type: str, changes: dict[str, Any], named: str) -> None:
    raw = {"model_type": "mixtral", **SHAPE} if model_type == "mixtral" else raw_config(model_type)
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict({**raw, **changes}, "there/config.json")
    assert "there/config.json" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    needed = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32, "vocab_size": 100}
    sizes = {"intermediate_size": 32, "moe_intermediate_size": 16}
    if model_type == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = 48
    theirs = AutoConfig.for_model(model_type, **needed, **sizes)
    ours = ModelConfig.from_dict({"model_type": model_type, **needed, **sizes})
    if model_type == "qwen3":
        assert ours.head_dim == theirs.head_dim
    for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or None)
    if ours.routed:
        assert ours.num_local_experts == getattr(theirs, "num_experts", None) or theirs.num_local_experts
        assert ours.num_experts_per_tok == theirs.num_experts_per_tok
    assert ours.router.renormalise == getattr(theirs, "norm_topk_prob", model_type != "phimoe")
    assert ours.router.jitter == getattr(theirs, "router_jitter_noise", None if model_type != "mixtral" else 0.0) or (
        model_type == "mixtral"
    )


def test_longrope_ends_where_its_frequencies_would_change(tmp_path: Path) -> None:
    save_random_family(tmp_path, "phimoe, longrope")
    config = ModelConfig.load(tmp_path)
    assert config.max_position_embeddings == LONGROPE["original_max_position_embeddings"]
    assert "longrope beyond `original_max_position_embeddings` 128" in config.context_limit
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_parameters"]["short_factor"] = [1.0]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="short_factor"):
        trunk_of(tmp_path)


def test_sparse_mixer_by_hand() -> None:
    logits = torch.tensor([[4.0, 3.9, 1.0, 3.6]])
    weights, experts = sparse_mixer(logits, 0.03)  # near: within 6 % of the larger magnitude
    assert experts.tolist() == [[0, 1]]
    near = torch.tensor([4.0, 3.9]).softmax(0)[0]
    assert weights[0].tolist() == pytest.approx([float(near), 1.0])
