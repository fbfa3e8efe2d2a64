"""A GGUF file in place of a checkpoint directory: the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import write_gguf
from transformers import PreTrainedTokenizerFast

from moe_ray.core import SamplingParams
from moe_ray.llm import LLM


@pytest.mark.slow
def test_the_demo_model_as_a_gguf_file(demo_model: Path, tmp_path: Path) -> None:
    """In bfloat16 both hold the same weights."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_model)
    path = write_gguf(demo_model, tmp_path / "demo.gguf", kind="BF16", tokenizer=tokenizer)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answers = []
    for model in (path, demo_model):
        llm = LLM(model, cache_dir=str(tmp_path / "cache"), dtype="bfloat16")
        ids = llm.tokenizer.apply_chat_template(chat)
        answers.append(llm.generate(ids, SamplingParams(max_tokens=24, temperature=0))[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].text == answers[1].text
    assert "Paris" in answers[0].text
