"""Every model family computes what transformers computes, however its work is cut up, and refuses what it does not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_family
from random_families import CASES, LONGROPE, SHAPE, save_random_family
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from moe_ray.config import load_config
from moe_ray.core import Request, SamplingParams, TokenLogprobs
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.errors import CheckpointError
from moe_ray.experts.local import local_experts
from moe_ray.hub import resolve_model
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


def transformers_says(directory: Path, **options: Any) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens after each prompt, and the log-probabilities at their positions, [NEW_TOKENS, V]."""
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
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


IN_GGUF = {
    "qwen3_moe": ("qwen3moe", {}),
    "qwen2_moe": ("qwen2moe", {}),
    "qwen2_moe, renormalised, no biases": ("qwen2moe", {"expert_weights_norm": True}),
    "olmoe": ("olmoe", {}),
    "olmoe, clipped": ("olmoe", {}),
    "granitemoe": ("granitemoe", {}),
}
"""Case → llama.cpp's architecture, and flags beside what its converter writes."""


def test_a_gguf_file_of_it(case: Case, tmp_path: Path) -> None:
    if case.name not in IN_GGUF:
        pytest.skip("no architecture of GGUF files that is read")
    architecture, flags = IN_GGUF[case.name]
    path = write_family(case.directory, tmp_path / "model.gguf", architecture, **flags)
    directory = resolve_model(load_config({"model": {"path": str(path)}, "cache_dir": str(tmp_path / "cache")}))
    theirs, ours = ModelConfig.load(case.directory), ModelConfig.load(directory)
    assert (ours.family, ours.router, ours.head_dim) == (theirs.family, theirs.router, theirs.head_dim)
    check_surplus(Checkpoint.open(directory))
    assert_same(Engine(trunk_of(directory), EngineOptions(64, 8, max_model_len=96)), case)


def test_a_gguf_file_of_phimoe_is_refused(tmp_path: Path) -> None:
    save_random_family(tmp_path, "qwen3_moe")
    path = write_family(tmp_path, tmp_path / "model.gguf", "phimoe")
    with pytest.raises(CheckpointError, match="architecture 'phimoe': its rotary factors are tensors"):
        resolve_model(load_config({"model": {"path": str(path)}, "cache_dir": str(tmp_path / "cache")}))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("case", ["qwen3_moe", "olmoe"], indirect=True)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_by_overrides_of_config_json(case: Case, key: str, tmp_path: Path) -> None:
    """As transformers computes with the same override; positions far beyond those that are called trained."""
    options = {"path": str(case.directory), "hf_overrides": {key: YARN, "max_position_embeddings": 512}}
    directory = resolve_model(load_config({"model": options, "cache_dir": str(tmp_path)}))
    scaled = AutoConfig.from_pretrained(case.directory)
    scaled.rope_parameters = {**scaled.rope_parameters, **YARN}
    expected = Case(case.name, directory, *transformers_says(case.directory, config=scaled))
    assert any(not torch.equal(one, other) for one, other in zip(expected.logprobs, case.logprobs, strict=True))
    assert_same(Engine(trunk_of(directory), EngineOptions(64, 8, max_model_len=96)), expected)


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
        ("qwen3_moe", {"mlp_only_layers": [0, 1], "intermediate_size": 96}, "none of the 2 layers has experts"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "`mlp_only_layers` must be a list of layers, found 1"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "`decoder_sparse_step` must be a positive integer"),
        ("qwen3_moe", {"mlp_only_layers": [0], "intermediate_size": None}, "`intermediate_size` must be"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "`topk_method` is 'noaux_tc', supported: greedy, group_limited"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "`scoring_func` is 'sigmoid', supported: softmax"),
        ("deepseek_v2", {"norm_topk_prob": True}, "`norm_topk_prob` is True"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "`num_experts_per_tok` must be a positive integer"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "`moe_layer_freq` is 2"),
        ("deepseek_v2", {"attention_bias": True}, "`attention_bias` is True"),
        ("deepseek_v2", {"first_k_dense_replace": -1}, "`first_k_dense_replace` must be an integer from 0 on"),
        ("deepseek_v2", {"qk_rope_head_dim": 33}, "`qk_rope_head_dim` 33 must be even"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3, which does not divide 8 experts"),
        ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok 3 of topk_group 1 groups: there are 4 groups of 2"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
        ("qwen2_moe", {"use_sliding_window": True}, "`use_sliding_window` is True"),
        ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "`layer_types`"),
        ("qwen2_moe", {"norm_topk_prob": 1}, "`norm_topk_prob` must be true or false"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "`shared_expert_intermediate_size`"),
        ("olmoe", {"clip_qkv": -8.0}, "`clip_qkv` must be a positive number, found -8.0"),
        ("qwen3_moe", {"clip_qkv": 8.0}, "`clip_qkv` is 8.0"),
        ("olmoe", {"sliding_window": 128}, "`sliding_window` is 128"),
        ("olmoe", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds num_experts 6"),
        ("granitemoe", {"shared_intermediate_size": 64}, "`shared_intermediate_size` is 64"),
        ("granitemoe", {"logits_scaling": 0}, "`logits_scaling` must be a positive number"),
        ("gpt_oss", {"layer_types": ["sliding_attention"]}, "`layer_types` is ['sliding_attention']"),
        ("gpt_oss", {"layer_types": ["full_attention", "chunked_attention"]}, "full_attention for each of 2 layers"),
        ("gpt_oss", {"hidden_act": "gelu"}, "`hidden_act` is 'gelu', supported: silu"),
        ("gpt_oss", {"swiglu_limit": 0}, "`swiglu_limit` must be a positive number"),
        ("mixtral", {"swiglu_limit": 7.0, "num_local_experts": 8, "intermediate_size": 96}, "`swiglu_limit` is 7.0"),
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
    if model_type.startswith("deepseek"):
        sizes |= {"num_experts_per_tok": 4, "num_hidden_layers": 5}
    theirs = AutoConfig.for_model(model_type, **{**needed, **sizes})
    ours = ModelConfig.from_dict({"model_type": model_type, **needed, **sizes})
    if model_type == "qwen3":
        assert ours.head_dim == theirs.head_dim
    for key in ("max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key), key
    if ours.latent is None:
        assert ours.num_key_value_heads == theirs.num_key_value_heads
    else:
        assert_same_latents(ours, theirs)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or None)
    if ours.routed:
        assert ours.num_local_experts == (getattr(theirs, "num_experts", None) or theirs.num_local_experts)
        assert ours.num_experts_per_tok == theirs.num_experts_per_tok
    assert ours.router.renormalise == getattr(theirs, "norm_topk_prob", model_type != "phimoe")
    assert ours.router.jitter == getattr(theirs, "router_jitter_noise", None if model_type != "mixtral" else 0.0) or (
        model_type == "mixtral"
    )


def assert_same_latents(ours: ModelConfig, theirs: Any) -> None:
    """What only DeepSeek's configurations have, and what is absent means."""
    latent = ours.latent
    assert latent is not None
    assert (latent.q_rank, latent.kv_rank) == (theirs.q_lora_rank, theirs.kv_lora_rank)
    assert (latent.nope, latent.rope) == (theirs.qk_nope_head_dim, theirs.qk_rope_head_dim)
    assert (latent.value, latent.interleaved) == (theirs.v_head_dim, getattr(theirs, "rope_interleave", True))
    assert ours.router.scale == theirs.routed_scaling_factor
    assert (ours.router.groups, ours.router.groups_chosen) == (theirs.n_group or 1, theirs.topk_group or 1)
    assert ours.shared_intermediate_size == theirs.n_shared_experts * theirs.moe_intermediate_size
    assert len(ours.dense_layers) == theirs.first_k_dense_replace


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
