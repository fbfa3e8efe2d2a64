"""A GGUF file in place of a checkpoint directory: the same text."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import BEST, open_backend
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_files import write_gguf
from reference import Reference
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from moe_ray.config import load_config
from moe_ray.core import SamplingParams
from moe_ray.hub import resolve_model
from moe_ray.llm import LLM, RequestOutput
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.expert_reader import ExpertReader


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """A cache of its own for what files are unpacked to, with the native libraries of the user's."""
    native = load_config().cache_dir / "native"
    native.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "native").symlink_to(native)
    return str(tmp_path / "cache")


@pytest.mark.slow
def test_the_demo_model_as_a_gguf_file(demo_model: Path, tmp_path: Path, cache: str) -> None:
    """In bfloat16 both hold the same weights."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_model)
    path = write_gguf(demo_model, tmp_path / "demo.gguf", kind="BF16", tokenizer=tokenizer)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answers = []
    for model in (path, demo_model):
        llm = LLM(model, cache_dir=cache, dtype="bfloat16")
        ids = llm.tokenizer.apply_chat_template(chat)
        answers.append(llm.generate(ids, SamplingParams(max_tokens=24, temperature=0))[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].text == answers[1].text
    assert "Paris" in answers[0].text


def through_q4_0(source: Path, target: Path) -> Path:
    """Write the checkpoint `source` with the float values that ggml's own Q4_0 gives its matrices."""
    shutil.copytree(source, target)
    kind = GGMLQuantizationType.Q4_0
    (file,) = target.glob("*.safetensors")
    tensors = {}
    for name, tensor in load_file(file).items():
        values = tensor.float().numpy()
        if values.ndim > 1 and not name.endswith("gate.weight"):
            values = dequantize(quantize(values, kind), kind)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values))
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def distance(answers: list[RequestOutput], reference: Reference) -> tuple[float, float]:
    """Medians over tokens: how far our log-probability is from theirs; how far theirs is below their likeliest."""
    apart, short = [], []
    for answer in answers:
        chosen = torch.tensor(answer.token_ids)
        theirs = reference.logprobs([*answer.prompt_token_ids, *answer.token_ids[:-1]])[-len(chosen) :]
        of_chosen = theirs.gather(1, chosen[:, None])[:, 0]
        apart.append((torch.tensor([at.logprob for at in answer.logprobs]) - of_chosen).abs())
        short.append(theirs.amax(-1) - of_chosen)
    return float(torch.cat(apart).median()), float(torch.cat(short).median())


@pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")
def test_four_bits_of_a_gguf_file_are_computed_as_they_are(
    kernel_model: Path, tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(kernel_model)
    path = write_gguf(kernel_model, tmp_path / "q4.gguf", kind="Q4_0", tokenizer=tokenizer)
    with caplog.at_level(logging.INFO):
        llm = LLM(path, cache_dir=cache, dtype="bfloat16", device="cpu", kernels=BEST)
    assert "Trunk: weights held as int4 in groups of 32" in caplog.messages
    checkpoint, compute = Checkpoint.open(resolve_model(llm.config)), open_backend("native bfloat16")
    reader = ExpertReader(checkpoint, [(0, 0)], compute)
    assert reader.held((0, 0)) == "int4 in groups of 32"
    weights = 3 * checkpoint.config.hidden_size * checkpoint.config.intermediate_size
    assert reader.read((0, 0)).nbytes < weights * (0.5 + 2 / 32) + 1024, "codes and their scales, and two headers"

    prompts = [list(range(300, 300 + n)) for n in (5, 17, 40)]
    sampling = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=0)
    answers = llm.generate(prompts, sampling)
    # Medians, for a router whose choice is close sends a token elsewhere in one of the two.
    of_decoded, short = distance(answers, Reference(through_q4_0(kernel_model, tmp_path / "decoded")))
    of_source, _ = distance(answers, Reference(kernel_model))
    assert of_decoded < 0.1
    assert of_decoded < 0.1 * of_source, "the values that the file holds, not those it was made of"
    assert short == 0, "greedy tokens are the reference's likeliest"
