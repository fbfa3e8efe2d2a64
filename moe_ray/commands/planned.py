"""A model pulled apart by a configuration: what each actor holds, and what it reads from the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_ray.config import Config
from moe_ray.experts.planning.footprint import Plan, make_plan
from moe_ray.experts.planning.placement import holdings
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.foreign import INDEX, PICKLES
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus, config_of_trunk
from moe_ray.model.weights import weights_of_expert, weights_of_trunk

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and what each actor will read from the checkpoint (empty when only config.json is there)."""

    model_name: str
    directory: Path
    model: ModelConfig
    plan: Plan
    bytes_to_read: dict[str, int]
    experts_per_actor: int = 1


def planned(config: Config, directory: Path, without_weights: bool = False, cards: bool = False) -> Planned:
    """Plan the model of `directory`, checking every tensor's header. Raises `CheckpointError`, `ConfigError`.

    `without_weights`: a directory with no more than its config.json will do. Experts inside the trunk
    (`transport: local`) are planned one by one. `cards`: the actors compute on cards, not on this machine's CPU, so
    the dtype is the checkpoint's unless one is configured.
    """
    from moe_ray.model.compute.resolve import choose_dtype
    from moe_ray.native import build

    model = ModelConfig.load(directory)
    layers, experts = model.num_hidden_layers, model.num_local_experts
    spares, per_actor = config.experts.spare_keys(layers, experts), config.experts.experts_per_actor
    if config.transport == "local":
        spares, per_actor = (), 1
    placed = holdings(layers, experts, per_actor, spares)
    bytes_to_read: dict[str, int] = {}
    weights = any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.gguf", INDEX, *PICKLES))
    if weights or not without_weights:
        checkpoint = Checkpoint.open(directory)
        check_surplus(checkpoint)
        model = config_of_trunk(checkpoint)
        bytes_to_read["Trunk"] = checkpoint.check(weights_of_trunk(model))
        for held in placed:
            bytes_to_read[held.name] = checkpoint.check(
                weight for layer, expert in sorted(held.keys) for weight in weights_of_expert(model, layer, expert)
            )
        checkpoint.close()
    device = "cuda" if cards or config.model.device == "cuda" else "cpu"
    dtype = choose_dtype(config.model.dtype, model.dtype, device, build.cpu_flags(), build.kernels_here())
    plan = make_plan(model, dtype, placed)
    return Planned(config.served_name, directory, model, plan, bytes_to_read, per_actor)


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
