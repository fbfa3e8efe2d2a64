"""A draft model must mean by its token ids what the model means by them; it is said at the start where it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from dense_llama import save_mixture_of, save_random_llama
from random_mixtral import TOKENIZER

from moe_ray.core import SamplingParams
from moe_ray.errors import ConfigError
from moe_ray.llm import LLM
from moe_ray.text.same_vocabulary import check_same_vocabulary


def test_the_first_token_that_differs_is_named(demo_model: Path, tmp_path: Path) -> None:
    for name in TOKENIZER:
        shutil.copy(demo_model / name, tmp_path / name)
    check_same_vocabulary(tmp_path, demo_model)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    check_same_vocabulary(tmp_path, demo_model)  # other bytes, the same tokens
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=f"its token {min(vocabulary[first], vocabulary[second])} is .* the model's"):
        check_same_vocabulary(tmp_path, demo_model)
    (tmp_path / "tokenizer.json").unlink()
    check_same_vocabulary(tmp_path, demo_model)  # ids are all that the trunk knows


def test_a_model_in_this_process_drafts(demo_model: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    dense = save_random_llama(tmp_path / "dense", seed=0, vocab_size=49152, num_key_value_heads=1, **shape)
    mixture = save_mixture_of(dense, tmp_path / "mixture")
    for name in TOKENIZER:
        shutil.copy(demo_model / name, mixture / name)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    plain = LLM(mixture, dtype="float32", engine={"kv_cache_gib": 0.01})
    drafting = LLM(mixture, draft_model=dense, dtype="float32", engine={"kv_cache_gib": 0.01, "speculative": "draft"})
    wanted, found = (llm.generate(["Hello"], params)[0].token_ids for llm in (plain, drafting))
    assert found == wanted
    assert drafting.stats.accepted_draft_tokens == drafting.stats.draft_tokens > 10
    other = save_random_llama(tmp_path / "other", seed=0, vocab_size=100, num_key_value_heads=1, **shape)
    with pytest.raises(ConfigError, match="a vocabulary of 100 tokens, the model one of 49152"):
        LLM(mixture, draft_model=other, engine={"kv_cache_gib": 0.01})
