"""An engine that serves adapters: loaded when asked for, given up for others, each sequence as with its own alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from adapted import SHAPE, WAYS, peft_logits, save_adapter
from random_mixtral import save_random_mixtral
from stepping import events_of

from moe_ray.config import load_config
from moe_ray.core import Request, SamplingParams, TokenEvent
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.errors import AdapterUnavailable, MoeRayError
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.lora.adapter_file import read_adapter

NAMES = ("attention", "stacked experts", "saved embeddings", "router")
PROMPT = tuple((7 * i + i * i) % 96 for i in range(20))
OUTPUT = 8
Ask = Callable[..., Request]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_mixtral(tmp_path_factory.mktemp("base"), seed=1, initializer_range=0.15, **SHAPE)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(base, directory / name, seed, **WAYS[name]) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def ask(base: Path, adapters: dict[str, Path]) -> Ask:
    config = Checkpoint.open(base).config
    ids = {name: read_adapter(path, config).adapter_id for name, path in adapters.items()}
    count = iter(range(10_000))

    def ask(name: str | None, prompt: Sequence[int] = PROMPT, max_tokens: int = OUTPUT) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        request = Request(f"{name}-{next(count)}", tuple(prompt), sampling)
        if name is not None:
            request = Request(request.request_id, tuple(prompt), sampling, (), "", ids[name], str(adapters[name]))
        return request

    return ask


def engine_of(base: Path, max_loaded: int = 16, **engine: object) -> Engine:
    settings = {"block_size": 4, "max_num_batched_tokens": 16, "kv_cache_gib": 0.001, **engine}
    model = {"path": str(base), "dtype": "float32", "max_model_len": 60}
    config = load_config({"model": model, "engine": settings, "adapters": {"max_loaded": max_loaded}})
    checkpoint = Checkpoint.open(base)
    return build_engine(config, checkpoint, lambda compute: local_experts(checkpoint, compute))


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    assert events[-1].error is None, events[-1].error
    return [token for event in events for token in event.token_ids]


def expected(base: Path, adapter: Path | None, output: Sequence[int], prompt: Sequence[int] = PROMPT) -> list[int]:
    """The likeliest tokens at the places of `output`, by transformers and peft."""
    likeliest = peft_logits(base, adapter, [*prompt, *output]).argmax(-1).tolist()
    return likeliest[len(prompt) - 1 : -1]


@pytest.mark.parametrize("max_loaded", [16, 1], ids=["all at once", "one after the other"])
@pytest.mark.parametrize("stress", [{}, {"kv_cache_tokens": 100, "micro_batches": 2, "speculative": "ngram"}])
def test_each_sequence_is_as_with_its_adapter_alone(
    base: Path, adapters: dict[str, Path], ask: Ask, max_loaded: int, stress: dict[str, object]
) -> None:
    engine = engine_of(base, max_loaded, **stress)
    requests = [ask(name) for name in (*NAMES, None, *NAMES[:2])]
    events = events_of(engine, requests)
    assert len({tuple(tokens(own)) for own in events.values()}) >= len(NAMES), "adapters make a difference"
    for request in requests:
        output = tokens(events[request.request_id])
        name = request.request_id.rpartition("-")[0]
        assert output == expected(base, adapters.get(name), output), request.request_id
    assert engine.stats().adapters == min(max_loaded, len(NAMES))
    engine.close()


def test_prefixes_are_cached_for_each_adapter_by_itself(base: Path, adapters: dict[str, Path], ask: Ask) -> None:
    engine = engine_of(base)
    first = [ask("attention"), ask("stacked experts"), ask(None)]
    before = [tokens(own) for own in events_of(engine, first).values()]
    assert engine.stats().prefix_hit_tokens == 0
    again = [ask("attention"), ask("stacked experts"), ask(None)]
    events = events_of(engine, again)
    assert [tokens(own) for own in events.values()] == before
    assert all(own[0].num_cached_tokens == 16 for own in events.values())
    engine.close()


def test_an_adapter_that_cannot_be_loaded_ends_its_own_requests_only(
    base: Path, adapters: dict[str, Path], ask: Ask, tmp_path: Path
) -> None:
    engine = engine_of(base)
    gone = ask("attention")
    gone = Request(gone.request_id, gone.prompt_token_ids, gone.sampling, (), "", 77, str(tmp_path / "nowhere"))
    changed = ask("attention")
    copy = shutil.copytree(adapters["router"], tmp_path / "copy")
    changed = Request(
        changed.request_id, changed.prompt_token_ids, changed.sampling, (), "", changed.adapter_id, str(copy)
    )
    good = ask("stacked experts")
    events = events_of(engine, [gone, changed, good])
    for request, said in ((gone, "nowhere"), (changed, "have changed")):
        (event,) = events[request.request_id]
        assert isinstance(event.error, AdapterUnavailable)
        assert said in str(event.error)
    output = tokens(events[good.request_id])
    assert output == expected(base, adapters["stacked experts"], output)
    assert engine.stats().adapters == 1
    (event,) = events_of(engine, [gone])[gone.request_id]
    assert isinstance(event.error, MoeRayError), "it is tried again, and fails again"
    engine.close()


def test_a_dropped_adapter_stays_until_its_requests_have_ended(base: Path, adapters: dict[str, Path], ask: Ask) -> None:
    engine = engine_of(base)
    request = ask("stacked experts")
    engine.submit(request)
    output: list[int] = []
    while len(output) < 2:
        engine.wait()
        output += [token for event in engine.step() for token in event.token_ids]
    engine.drop_adapter(request.adapter_id)
    assert engine.stats().adapters == 1
    while engine.has_work:
        output += [token for event in engine.step() for token in event.token_ids]
    assert output == expected(base, adapters["stacked experts"], output)
    assert engine.stats().adapters == 0
    again = ask("stacked experts")
    assert tokens(events_of(engine, [again])[again.request_id]) == output
    engine.close()


def test_an_adapter_is_loaded_before_it_is_asked_for(base: Path, ask: Ask) -> None:
    engine = engine_of(base, max_loaded=1)
    first, second = ask("attention").adapter, ask("router").adapter
    assert first is not None
    assert second is not None
    engine.load_adapter(first)
    engine.load_adapter(second)  # for which there is no room, and nobody waits for it
    while not engine.has_work:
        pass
    assert engine.step() == []
    assert engine.stats().adapters == 1
    assert not engine.has_work
    engine.close()
