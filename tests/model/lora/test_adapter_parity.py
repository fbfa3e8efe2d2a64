"""Sequences with adapters are computed as transformers and peft compute them, several adapters in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted import (
    SHAPE,
    WAYS,
    AdaptedModel,
    peft_logits,
    save_adapter,
    save_old_adapter,
)
from backends import open_backend
from random_mixtral import save_random_mixtral

from moe_ray.errors import AdapterNotHeld

PROMPTS = [[(7 * i + 3 * j + j * j) % 96 for j in range(9 + i)] for i in range(len(WAYS) + 2)]
OUTPUT = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_mixtral(tmp_path_factory.mktemp("base"), seed=1, initializer_range=0.15, **SHAPE)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    saved = {
        name: save_adapter(base, directory / name, seed, **config) for seed, (name, config) in enumerate(WAYS.items())
    }
    return {**saved, "each expert's own": save_old_adapter(directory / "old", 5)}


@pytest.mark.parametrize(
    "backend", ["native float32", "torch float32", pytest.param("triton trunk float32", marks=pytest.mark.slow)]
)
def test_each_sequence_is_as_with_its_adapter_alone(backend: str, base: Path, adapters: dict[str, Path]) -> None:
    model = AdaptedModel(base, open_backend(backend, 2))
    plain = model.logits([(0, PROMPTS[0])])[0]
    ids: dict[int, Path | None] = {0: None, **{model.add(path).adapter_id: path for path in adapters.values()}}
    assert len(ids) == len(adapters) + 1, "each has an id of its own"
    order = sorted(ids)
    texts = list(zip(order, PROMPTS, strict=True))
    generated = model.generate(texts, OUTPUT)
    computed = model.logits([(number, tokens) for number, tokens in zip(order, generated, strict=True)])
    assert torch.equal(model.logits([(0, PROMPTS[0])])[0], plain), "the model itself is as it was"
    for number, tokens, logits in zip(order, generated, computed, strict=True):
        name = next((name for name, path in adapters.items() if path == ids[number]), "none")
        expected = peft_logits(base, ids[number], tokens)
        if number:
            assert (expected - peft_logits(base, None, tokens)).abs().max() > 0.1, f"{name}: it changes something"
        torch.testing.assert_close(
            logits, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert expected.argmax(-1)[-OUTPUT - 1 : -1].tolist() == tokens[-OUTPUT:], name
    assert model.trunk.adapter_bytes > 0
    assert model.ffn.adapter_bytes > 0
    for number in order[1:]:
        model.trunk.remove_adapter(number)
    assert not model.trunk.adapter_ids
    assert not model.trunk.adapter_bytes
    with pytest.raises(AdapterNotHeld, match=f"adapter {order[1]} is not held by this trunk"):
        model.logits(texts[:2])


@pytest.mark.parametrize(
    ("backend", "quantize"),
    [("native bfloat16", None), ("native bfloat16", "int8"), ("native float16", None), ("native float32", "int4")],
)
def test_alone_and_in_a_batch_are_the_same_bits(
    backend: str, quantize: str | None, base: Path, adapters: dict[str, Path]
) -> None:
    model = AdaptedModel(base, open_backend(backend, 2), quantize)
    order = [0, 0, *sorted(model.add(path).adapter_id for path in adapters.values())]
    order = sorted(order + order[3:5])
    texts = [(number, PROMPTS[index % len(PROMPTS)]) for index, number in enumerate(order)]
    together = model.generate(texts, OUTPUT)
    logits = model.logits([(number, tokens) for number, tokens in zip(order, together, strict=True)])
    for text, tokens, own in zip(texts, together, logits, strict=True):
        assert model.generate([text], OUTPUT)[0] == tokens
        assert torch.equal(model.logits([(text[0], tokens)])[0], own)
