"""The same tokens, bit for bit, under any circumstances: for every dtype, quantisation, cache, family and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapted import SHAPE, WAYS, save_adapter
from backends import BEST
from invariance import MOST, Promise, requests_of
from random_families import CASES, save_random_family
from random_mixtral import save_random_mixtral

from moe_ray.core import AdapterRef
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.lora.adapter_file import read_adapter

EXAMPLES = 4
pytestmark = pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")
IN_BFLOAT16 = {"model": {"dtype": "bfloat16"}}
HELD: dict[str, dict[str, Any]] = {
    "bfloat16": IN_BFLOAT16,
    "float16": {"model": {"dtype": "float16"}},
    "float32": {"model": {"dtype": "float32"}},
    **{
        name: {**IN_BFLOAT16, "experts": {"quantize": name}, "trunk": {"quantize": name}}
        for name in ("int8", "int4", "nf4")
    },
    **{f"a cache of {name}": {**IN_BFLOAT16, "engine": {"kv_cache_dtype": name}} for name in ("int8", "fp8")},
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {**SHAPE, "max_position_embeddings": 2 * MOST}
    return save_random_mixtral(tmp_path_factory.mktemp("base"), seed=1, initializer_range=0.15, **shape)


@pytest.mark.parametrize("held", HELD)
def test_as_it_is_held(mixtral: Path, held: str) -> None:
    Promise(mixtral, HELD[held], requests_of(SHAPE["vocab_size"])).keep(EXAMPLES)


@pytest.mark.parametrize("case", CASES)
def test_of_a_family(case: str, tmp_path: Path) -> None:
    save_random_family(tmp_path, case)
    by_torch = case.startswith("phimoe")
    dtype = {"model": {"dtype": "float32" if by_torch else "bfloat16"}}
    Promise(tmp_path, dtype, requests_of(128), case).keep(EXAMPLES, 1e-4 if by_torch else 0.0)


@pytest.mark.parametrize("held", ["int4", "a cache of int8", "a cache of fp8"])
def test_with_sinks_and_windows(held: str, tmp_path: Path) -> None:
    """gpt-oss, whose experts have biases beside their codes."""
    save_random_family(tmp_path, "gpt_oss")
    Promise(tmp_path, HELD[held], requests_of(128), "gpt_oss").keep(EXAMPLES)


@pytest.mark.parametrize("held", ["int8", "a cache of int8", "a cache of fp8"])
def test_latents_as_they_are_held(held: str, tmp_path: Path) -> None:
    save_random_family(tmp_path, "deepseek_v3")
    Promise(tmp_path, HELD[held], requests_of(128), held).keep(EXAMPLES)


@pytest.mark.parametrize("held", ["bfloat16", "int8"])
def test_with_adapters(mixtral: Path, held: str, tmp_path: Path) -> None:
    refs: list[AdapterRef | None] = [None]
    config = Checkpoint.open(mixtral).config
    for seed, name in enumerate(("attention", "stacked experts", "router")):
        directory = save_adapter(mixtral, tmp_path / name, seed, **WAYS[name])
        refs.append(AdapterRef(read_adapter(directory, config).adapter_id, str(directory)))
    Promise(mixtral, HELD[held], requests_of(SHAPE["vocab_size"], refs), "adapters").keep(EXAMPLES)
