"""The `experts` section: the expert actors, spares, and the calls to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from moe_ray.config.actors import ActorOptions, ReportsSection, ScaledOptions
from moe_ray.config.number_sets import parse_runs
from moe_ray.config.section import explain
from moe_ray.core import ExpertKey
from moe_ray.errors import ConfigError

MOST_ACTORS: Final = 16
"""Expert actors, where `experts_per_actor` is auto: each is a process with memory of its own beside its weights."""


class ExpertOptions(ScaledOptions):
    """What holds for the actors of one expert, or of a group of them."""

    cpu_offload_gib: float = Field(default=0.0, ge=0)
    """GiB of its weights that an expert actor on a card keeps in the host's memory, in whole layers: they are copied to
    the card when calls need them, which is slower. Not of spares."""
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)
    """Most replicas of one expert on a node; further ones wait for another node. Default: no limit, spread where there
    is room."""


class AutoscaleSection(ReportsSection):
    """When experts get and lose replicas by themselves."""

    enabled: bool = False
    """Change the number of replicas of each expert by its load."""
    target_busy: float = Field(default=0.6, gt=0, le=1)
    """Share of its time that a replica should spend computing."""
    up_after_s: float = Field(default=1.0, ge=0)
    """Seconds for which more replicas must be wanted before one is started."""
    down_after_s: float = Field(default=30.0, ge=0)
    """Seconds for which fewer replicas must be enough before one is stopped."""
    max_total_replicas: int | None = Field(default=None, ge=1)
    """Most replicas of all experts together; where they do not suffice, the hottest experts get them.
    Default: no limit."""


def _checked_runs(text: str) -> str:
    parse_runs(text)
    return text


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Layers = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_checked_runs)]
"""`all`, or layers such as `0,2,4-6`."""


class Spare(ActorOptions):
    """An actor beside the experts' own that holds some layers of some. What is not set is as in `experts`."""

    experts: Mapping[Annotated[int, Field(ge=0)], Layers] = Field(min_length=1)
    """Expert number → its layers: {3: 8-15, 5: all}."""

    def keys(self, number: int, num_layers: int, num_experts: int) -> frozenset[ExpertKey]:
        """The (layer, expert) keys of spare `number`. Raises `ConfigError` for one that the model does not have."""
        keys: set[ExpertKey] = set()
        for expert, text in self.experts.items():
            name = f"`experts.spares.{number}.experts.{expert}`"
            if expert >= num_experts:
                raise ConfigError(f"{name}: no such expert: this model has 0 to {num_experts - 1}")
            for run in parse_runs(text) or (range(num_layers),):
                if run[-1] >= num_layers:
                    raise ConfigError(f"{name}: no layer {run[-1]}: this model has 0 to {num_layers - 1}, got {text!r}")
                keys.update((layer, expert) for layer in run)
        return frozenset(keys)


class ExpertsSection(ExpertOptions):
    """The expert actors and the calls to them."""

    experts_per_actor: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Number of consecutive experts that share one actor: 2 makes Experts0-1, Experts2-3, … auto: 1, and of models with
    more than 16 experts so many that there are at most 16 actors."""
    autoscale: AutoscaleSection = AutoscaleSection()
    """When experts get and lose replicas by load."""
    max_replicas_by_hand: int = Field(default=64, ge=1)
    """Most replicas of one expert that `moe-ray scale` may ask for."""
    overrides: Mapping[int, Mapping[str, Any]] = {}
    """Expert number → keys of this section that differ for its actors, e.g. {3: {num_replicas: 2}}."""
    spares: tuple[Spare, ...] = ()
    """Further actors with hot layers of hot experts, e.g. [{experts: {3: 8-15, 5: all}}]; they do not autoscale."""
    recorded_load: Path | None = None
    """File with a recorded load, the JSON of `GET /experts`. `moe-ray serve` gives hot experts replicas on cards that
    remain, and layers with most of it stay on the card where there is an offload. Default: no record."""
    deadline_s: float = Field(default=60.0, gt=0)
    """Seconds that a call waits for a live replica before its requests fail with 503."""
    on_expert_loss: Literal["wait", "fail", "renormalise"] = "wait"
    """What happens to a call while its expert has no live replica. wait: at most `deadline_s`. fail: 503 at once.
    renormalise: the token goes on with its other experts, and the response says so."""
    call_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that a replica has to answer a call; then it is sent again, to another replica if there is one."""
    card_mailboxes: bool = False
    """Rows between a trunk and experts on the same card go through its memory where CUDA allows it and calls go over
    sockets; elsewhere they go through the host's memory as ever. Not measured yet."""
    handover_s: float = Field(default=120.0, ge=0)
    """Most seconds that a replica which is being replaced goes on serving while its successor loads."""
    refresh_s: float = Field(default=5.0, gt=0)
    """Seconds between two look-ups of the replicas by a trunk; when a link breaks it looks at once."""

    @field_validator("spares")
    @classmethod
    def _as_the_experts(cls, spares: tuple[Spare, ...], info: ValidationInfo) -> tuple[Spare, ...]:
        """Each spare with what it does not say itself; it has one replica unless it says otherwise."""
        shared = {name: info.data[name] for name in ActorOptions.model_fields if name in info.data}
        shared.pop("num_replicas", None)
        return tuple(
            spare.model_copy(update={name: v for name, v in shared.items() if name not in spare.model_fields_set})
            for spare in spares
        )

    def grouped(self, num_experts: int) -> ExpertsSection:
        """This section with a number of experts an actor, for a model of `num_experts`.

        >>> [ExpertsSection().grouped(experts).experts_per_actor for experts in (8, 16, 60, 128)]
        [1, 1, 4, 8]
        """
        if self.experts_per_actor != "auto":
            return self
        return self.model_copy(update={"experts_per_actor": -(-num_experts // MOST_ACTORS)})

    @property
    def group_size(self) -> int:
        """Experts an actor; 1 while no model is known for which `auto` would be more."""
        return 1 if self.experts_per_actor == "auto" else self.experts_per_actor

    def of(self, expert: int) -> ExpertOptions:
        """The options of the actors that hold `expert`: those of the one override in its group, or this section's.

        Raises `ConfigError` on an unknown key or wrong value in an override, or on two of one group that differ.
        """
        group = expert // self.group_size
        named = [number for number in sorted(self.overrides) if number // self.group_size == group]
        found = [self._with({}, ""), *(self._with(self.overrides[n], f"overrides.{n}.") for n in named)]
        for number, options in zip(named[1:], found[2:], strict=True):
            if options != found[1]:
                raise ConfigError(
                    f"`experts.overrides.{named[0]}` and `experts.overrides.{number}` differ, but these experts share "
                    f"an actor (`experts.experts_per_actor` is {self.group_size}): give both the same"
                )
        return found[-1]

    def with_replicas(self, added: Mapping[int, int]) -> ExpertsSection:
        """This section with `added` replicas more of each expert, expert -> how many; of experts with own actors."""
        overrides = dict(self.overrides)
        for expert, count in added.items():
            start, most = self.of(expert).num_replicas + count, self.of(expert).max_replicas
            bound = {} if most is None else {"max_replicas": max(start, most)}
            overrides[expert] = {**overrides.get(expert, {}), "num_replicas": start, **bound}
        return self.model_copy(update={"overrides": overrides})

    def quantize_of(self, expert: int) -> str | None:
        """What the weights of `expert` are quantised to. Raises as `of`."""
        return self.of(expert).quantize

    def offload_bytes_of(self, expert: int) -> int:
        """Bytes of the weights of `expert` that stay in the host's memory at least. Raises as `of`."""
        return int(self.of(expert).cpu_offload_gib * 2**30)

    def spare_keys(self, num_layers: int, num_experts: int) -> tuple[frozenset[ExpertKey], ...]:
        """The keys of each spare of a model. Raises `ConfigError` where spares or overrides name what it lacks."""
        for number in self.overrides:
            if not 0 <= number < num_experts:
                raise ConfigError(
                    f"`experts.overrides.{number}`: no such expert: this model has 0 to {num_experts - 1}"
                )
        return tuple(spare.keys(i, num_layers, num_experts) for i, spare in enumerate(self.spares))

    def _with(self, override: Mapping[str, Any], prefix: str) -> ExpertOptions:
        base = {name: getattr(self, name) for name in ExpertOptions.model_fields}
        try:
            return ExpertOptions(**{**base, **override})
        except ValidationError as error:
            raise ConfigError(explain(error, f"experts.{prefix}")) from None
