"""`moe-ray plan --fleet`: the best placements of a model on machines, and what to do with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from moe_ray.commands.fleet_file import read_fleet
from moe_ray.commands.planned import Planned
from moe_ray.config import Config
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.advice import Situation, advise
from moe_ray.experts.planning.footprint import WeightsHeld
from moe_ray.experts.planning.machines import Device, Machines
from moe_ray.experts.planning.model_cost import ModelCost
from moe_ray.experts.planning.network_step import Network
from moe_ray.experts.planning.search import DoesNotFit, PlanFor, WithOffload, search, with_offload
from moe_ray.model.formats.held import QUANTIZATIONS, HeldAs

HERE = "here"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Advised:
    """What was found for a model on machines."""

    situation: Situation
    advice: list[str]


def machines_of(fleet: str, network: Network | None, config: Config, again: bool, progress: Progress) -> Machines:
    """The machines of `--fleet`. Raises `ConfigError`."""
    if fleet != HERE:
        if again:
            raise ConfigError("--probe-again goes with --fleet here")
        return read_fleet(fleet, network)
    from moe_ray.bench.machine_probe import probed_machine

    probed = probed_machine(config.cache_dir, progress, again)
    here = Device("CPU here", 0, probed.memory_bytes, probed.rates, is_cpu=True, measured=True)
    return Machines((here,), network or Network())


def formats_asked(text: str | None, planned: Planned, config: Config) -> tuple[str | None, ...]:
    """The quantisations to try; None: as configured, and as stored. Raises `ConfigError` for an unknown one.

    Default: all, where neither the configuration nor the checkpoint says what weights are held as.
    """
    if text is None:
        settled = config.experts.quantize or config.trunk.quantize or config.experts.overrides or planned.held.stored
        return (None,) if settled else (None, *QUANTIZATIONS)
    found: list[str | None] = []
    for name in filter(None, (word.strip() for word in text.split(","))):
        if name not in ("float", *QUANTIZATIONS):
            raise ConfigError(f"--formats: {name!r} is none of float, {', '.join(QUANTIZATIONS)}")
        found.append(None if name == "float" else name)
    return tuple(dict.fromkeys(found)) or (None,)


def advised(planned: Planned, config: Config, machines: Machines, asked: PlanFor, formats: str | None) -> Advised:
    """Search the placements of a planned model, and say what to do. Raises `ConfigError` where nothing fits."""
    model, dtype = planned.model, planned.plan.dtype
    if dtype == "bfloat16" and not all(device.has_bfloat16 for device in machines.devices):
        dtype = "float16"
    wanted = formats_asked(formats, planned, config)

    offloads = {expert: nbytes for expert, nbytes in planned.held.offloaded.items() if nbytes}
    if offloads and all(device.is_cpu for device in machines.devices):
        raise ConfigError("experts.cpu_offload_gib is of experts on cards, and --fleet has none: allowed is 0")

    def costs(of: Sequence[str | None]) -> dict[str, ModelCost]:
        found = {}
        for quantization in of:
            held = _held(planned, dtype, quantization)
            cost = ModelCost.of(model, dtype, held, config.engine.kv_cache_dtype)
            found[quantization or cost.expert.form] = cost
        return found

    if asked.context > planned.plan.context:
        raise ConfigError(f"--context: this model's is at most {planned.plan.context}, got {asked.context}")
    per_actor = sorted({1, planned.experts_per_actor}) if model.num_local_experts <= 16 else [planned.experts_per_actor]
    every = costs(wanted)

    def offloaded(forms: Sequence[str]) -> WithOffload | None:
        """The first of the formats that is held with an offload, where none is configured."""
        tried = () if offloads else forms
        made = (with_offload(form, every[form], machines, asked, planned.experts_per_actor) for form in tried)
        return next((each for each in made if each is not None), None)

    try:
        found = search(every, machines, asked, per_actor)
    except DoesNotFit as error:
        others = [name for name in QUANTIZATIONS if name not in wanted]
        smaller = [name for name in others if _fits(costs([name]), machines, asked, per_actor)]
        said = f"{error}; it would fit in {', '.join(smaller) or 'no other format'}"
        raise ConfigError(said + _would_hold(offloaded(list(every)))) from None
    held = {each.form for each in found}
    otherwise = offloaded([form for form in every if form not in held][:1])
    situation = Situation(found, machines, asked, otherwise)
    if offloads:
        plain = {found[0].form: replace(every[found[0].form], offload=())}
        with suppress(DoesNotFit):
            situation = replace(situation, unoffloaded=search(plain, machines, asked, per_actor)[0])
    return Advised(situation, advise(situation))


def _would_hold(other: WithOffload | None) -> str:
    """What an offload would do where nothing fits without."""
    if other is None:
        return ""
    streams = max(other.found.steps)
    rate = other.found.steps[streams].tokens_per_s
    return (
        f"; so would {other.gib:g} GiB of each expert actor in the host's memory (--cpu-offload-gib {other.gib:g}), "
        f"with {other.found.form} at {rate:.1f} tokens/s of {streams} sequences"
    )


def _fits(costs: Mapping[str, ModelCost], machines: Machines, asked: PlanFor, per_actor: Sequence[int]) -> bool:
    try:
        return bool(search(costs, machines, asked, per_actor))
    except DoesNotFit:
        return False


def _held(planned: Planned, dtype: str, quantization: str | None) -> WeightsHeld:
    """What weights are held as in a format; None: as planned, floats in `dtype`."""
    held = planned.held
    if quantization is None:
        experts = {expert: replace(how, dtype=dtype) for expert, how in held.experts.items()}
        return replace(held, trunk=replace(held.trunk, dtype=dtype), experts=experts)
    quantised = HeldAs(dtype, quantization)
    experts = dict.fromkeys(range(planned.model.num_local_experts), quantised)
    return WeightsHeld(quantised, experts, held.stored, held.offloaded)
