"""What this software takes beside products: a step, a layer, and a layer whose experts are in other processes.

Two random models that differ in their layers alone are served in one process and over sockets. The difference of their
steps is what layers take; what remains is the step's own. What their products take by the kernels' curves is taken
away. An expert's weights are as large as caches are, as in models that are served: software runs slower after they went
through, and kernels that start cold are part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from moe_ray.bench.m1 import RECIPE_VERSION, Recipe, make_model
from moe_ray.bench.offline import EngineBenchOptions, run_engine
from moe_ray.bench.roofline import distinct_experts
from moe_ray.config import load_config
from moe_ray.console import Report as Progress
from moe_ray.convert.demo import cached_model
from moe_ray.experts.planning.footprint import WeightsHeld
from moe_ray.experts.planning.machines import Device, Machines, Spread
from moe_ray.experts.planning.model_cost import ModelCost
from moe_ray.experts.planning.rates import Measured, Overhead
from moe_ray.experts.planning.step_time import decode_step
from moe_ray.model.formats.held import HeldAs
from moe_ray.model.model_config import ModelConfig

LAYERS: Final = (1, 3)
HIDDEN, INNER = 1024, 1792
"""11 MB an expert in bfloat16."""
VOCAB: Final = 32_000
"""As many as real models have: sampling goes over all logits."""
SEQUENCES: Final = (1, 8, 32)
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 48
REPEATS: Final = 3
CARRIERS: Final = ("local", "socket")
PLAIN: Final = {"model": {"dtype": "bfloat16"}, "experts": {"quantize": None}, "trunk": {"quantize": None}}
"""Whatever the environment says."""


def small(layers: int) -> Recipe:
    """A model of so many layers."""
    return Recipe(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 256,
        vocab_size=VOCAB,
        max_position_embeddings=256,
    )


def measure_software(cache_dir: Path, products: Measured, progress: Progress) -> dict[str, dict[str, float]]:
    """The overhead of steps, of layers in one process, and of layers over sockets, as `Overhead`'s fields.

    `products`: what the kernels take, without any overhead.
    """
    few, many = LAYERS
    directories = {layers: _directory(cache_dir, layers, progress) for layers in LAYERS}
    steps = {layers: _step_s(directory, progress) for layers, directory in directories.items()}
    told = {layers: _products_s(directory, products) for layers, directory in directories.items()}

    def of_a_layer(seconds: dict[int, dict[str, list[float]]], carrier: str) -> list[float]:
        pairs = zip(seconds[few][carrier], seconds[many][carrier], strict=True)
        return [(b - a) / (many - few) for a, b in pairs]

    layer = {carrier: of_a_layer(steps, carrier) for carrier in CARRIERS}
    beside = {
        carrier: [max(0.0, a - b) for a, b in zip(layer[carrier], of_a_layer(told, carrier), strict=True)]
        for carrier in CARRIERS
    }
    head = [step - few * each for step, each in zip(told[few]["local"], of_a_layer(told, "local"), strict=True)]
    own = [
        max(0.0, step - few * each - products_s)
        for step, each, products_s in zip(steps[few]["local"], layer["local"], head, strict=True)
    ]
    return {
        "local": asdict(fitted([(calls(n), 2.0 * n, s) for n, s in zip(SEQUENCES, beside["local"], strict=True)])),
        "spread": asdict(fitted([(calls(n), 2.0 * n, s) for n, s in zip(SEQUENCES, beside["socket"], strict=True)])),
        "step": asdict(_line(own)),
    }


def placed_here(rates: Measured, memory_bytes: int, num_experts: int, in_process: bool) -> tuple[Machines, Spread]:
    """This machine, and all of a model on it."""
    machine = Machines((Device("CPU here", 0, memory_bytes, rates, is_cpu=True, measured=True),))
    return machine, Spread((0,), ((0,),) * num_experts, in_process, 1, ((0, 1 if in_process else 1 + num_experts),))


def _products_s(directory: Path, products: Measured) -> dict[str, list[float]]:
    """Seconds of a decoding step's products by carrier, at `SEQUENCES`."""
    model, held = ModelConfig.load(directory), HeldAs("bfloat16")
    cost = ModelCost.of(model, "bfloat16", WeightsHeld(held, dict.fromkeys(range(model.num_local_experts), held)))
    context = PROMPT_TOKENS + OUTPUT_TOKENS / 2
    return {
        carrier: [
            decode_step(
                cost, *placed_here(products, 1, cost.num_experts, carrier == "local"), count, context, micro_batches=1
            ).seconds
            for count in SEQUENCES
        ]
        for carrier in CARRIERS
    }


def calls(sequences: int) -> float:
    """Experts of a layer that so many tokens reach in these models."""
    recipe = small(LAYERS[0])
    return distinct_experts(recipe.num_local_experts, recipe.num_experts_per_tok, sequences)


def fitted(points: Sequence[tuple[float, float, float]]) -> Overhead:
    """base + per_call * calls + per_row * rows through (calls, rows, seconds), none of the three below 0.

    From the first two points, where rows hardly count, the line over calls; what the last is above it, is its rows'.
    """
    (calls0, rows0, s0), (calls1, _, s1), (calls2, rows2, s2) = points
    per_call = max(0.0, (s1 - s0) / (calls1 - calls0))
    base = max(0.0, s0 - per_call * calls0)
    per_row = max(0.0, (s2 - base - per_call * calls2) / (rows2 - rows0))
    return Overhead(1e6 * base, 1e6 * per_call, 1e6 * per_row)


def _line(own: Sequence[float]) -> Overhead:
    """base + per_row * sequences, least squares over `SEQUENCES`."""
    mean_x, mean_y = sum(SEQUENCES) / len(own), sum(own) / len(own)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(SEQUENCES, own, strict=True))
    slope /= sum((x - mean_x) ** 2 for x in SEQUENCES)
    return Overhead(1e6 * max(0.0, mean_y - slope * mean_x), 0.0, 1e6 * max(0.0, slope))


def _step_s(directory: Path, progress: Progress) -> dict[str, list[float]]:
    """Seconds of a decoding step by carrier, at `SEQUENCES`."""
    report = run_engine(
        EngineBenchOptions(
            model=str(directory),
            config=load_config(
                {"model": {"dtype": "bfloat16"}, "experts": {"quantize": None}, "trunk": {"quantize": None}}
            ),
            carriers=CARRIERS,
            concurrency=SEQUENCES,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            repeats=REPEATS,
            micro_batches=1,
        ),
        progress,
    )
    found: dict[str, list[float]] = {"local": [], "socket": []}
    for row in report.rows:
        rate = row["decode_tokens_per_s"] or row["output_tokens_per_s"]
        assert isinstance(rate, float)
        found[str(row["carrier"])].append(int(str(row["concurrency"])) / rate)
    return found


def _directory(cache_dir: Path, layers: int, progress: Progress) -> Path:
    recipe = small(layers)
    key = hashlib.sha256(f"{RECIPE_VERSION} {asdict(recipe)}".encode()).hexdigest()
    target = cache_dir.expanduser() / f"bench-probe-{layers}"
    return cached_model(target, key, lambda _, made: make_model(made, recipe, progress), progress)
