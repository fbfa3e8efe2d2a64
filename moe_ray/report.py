"""What `moe-ray plan` and the start of `moe-ray serve` print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_ray.config import Config
from moe_ray.model.checkpoint import INDEX, PICKLES, Checkpoint, expert_specs, trunk_specs
from moe_ray.model.model_config import ModelConfig
from moe_ray.plan import Plan, make_plan

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and what each actor will read from the checkpoint (empty when only config.json is there)."""

    model_name: str
    directory: Path
    model: ModelConfig
    plan: Plan
    bytes_to_read: dict[str, int]


def planned(config: Config, directory: Path, without_weights: bool = False) -> Planned:
    """Plan the model of `directory`, checking every tensor's header. Raises `CheckpointError`, `ConfigError`.

    `without_weights`: a directory with no more than its config.json will do.
    """
    from moe_ray.engine.numerics import dtype_name

    model = ModelConfig.load(directory)
    cuda = config.model.device == "cuda"
    plan = make_plan(model, dtype_name(config, model, cuda))
    bytes_to_read: dict[str, int] = {}
    weights = any(any(directory.glob(pattern)) for pattern in ("*.safetensors", INDEX, *PICKLES))
    if weights or not without_weights:
        checkpoint = Checkpoint.open(directory)
        bytes_to_read["Trunk"] = checkpoint.check(trunk_specs(model))
        for expert in range(model.num_local_experts):
            layers = range(model.num_hidden_layers)
            bytes_to_read[f"Expert{expert}"] = checkpoint.check(
                spec for layer in layers for spec in expert_specs(model, layer, expert)
            )
        checkpoint.close()
    return Planned(config.served_name, directory, model, plan, bytes_to_read)


def print_plan(console: Console, planned: Planned, gpu_gib: float | None) -> None:
    """Print the plan as a table; with `gpu_gib`, what fits cards of that size."""
    model, plan = planned.model, planned.plan
    console.print(
        f"[bold]{planned.model_name}[/]  {sum(a.parameters for a in plan.actors) / 1e9:.2f} B parameters, "
        f"{model.num_hidden_layers} layers, {model.num_local_experts} experts, top {model.num_experts_per_tok}, "
        f"{plan.dtype}, {_size(plan.total_bytes)} in all"
    )
    console.print(str(planned.directory), style="dim", markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("actor", "parameters", "weights", "reads from disk"):
        table.add_column(column, justify="left" if column == "actor" else "right")
    if gpu_gib is not None:
        table.add_column(f"on {gpu_gib:g} GiB", justify="right")
    fits = plan.fits(int(gpu_gib * GIB)) if gpu_gib is not None else []
    for i, actor in enumerate(plan.actors):
        reads = planned.bytes_to_read.get(actor.name)
        row = [
            actor.name,
            f"{actor.parameters / 1e6:,.1f} M",
            _size(actor.weight_bytes),
            "-" if reads is None else _size(reads),
        ]
        if fits:
            _, ok, tokens = fits[i]
            row.append(("fits" + (f", {tokens:,} KV tokens" if tokens else "")) if ok else "does not fit")
        table.add_row(*row)
    console.print(table)
    console.print(
        f"KV cache: {plan.kv_bytes_per_token:,} B a token, {_size(plan.kv_bytes_per_token * plan.context)} "
        f"for one sequence of {plan.context:,} tokens"
    )


def plan_json(planned: Planned, gpu_gib: float | None) -> str:
    """The plan as one JSON object."""
    plan = planned.plan
    fits = {a.name: ok for a, ok, _ in plan.fits(int(gpu_gib * GIB))} if gpu_gib is not None else {}
    rows = [
        {
            "actor": actor.name,
            "parameters": actor.parameters,
            "weight_bytes": actor.weight_bytes,
            "read_bytes": planned.bytes_to_read.get(actor.name),
            **({"fits": fits[actor.name]} if fits else {}),
        }
        for actor in plan.actors
    ]
    return json.dumps(
        {
            "model": planned.model_name,
            "dtype": plan.dtype,
            "total_weight_bytes": plan.total_bytes,
            "kv_bytes_per_token": plan.kv_bytes_per_token,
            "context": plan.context,
            "rows": rows,
        },
        indent=1,
    )


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
