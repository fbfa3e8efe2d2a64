"""Every model family computes what transformers computes, however its work is cut up, and refuses what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_families import CASES, LONGROPE, SHAPE, save_random_family
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_ray.core import Request, SamplingParams, TokenLogprobs
from moe_ray.engine.engine import Engine, EngineOptions
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

LENGTHS = (1, 9, 40)
NATIVE = [case for case in CASES if "longrope" not in case]
NEW_TOKENS = 12
PROMPTS = [tuple(torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in LENGTHS]


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_family(tmp_path_factory.mktemp("family"), request.param)


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


def test_parity_with_transformers(model: Path) -> None:
    expected, logits = transformers_says(model)
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    check_surplus(Checkpoint.open(model))
    trunk = trunk_of(model)
    tokens, likeliest = generate(Engine(trunk, EngineOptions(64, 8, max_model_len=96)))
    assert tokens == expected
    for found, theirs in zip(likeliest, logits, strict=True):
        assert len(found) == NEW_TOKENS
        for position, row in zip(found, theirs, strict=True):
            ids, ours = zip(*position.top, strict=True)
            torch.testing.assert_close(torch.tensor(ours), row[list(ids)], rtol=0, atol=1e-4)
    limits = SchedulerLimits(max_num_batched_tokens=11)
    cut = Engine(trunk, EngineOptions(64, 4, limits, max_model_len=96, micro_batches=2))
    assert generate(cut)[0] == expected
    assert generate(cut)[0] == expected
    assert cut.stats().prefix_hit_tokens > 0


@pytest.mark.parametrize("case", ["qwen2_moe", "phimoe", "granitemoe"])
def test_the_layout_that_transformers_holds(case: str, tmp_path: Path) -> None:
    save_random_family(tmp_path / "own", case)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "stacked" / SINGLE))
    options = EngineOptions(64, 8, max_model_len=96)
    own, stacked = (generate(Engine(trunk_of(tmp_path / name), options)) for name in ("own", "stacked"))
    assert own == stacked


@pytest.mark.skipif(kernels_here() is None, reason="this CPU has no native kernels")
@pytest.mark.parametrize("case", NATIVE)
def test_on_the_native_kernels(case: str, tmp_path: Path) -> None:
    save_random_family(tmp_path, case, head_dim=32, **({"hidden_size": 128} if "olmoe" in case else {}))
    compute = open_compute(ModelConfig.load(tmp_path), Wanted("float32", "cpu"), Path.home() / ".cache/moe-ray")
    assert compute.backend.experts == "native"
    assert compute.backend.trunk == ("torch" if case == "phimoe" else "native")
    engine = Engine(trunk_of(tmp_path, compute), EngineOptions(64, 8, max_model_len=96))
    assert generate(engine)[0] == transformers_says(tmp_path)[0]


def test_no_layout_names_two_weights_alike() -> None:
    for case in CASES:
        config = ModelConfig.from_dict(raw_config(case.partition(",")[0]))
        weights = list(weights_of_model(config))
        for layout in config.family.layouts:
            assert len({layout.place(weight, config.num_local_experts) for weight in weights}) == len(weights)


def test_a_trunk_that_native_kernels_do_not_compute_says_why(tmp_path: Path) -> None:
    save_random_family(tmp_path, "phimoe")
    compute = open_compute(ModelConfig.load(tmp_path), Wanted("float32", "cpu"), Path.home() / ".cache/moe-ray")
    assert compute.backend.trunk == "torch"
    for what in ("LayerNorm", "SparseMixer", "biases of norms and head"):
        assert what in compute.backend.slower_because


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

    needed = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 100}
    sizes = {"intermediate_size": 32, "moe_intermediate_size": 16}
    if model_type == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = 48
    theirs = AutoConfig.for_model(model_type, **needed, **sizes)
    ours = ModelConfig.from_dict({"model_type": model_type, **needed, **sizes})
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
