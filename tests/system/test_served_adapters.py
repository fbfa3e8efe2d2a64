"""Adapters over Ray: each sequence as with its own alone, on every carrier, through the API, and when experts die."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import torch
from adapted import ATTENTION, EXPERTS, save_adapter
from served import Served, complete, kill, statuses
from served_engine import engine_over

from moe_ray.core import AdapterRef, Request, SamplingParams
from moe_ray.model.lora.adapter_file import read_adapter
from moe_ray.model.model_config import ModelConfig
from moe_ray.text.tokenizer import Tokenizer

WAYS = {
    "attention": {"r": 4, "target_modules": ATTENTION},
    "experts": {"r": 8, "target_modules": ATTENTION, "target_parameters": EXPERTS},
}
PROMPT = [(11 * i + 5 * i * i) % 500 + 3 for i in range(40)]
OUTPUT = 24


@pytest.fixture(scope="module")
def adapters(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(random_model, directory / name, seed, **way) for seed, (name, way) in enumerate(WAYS.items())
    }


@pytest.fixture(scope="module")
def expected(random_model: Path, adapters: dict[str, Path]) -> dict[str | None, list[int]]:
    """The greedy output of transformers, alone and with peft's adapters."""
    from peft import PeftModel
    from transformers import MixtralForCausalLM

    outputs: dict[str | None, list[int]] = {}
    for name in (None, *adapters):
        model = MixtralForCausalLM.from_pretrained(random_model, dtype=torch.float32)
        if name is not None:
            model = PeftModel.from_pretrained(model, adapters[name])
        ids = torch.tensor([PROMPT])
        kept = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": None}
        out = model.eval().generate(input_ids=ids, max_new_tokens=OUTPUT, do_sample=False, **kept)
        outputs[name] = out[0, len(PROMPT) :].tolist()
    assert len({tuple(output) for output in outputs.values()}) == len(outputs)
    return outputs


@pytest.mark.parametrize("carrier", ["socket", "grpc", "ray"])
def test_a_batch_of_adapters_over_every_carrier(
    served_random: Served,
    carrier: str,
    random_model: Path,
    adapters: dict[str, Path],
    expected: dict[str | None, list[int]],
) -> None:
    model = ModelConfig.load(random_model)
    refs = {name: AdapterRef(read_adapter(path, model).adapter_id, str(path)) for name, path in adapters.items()}
    sampling = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True)
    names: Sequence[str | None] = ["experts", None, "attention", "experts"]
    outputs: list[list[int]] = [[] for _ in names]
    with engine_over(served_random, carrier, micro_batches=2, max_num_batched_tokens=64) as engine:
        for index, name in enumerate(names):
            request = Request(str(index), tuple(PROMPT), sampling)
            engine.submit(request if name is None else request.with_adapter(refs[name]))
        while not all(len(output) == OUTPUT for output in outputs):
            engine.wait()
            for event in engine.step():
                assert event.error is None, event.error
                outputs[int(event.request_id)] += event.token_ids
            engine.check_integrity()
    assert outputs == [expected[name] for name in names]


@pytest.fixture(scope="module")
def loaded(served_random: Served, adapters: dict[str, Path]) -> Iterator[Served]:
    """Both adapters, served under their names since a moment ago."""
    for name, path in adapters.items():
        body = {"lora_name": name, "lora_path": str(path)}
        answer = httpx.post(f"{served_random.url}/v1/load_lora_adapter", json=body, timeout=30, trust_env=False)
        assert answer.text == f"Success: LoRA adapter '{name}' added successfully."
    yield served_random
    for name in adapters:
        httpx.post(f"{served_random.url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=30, trust_env=False)


def ask(served: Served, name: str | None) -> str:
    return complete(served, PROMPT, max_tokens=OUTPUT, **({} if name is None else {"model": name}))


def test_requests_choose_adapters_by_name(
    loaded: Served, random_model: Path, expected: dict[str | None, list[int]]
) -> None:
    tokenizer = Tokenizer(random_model)
    texts = {name: tokenizer.decode(tokens) for name, tokens in expected.items()}
    names = [None, "attention", "experts", "experts", None, "attention"]
    with concurrent.futures.ThreadPoolExecutor(len(names)) as threads:
        answers = list(threads.map(lambda name: ask(loaded, name), names))
    assert answers == [texts[name] for name in names]
    models = httpx.get(f"{loaded.url}/v1/models", timeout=10, trust_env=False).json()["data"]
    assert [(card["id"], card["parent"]) for card in models] == [
        ("random", None),
        ("attention", "random"),
        ("experts", "random"),
    ]
    body = {"inputs": "a b c", "parameters": {"max_new_tokens": 4, "adapter_id": "experts"}}
    answer = httpx.post(f"{loaded.url}/generate", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    body["parameters"]["adapter_id"] = "none of them"
    answer = httpx.post(f"{loaded.url}/generate", json=body, timeout=60, trust_env=False)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")


def test_experts_and_the_trunk_are_killed_under_streams_with_an_adapter(
    loaded: Served, random_model: Path, expected: dict[str | None, list[int]]
) -> None:
    """Their successors hold the adapter before they get rows of it, and no token changes."""
    text = Tokenizer(random_model).decode(expected["experts"])
    for name in ("Expert1", "Trunk"):
        (victim, *_) = statuses(loaded, name)

        def strike(chunks: int, pid: int = victim["pid"]) -> None:
            if chunks == 5:
                kill(pid)

        answer = complete(loaded, PROMPT, strike, max_tokens=OUTPUT, model="experts")
        assert answer == text, name


def test_what_cannot_be_loaded_is_refused_and_what_is_unloaded_is_gone(
    loaded: Served, adapters: dict[str, Path], tmp_path: Path
) -> None:
    def post(path: str, **body: object) -> httpx.Response:
        return httpx.post(f"{loaded.url}/v1/{path}", json=body, timeout=30, trust_env=False)

    answer = post("load_lora_adapter", lora_name="third", lora_path=str(tmp_path))
    assert (answer.status_code, "adapter_config.json" in answer.json()["error"]["message"]) == (400, True)
    answer = post("load_lora_adapter", lora_name="experts", lora_path=str(adapters["experts"]))
    assert (answer.status_code, "already been loaded" in answer.json()["error"]["message"]) == (400, True)
    assert post("unload_lora_adapter", lora_name="third").status_code == 404
    assert post("load_lora_adapter", lora_name="third", lora_path=str(adapters["attention"])).status_code == 200
    assert post("completions", model="third", prompt=PROMPT, max_tokens=1).status_code == 200
    assert post("unload_lora_adapter", lora_name="third").status_code == 200
    assert post("completions", model="third", prompt=PROMPT, max_tokens=1).status_code == 404
