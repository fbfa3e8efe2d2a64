"""Two processes: one that compiles a small model's kernels ahead, one that launches them. No Triton interpreter."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from ahead_cases import SMALL
from step_batch import step_batch

from moe_ray.engine.kv_cache import KVCache, cache_dtype
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.compute.triton import ahead
from moe_ray.model.compute.triton.expert import TritonFFN
from moe_ray.model.compute.triton.launch import Launch, triton
from moe_ray.model.compute.triton.model_launches import (
    BlankTrunkWeights,
    Held,
    expert_launches,
    trunk_launches,
)
from moe_ray.model.compute.triton.ops import TritonOps
from moe_ray.model.compute.triton.reading import blank_expert
from moe_ray.model.model_config import ModelConfig

COUNTS = (1, 2, 3, 5, 16, 17, 40, 64, 65, 130)


def case_of(case: dict[str, str]) -> tuple[ModelConfig, Held]:
    more = {"shared_expert_intermediate_size": 256} if case.get("family") == "qwen2_moe" else {}
    config = ModelConfig.from_dict({**SMALL, **more, "model_type": case.get("family", "mixtral")})
    dtype = case.get("dtype", "bfloat16")
    cache = cache_dtype(case["cache"], getattr(torch, dtype)) if "cache" in case else None
    held = Held(dtype, case.get("quantize"), case.get("trunk_quantize"), cache, max_model_len=2048)
    return config, held


def compile_all(case: dict[str, str], capability: int) -> None:
    config, held = case_of(case)
    launches = [*trunk_launches(config, held), *expert_launches(config, held)]
    compiled = ahead.compile_ahead(launches, capability)
    print(json.dumps({"made": compiled.made, "found": compiled.found}))


class CardWithoutMemory:
    """A driver that loads and launches nothing."""

    def __init__(self, capability: int) -> None:
        self._capability, self.launches = capability, 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Any:
        def launch(*_: object) -> None:
            self.launches += 1

        return launch


class RealOps(TritonOps):
    """Launches as on a card, over matrices of any values."""

    def hold(self, rows: Any, weights: Any) -> Any:
        from moe_ray.model.compute.triton.tiles import TiledWeight, Tiling

        form = self._form(rows, weights)
        if form.grouping is None:
            return weights.tensor(*rows)
        outputs, inputs = sum(each.shape[0] for each in rows), rows[0].shape[1]
        return TiledWeight.blank(Tiling(outputs, inputs, 1, weights.dtype, form.grouping))

    def hold_shared(self, matrices: Any, weights: Any) -> Any:
        gate, up, down = matrices
        forms = (self._form([gate, up], weights), self._form([down], weights))
        return TritonFFN(blank_expert(forms, gate.shape, False))


@torch.inference_mode()
def launch_all(case: dict[str, str], capability: int) -> None:
    """Steps and calls of many sizes, as a process with a card launches them."""
    config, held = case_of(case)
    card, counts = CardWithoutMemory(capability), {"made": 0, "found": 0}
    triton.runtime.driver.set_active(card)

    def count(*, cache_hit: bool, **_: object) -> None:
        counts["found" if cache_hit else "made"] += 1

    triton.knobs.compilation.listener = count
    trunk = TorchTrunk(
        BlankTrunkWeights(config, held.torch_dtype),
        held.max_model_len,
        True,
        RealOps(config, torch.device("cpu"), Launch.run, held.trunk_quantize),
    )
    cache = KVCache(config, 16 * 140, 16, held.cache or held.torch_dtype, torch.device("cpu"))
    steps = [[(n, n + 1) for n in range(20, 20 + count)] for count in COUNTS]
    steps += [[(0, 9)], [(0, 100), (30, 31)], [(600, 601)], [(250, 260), (90, 91)], [(0, 200), (0, 30)]]
    for chunks in steps:
        batch = step_batch(chunks, 16, 40)
        work = trunk.begin(batch, cache)
        for layer in range(config.num_hidden_layers):
            routed = work.route(layer)
            work.add_shared(layer)
            assert routed is not None
            work.combine(routed, routed.rows)
        work.logits([end - 1 for end in batch.query_start[1:]])
    forms = _forms(config, held)
    biases = config.family.expert_biases
    weights = blank_expert((forms[0], forms[1]), (config.intermediate_size, config.hidden_size), biases)
    ffn = TritonFFN(weights, config.clamped_swiglu)
    rows = torch.zeros(1000, config.hidden_size, dtype=held.torch_dtype)
    of_rows = torch.ones(1000)
    for count_of in (*COUNTS, 700):
        for first in (0, 1, 7):
            ffn.forward(rows[first : first + count_of], of_rows[first : first + count_of])
    print(json.dumps({**counts, "launches": card.launches}))


def _forms(config: ModelConfig, held: Held) -> list[Any]:
    from moe_ray.model.compute.native.held_form import form_of
    from moe_ray.model.matrix import FloatMatrix

    shapes = ((config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size))
    return [
        form_of([FloatMatrix(torch.empty(*shape, dtype=held.torch_dtype))], held.dtype, held.quantize)
        for shape in shapes
    ]
