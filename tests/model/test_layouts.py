"""The ways in which checkpoints name and stack their tensors: each gives the tokens that transformers gives for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from moe_ray.core import Request, SamplingParams
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.errors import CheckpointError
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.expert_reader import ExpertReader, read_experts
from moe_ray.model.foreign import INDEX, SINGLE
from moe_ray.model.surplus import check_surplus, config_of_trunk
from moe_ray.model.trunk import Trunk
from moe_ray.model.weights import weights_of_expert, weights_of_model

LAYERS, EXPERTS, HIDDEN, INNER = 2, 6, 64, 96
PROMPT = (3, 17, 42, 5, 80)
NEW_TOKENS = 24
Tensors = dict[str, torch.Tensor]


def random_mixtral(tie_word_embeddings: bool = False) -> MixtralForCausalLM:
    torch.manual_seed(5)
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        num_local_experts=EXPERTS,
        num_experts_per_tok=3,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=tie_word_embeddings,
    )
    return MixtralForCausalLM(config)


@pytest.fixture(scope="session")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("separate")
    random_mixtral().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as transformers 5 holds it."""
    directory = tmp_path_factory.mktemp("stacked")
    random_mixtral().save_pretrained(directory, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(directory / SINGLE)
    return directory


def edited(source: Path, target: Path, edit: Callable[[Tensors], Tensors], **config: object) -> Path:
    """A copy of a checkpoint with other tensors and keys of config.json."""
    target.mkdir()
    save_file(edit(load_file(source / SINGLE)), target / SINGLE, metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **config}))
    return target


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def ours(directory: Path) -> list[int]:
    checkpoint = Checkpoint.open(directory)
    compute = Compute(Backend("float32"))
    trunk = Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 64)
    engine = Engine(trunk, EngineOptions(16, 8, max_model_len=64))
    engine.submit(Request("r", PROMPT, SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)))
    tokens: list[int] = []
    while engine.has_work:
        for event in engine.step():
            tokens += event.token_ids
    return tokens


def theirs(directory: Path) -> list[int]:
    model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(PROMPT) :].tolist()  # type: ignore[no-any-return]


def with_head(tensors: Tensors) -> Tensors:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


VARIANTS: dict[str, tuple[str, Callable[[Tensors], Tensors], dict[str, object]]] = {
    "separate": ("separate", dict, {}),
    "separate, mlp": ("separate", renamed("block_sparse_moe", "mlp"), {}),
    "separate, no prefix": ("separate", renamed("model.", ""), {}),
    "stacked": ("stacked", dict, {}),
    "stacked, block_sparse_moe": ("stacked", renamed(".mlp.", ".block_sparse_moe."), {}),
    "stacked, no prefix": ("stacked", renamed("model.", ""), {}),
    "tied beside another head": ("separate", dict, {"tie_word_embeddings": True}),
    "tied beside the same head": ("separate", with_head, {"tie_word_embeddings": True}),
    "tied, no head": (
        "separate",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
        {"tie_word_embeddings": True},
    ),
    "tied, the head alone": (
        "separate",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name},
        {"tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source, edit, config = VARIANTS[variant]
    directory = edited(request.getfixturevalue(source), tmp_path / "model", edit, **config)
    expected = theirs(directory)
    assert len(set(expected)) > NEW_TOKENS // 3, "it repeats itself"
    assert ours(directory) == expected


def test_the_variants_are_models_of_their_own(separate: Path, stacked: Path, tmp_path: Path) -> None:
    """Or parity would hold where the head or the stack is read wrongly."""
    without = edited(separate, tmp_path / "tied", VARIANTS["tied, no head"][1], tie_word_embeddings=True)
    assert ours(without) != ours(separate)
    assert ours(stacked) == ours(separate)


def test_stacked_experts_are_those_of_separate_tensors(separate: Path, stacked: Path) -> None:
    one, other = Checkpoint.open(separate), Checkpoint.open(stacked)
    assert one.layout is not other.layout
    for weight in weights_of_model(one.config):
        assert torch.equal(one.read(weight, torch.float32), other.read(weight, torch.float32)), weight
    for key in ((0, 0), (1, 5)):
        weights = weights_of_expert(one.config, *key)
        assert one.fingerprint(weights) == other.fingerprint(weights), "a peer may send what it read of either"
    stored = other.find(weights_of_expert(other.config, 1, 2)[1])
    assert stored.parts[0].name == "model.layers.1.mlp.experts.gate_up_proj"
    assert stored.parts[0].offset == 4 * HIDDEN * INNER * (2 * 2 + 1), "two experts, and the gate of the third"


def test_an_expert_reads_its_own_part_of_a_stack_only(stacked: Path) -> None:
    checkpoint = Checkpoint.open(stacked)
    ffn = read_experts(checkpoint, {(layer, 4) for layer in range(LAYERS)}, Compute(Backend("float32")))
    assert checkpoint.bytes_read == ffn.nbytes == LAYERS * 3 * 4 * HIDDEN * INNER
    # What other experts hold there is never looked at.
    path = stacked / SINGLE
    found = checkpoint.find(weights_of_expert(checkpoint.config, 0, 3)[0]).parts[0]
    start = Checkpoint.open(stacked)._entry(found.name)
    assert start is not None
    before = path.read_bytes()
    at = start.start + found.offset
    path.write_bytes(before[:at] + b"\xff" * found.nbytes + before[at + found.nbytes :])
    again = read_experts(Checkpoint.open(stacked), {(0, 4)}, Compute(Backend("float32")))
    path.write_bytes(before)
    assert [bytes(b) for b in again.buffers((0, 4))] == [bytes(b) for b in ffn.buffers((0, 4))]


def test_replicas_of_either_layout_hold_the_same_bytes(separate: Path, stacked: Path) -> None:
    readers = [
        ExpertReader(Checkpoint.open(directory), {(0, 1)}, Compute(Backend("bfloat16")))
        for directory in (separate, stacked)
    ]
    assert readers[0].layout == readers[1].layout
    assert readers[0].fingerprint((0, 1)) == readers[1].fingerprint((0, 1))


def test_a_stack_of_the_wrong_shape_and_a_missing_one(stacked: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"

    def fewer(tensors: Tensors) -> Tensors:
        return {**tensors, name: tensors[name][1:].clone()}

    wrong = Checkpoint.open(edited(stacked, tmp_path / "wrong", fewer))
    with pytest.raises(CheckpointError, match=rf"{name}: shape \[5, 192, 64\], config.json implies \[6, 192, 64\]"):
        wrong.check(weights_of_model(wrong.config))
    gone = Checkpoint.open(
        edited(stacked, tmp_path / "gone", lambda t: {key: value for key, value in t.items() if key != name})
    )
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        gone.check(weights_of_model(gone.config))


def test_a_head_beside_a_tied_config_is_used_and_said(
    separate: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = Checkpoint.open(edited(separate, tmp_path / "both", dict, tie_word_embeddings=True))
    assert both.config.tie_word_embeddings
    with caplog.at_level(logging.WARNING):
        assert not config_of_trunk(both).tie_word_embeddings
    assert "lm_head.weight is another matrix than model.embed_tokens.weight" in caplog.text
    assert both.bytes_read == 0
    caplog.clear()
    same = Checkpoint.open(edited(separate, tmp_path / "same", with_head, tie_word_embeddings=True))
    assert config_of_trunk(same).tie_word_embeddings
    check_surplus(same)
    assert not caplog.records


def test_a_missing_head_is_not_made_up(separate: Path, tmp_path: Path) -> None:
    """transformers draws a random one, with a warning."""
    directory = edited(separate, tmp_path / "headless", VARIANTS["tied, no head"][1])
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight is missing"):
        ours(directory)


@pytest.mark.parametrize(
    "bias",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.block_sparse_moe.experts.2.w1.bias",
        "model.layers.1.block_sparse_moe.e_score_correction_bias",
        "lm_head.bias",
    ],
)
def test_a_bias_is_refused_by_name(separate: Path, tmp_path: Path, bias: str) -> None:
    directory = edited(separate, tmp_path / "biased", lambda tensors: {**tensors, bias: torch.ones(4)})
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: tensor {bias}: a bias"):
        ours(directory)


def test_other_surplus_is_named(separate: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def more(tensors: Tensors) -> Tensors:
        return {
            **tensors,
            "model.layers.2.input_layernorm.weight": torch.ones(HIDDEN),
            **{f"model.layers.0.self_attn.q_norm.{i}": torch.ones(4) for i in range(6)},
        }

    directory = edited(separate, tmp_path / "more", more)
    with caplog.at_level(logging.WARNING):
        assert ours(directory) == theirs(directory)
    assert "model.layers.0.self_attn.q_norm.0" in caplog.text
    assert "and 2 more" in caplog.text


def test_what_transformers_ignores_silently(separate: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(LAYERS)}
    directory = edited(separate, tmp_path / "old", lambda tensors: {**tensors, **frequencies})
    with caplog.at_level(logging.WARNING):
        check_surplus(Checkpoint.open(directory))
    assert not caplog.records


def test_surplus_is_found_without_opening_the_shards_of_experts(separate: Path, tmp_path: Path) -> None:
    tensors = load_file(separate / SINGLE)
    own = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    (tmp_path / "config.json").write_text((separate / "config.json").read_text())
    save_file(own, tmp_path / "trunk.safetensors")
    files = {name: "trunk.safetensors" if name in own else "elsewhere.safetensors" for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    check_surplus(Checkpoint.open(tmp_path))


def test_no_layout_names_two_weights_alike(separate: Path) -> None:
    config = Checkpoint.open(separate).config
    weights = list(weights_of_model(config))
    for layout in config.family.layouts:
        assert len({layout.place(weight, config.num_local_experts) for weight in weights}) == len(weights)
