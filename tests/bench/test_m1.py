"""The bench model's maker: its layout, its randomness, its tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from moe_ray.bench import m1 as bench_model_room
from moe_ray.bench.http_load import text_prompts
from moe_ray.bench.m1 import Recipe, bench_model, make_model, random_tensor, resolve_bench_model, vocabulary
from moe_ray.config import load_config
from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.families import Weight
from moe_ray.model.weights import weights_of_expert, weights_of_model
from moe_ray.text.tokenizer import Tokenizer

TINY = Recipe(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    shard_bytes=2_100_000,
)


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    make_model(directory, TINY, quiet)
    return directory


def test_every_tensor_is_there_in_several_shards(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    weights = list(weights_of_model(checkpoint.config))
    assert checkpoint.check(weights) == sum(2 * weight.numel for weight in weights)
    assert {checkpoint.place(weight).named("weight") for weight in weights} == set(checkpoint.files)
    assert len(set(checkpoint.files.values())) == 3
    assert checkpoint.config.dtype == "bfloat16"
    embedding = checkpoint.read(Weight("embed", (32_000, 32)), torch.float32)
    assert embedding.std().item() == pytest.approx(1.0, rel=0.01)
    head = checkpoint.read(Weight("head", (32_000, 32)), torch.float32)
    assert head.std().item() == pytest.approx(0.03, rel=0.01)
    assert checkpoint.read(Weight("norm", (32,)), torch.float32).unique().tolist() == [1.0]
    checkpoint.close()


def test_a_tensor_depends_on_seed_and_name_alone(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    w1, w3, _ = weights_of_expert(checkpoint.config, 1, 5)
    again = random_tensor(w1, TINY)
    assert torch.equal(checkpoint.read(w1, torch.bfloat16), again)
    assert not torch.equal(random_tensor(w3, TINY), again)
    checkpoint.close()


def test_it_generates_as_transformers_does(tiny: Path) -> None:
    from transformers import AutoTokenizer, MixtralForCausalLM

    from moe_ray.core import SamplingParams
    from moe_ray.llm import LLM

    llm = LLM(tiny, dtype="float32")
    prompt = llm.tokenizer.encode("kanuto babi")
    assert AutoTokenizer.from_pretrained(tiny)("kanuto babi")["input_ids"] == prompt
    reference = MixtralForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    output = llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))[0]
    assert output.token_ids == expected[0, len(prompt) :].tolist()


def test_the_tokenizer_has_32000_pieces_and_takes_any_text(tiny: Path) -> None:
    tokenizer = Tokenizer(tiny)
    assert tokenizer.vocab_size == 32_000
    assert tokenizer.encode("kanuto")[0] == tokenizer.bos_token_id == 1
    assert len(tokenizer.encode("kanu babi to")) == 1 + 3
    for text in ("The capital of France is Paris.", "  two  spaces\nand lines\t", "año 漢字 🙂", "kanuto"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    rng = random.Random(0)
    assert all(tokenizer.decode([rng.randrange(259, 32_000)]) for _ in range(100))


def test_text_prompts_are_exact_and_differ(tiny: Path) -> None:
    tokenizer = Tokenizer(tiny)
    prompts = list(text_prompts(8, 32, tokenizer, "0"))
    assert {len(tokenizer.encode(prompt)) for prompt in prompts} == {32}
    assert len({tuple(tokenizer.encode(prompt)[:8]) for prompt in prompts}) == 8
    assert prompts == list(text_prompts(8, 32, tokenizer, "0"))


def test_sizes_of_vocabularies() -> None:
    pieces, merges = vocabulary(32_000)
    assert len(pieces) == len(set(pieces)) == 32_000
    known = set(pieces)
    assert all({left, right, left + right} <= known for left, right in merges)
    for size in (100, 2_000_000):
        with pytest.raises(ValueError, match="no vocabulary"):
            vocabulary(size)


@pytest.mark.slow
def test_it_is_made_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model_room, "M1", TINY)
    said: list[str] = []
    made = bench_model(tmp_path, lambda what, done, total: said.append(what))
    assert set(said) == {"bench model", "checksum"}
    stamp = (made / "config.json").stat().st_mtime_ns
    config = load_config().model_copy(update={"cache_dir": tmp_path})
    assert resolve_bench_model(None, config, quiet) == made
    assert resolve_bench_model(str(made), config, quiet) == made
    assert (made / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(CheckpointError, match="neither a directory"):
        resolve_bench_model("/no/such/model", config, quiet)
