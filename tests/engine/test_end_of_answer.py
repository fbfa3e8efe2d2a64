"""An answer ends at the token that any of the checkpoint's files names as its end."""

from __future__ import annotations

import itertools
import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moe_ray import LLM, SamplingParams
from moe_ray.errors import CheckpointError

VOCAB_SIZE = 32002
IM_END = 32001


@pytest.fixture(scope="module")
def words() -> list[int]:
    """Ids of the words that the model says one after the other, from the prompt's on."""
    return [22557, 349, 5465, IM_END, 1526]  # Hello is Paris <|im_end|> world


@pytest.fixture(scope="module")
def chatml_model(tmp_path_factory: pytest.TempPathFactory, words: list[int]) -> Path:
    """Says `words`, whatever comes before: no attention, no experts, and a head that maps each to the next."""
    directory = tmp_path_factory.mktemp("chatml")
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        rows = torch.nn.functional.normalize(
            torch.randn(VOCAB_SIZE, 64, generator=torch.Generator().manual_seed(1)), dim=1
        )
        model.model.embed_tokens.weight.copy_(rows)
        for before, after in itertools.pairwise(words):
            model.lm_head.weight[after] += rows[before]
    model.save_pretrained(directory)
    with resources.as_file(resources.files("mistral_common") / "data" / "tokenizer.model.v1") as file:
        shutil.copy(file, directory / "tokenizer.model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, add_bos_token=True)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(directory)
    return directory


def test_end_token_that_only_the_tokenizer_names(chatml_model: Path, words: list[int]) -> None:
    llm = LLM(chatml_model, engine={"kv_cache_gib": 0.01})
    [output] = llm.generate(["Hello"], SamplingParams(max_tokens=12, temperature=0.0))
    assert (list(output.token_ids), output.finish_reason) == (words[1:4], "stop")
    [output] = llm.generate(["Hello"], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert (list(output.token_ids), output.finish_reason) == (words[1:5], "length")


def test_end_token_as_a_string_is_refused_by_file_and_key(chatml_model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(chatml_model, tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": "2"}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: `eos_token_id`.*'2'"):
        LLM(directory, engine={"kv_cache_gib": 0.01})
