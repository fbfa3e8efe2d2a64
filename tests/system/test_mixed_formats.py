"""One model with experts in four formats, an actor each: computed as by one process, replicas of one alike."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import Asking
from backends import BEST, open_backend
from served import Served, complete, deploy, eventually, second_replicas, statuses

from moe_ray.core import SamplingParams
from moe_ray.deploy.link_options import link_options
from moe_ray.deploy.peers import find_peers
from moe_ray.experts.server.weight_loader import CARRIER
from moe_ray.llm import LLM
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.transport.weight_transfer import WeightsLink

pytestmark = pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")

FORMATS = {1: "int8", 2: "int4", 3: "nf4"}
"""Expert → what its weights are quantised to; the others stay in bfloat16."""
MIXED = {
    "model": {"served_name": "mixed", "dtype": "bfloat16", "kernels": BEST or "auto"},
    "experts": {"overrides": {expert: {"quantize": name} for expert, name in FORMATS.items()}},
}
PROMPTS = ["The capital of France is", "Once upon a time, an old lighthouse keeper", "def add(a, b):", "1, 2, 3, 4,"]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def served_mixed(demo_model: Path, http_port: int) -> Iterator[Served]:
    from ray import serve

    yield deploy("mixed", http_port, {**MIXED, "model": {**MIXED["model"], "path": str(demo_model)}})
    serve.delete("mixed")


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer as text, and the logarithm of the probability of each."""

    tokens: list[str]
    logprobs: list[float]


@pytest.fixture(scope="module")
def in_one_process(demo_model: Path) -> list[Answer]:
    """Of the same mixed model without Ray, of all prompts in one batch."""
    llm = LLM(demo_model, **{**MIXED["model"], "served_name": None}, experts=MIXED["experts"])  # type: ignore[arg-type]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=0)
    found = []
    for output in llm.generate(PROMPTS, sampling):
        names = [llm.tokenizer.token_to_str(token) for token in output.token_ids]
        found.append(Answer(names, [at.logprob for at in output.logprobs]))
    return found


def ask(served: Served, prompt: str) -> Answer:
    body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0, "logprobs": 0}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    said: dict[str, Any] = response.json()["choices"][0]["logprobs"]
    return Answer(said["tokens"], said["token_logprobs"])


def test_actors_compute_what_one_process_does(served_mixed: Served, in_one_process: list[Answer]) -> None:
    """To the last bit of every probability: alone, and all at once."""
    alone = [ask(served_mixed, prompt) for prompt in PROMPTS]
    assert alone == in_one_process
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: ask(served_mixed, prompt), PROMPTS)) == in_one_process


def test_each_actor_holds_its_own_bits(served_mixed: Served) -> None:
    eventually(
        lambda: all(s["loaded_keys"] == s["keys"] for e in range(8) for s in statuses(served_mixed, f"Expert{e}"))
    )
    held = [statuses(served_mixed, f"Expert{e}")[0]["weight_bytes"] for e in range(8)]
    floats = held[0]
    assert held == [floats, held[1], held[2], held[3], floats, floats, floats, floats]
    for expert, bits in {1: 8, 2: 4, 3: 4}.items():
        assert bits / 16 < held[expert] / floats < 1.2 * bits / 16


def test_replicas_of_a_quantised_expert_are_alike(
    served_mixed: Served, in_one_process: list[Answer], demo_model: Path
) -> None:
    """The second replica of the int4 expert takes layers of the first one's memory, and no token changes meanwhile."""
    expert, prompt = 2, PROMPTS[1]
    undisturbed, from_peers = complete(served_mixed, prompt), 0
    with Asking(lambda: complete(served_mixed, prompt)) as streams:
        for first, second in second_replicas(served_mixed, expert):  # one on a quick disk may need no peer
            assert second["weight_bytes"] == first["weight_bytes"]
            from_peers += second["bytes_from_peers"]
            assert_alike(served_mixed, expert, demo_model)
            assert [ask(served_mixed, prompt) for prompt in PROMPTS] == in_one_process
            answers = len(streams.answers)
            eventually(lambda answers=answers: len(streams.answers) > answers + 1, 60)
            if from_peers:
                break
    assert from_peers
    assert set(streams.answers) == {undisturbed}


def assert_alike(served: Served, expert: int, model: Path) -> None:
    """Take layers out of the memory of each replica, as a third one would: they are what this process makes."""
    keys = {(layer, expert) for layer in (0, 7, 29)}
    reader = ExpertReader(Checkpoint.open(model), keys, open_backend("native bfloat16"), quantize=FORMATS[expert])
    replicas = find_peers(f"Expert{expert}", served.app_name)()
    assert len(replicas) == 2
    for key in keys:
        own = [bytes(buffer) for buffer in reader.read(key).buffers()]
        for replica in replicas:
            link = WeightsLink(replica.addresses[CARRIER], link_options(served.config))
            blank = reader.blank(key)
            link.read(key, reader.layout, reader.fingerprint(key), blank.buffers)
            link.close()
            assert [bytes(buffer) for buffer in blank.buffers] == own
    reader.close()
