"""A family other than Mixtral through all of it: Ray, experts in groups, HTTP."""

from __future__ import annotations

from pathlib import Path

import httpx
import torch
from random_families import save_random_family
from served import deploy
from transformers import AutoModelForCausalLM

from moe_ray.bench.m1 import write_tokenizer

PROMPT = [5, 17, 300, 42, 7]
NEW_TOKENS = 12


def test_qwen3_moe_over_ray_says_what_transformers_says(tmp_path: Path, http_port: int) -> None:
    from ray import serve

    save_random_family(tmp_path, "qwen3_moe", vocab_size=512)
    write_tokenizer(tmp_path, 512, 256)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    served = deploy("family", http_port, {"model": {"path": str(tmp_path)}, "experts": {"experts_per_actor": 3}})
    try:
        wanted = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        body = {"model": tmp_path.name, **wanted, "return_token_ids": True}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()
    finally:
        serve.delete("family")
    assert answer["choices"][0]["token_ids"] == out[0, len(PROMPT) :].tolist()
