"""What a model needs, before anything is started: bytes per actor, KV cache, what fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moe_ray.core import ExpertKey
from moe_ray.experts.planning.offload import ON_CARD, HostShare, host_share
from moe_ray.experts.planning.placement import Holding, holdings
from moe_ray.model.families import Weight
from moe_ray.model.formats import StoredWeight, dtype_bytes
from moe_ray.model.formats.grouped import Grouping
from moe_ray.model.formats.held import HeldAs, grouping
from moe_ray.model.kv_bytes import held_in, kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import weights_of_expert, weights_of_model, weights_of_trunk

LEAST_CACHE_TOKENS = 2048
"""A trunk is not put on a card that leaves its KV cache fewer tokens (or one whole sequence, where that is less)."""


@dataclass(frozen=True, slots=True)
class WeightsHeld:
    """What the weights of a model are held as, once they are loaded."""

    trunk: HeldAs
    experts: Mapping[int, HeldAs] = field(default_factory=dict)
    """By expert; those that are not here are floats in the trunk's dtype."""
    stored: Mapping[Weight, StoredWeight] = field(default_factory=dict)
    """Weights of a checkpoint that is quantised: these keep their own bits."""

    offloaded: Mapping[int, int] = field(default_factory=dict)
    """By expert, the first of an actor: the bytes of that actor that stay in the host's memory at least."""
    spares: tuple[HeldAs, ...] = ()
    """What each spare holds its experts as; those that are not here: as the experts' own actors."""

    @staticmethod
    def kept(found: Mapping[Weight, StoredWeight], by_triton: bool) -> dict[Weight, StoredWeight]:
        """Those of a checkpoint's weights that kernels compute on in their own bits; of float8 Triton's alone do."""
        return {
            weight: each
            for weight, each in found.items()
            if each.grouping is not None and (by_triton or each.grouping.float8 is None)
        }

    def in_spare(self, number: int) -> WeightsHeld:
        """The same for one spare."""
        if number >= len(self.spares):
            return self
        return replace(self, experts=dict.fromkeys(self.experts, self.spares[number]))

    @staticmethod
    def all_in(dtype: str) -> WeightsHeld:
        """Everything as floats of one dtype."""
        return WeightsHeld(HeldAs(dtype))

    def held_as(self, weight: Weight) -> str:
        """What a weight is held as: a float dtype, a quantisation, or the format of a quantised checkpoint."""
        stored = self.as_stored(weight)
        return stored.format if stored is not None else self._of(weight).of(weight.role)

    def as_stored(self, weight: Weight) -> StoredWeight | None:
        """How a weight that keeps its own bits is stored; None: it does not, or is to be quantised to fewer bits."""
        stored = self.stored.get(weight)
        if stored is None or stored.grouping is None:
            return stored
        wanted = grouping(self._of(weight).of(weight.role), weight.shape[-1])
        return None if wanted is not None and wanted.bits < stored.grouping.bits else stored

    def nbytes(self, weight: Weight) -> int:
        """Bytes in memory of a weight, scales with it."""
        how = self._grouping(weight)
        return how.nbytes(_matrix(weight)) if how is not None else weight.numel * dtype_bytes(self.held_as(weight))

    def scale_bytes(self, weight: Weight) -> int:
        """Of those, the bytes of scales and offsets."""
        how = self._grouping(weight)
        return 0 if how is None else how.nbytes(_matrix(weight)) - weight.numel * how.bits // 8

    def _grouping(self, weight: Weight) -> Grouping | None:
        stored = self.as_stored(weight)
        return stored.grouping if stored is not None else grouping(self.held_as(weight), weight.shape[-1])

    def _of(self, weight: Weight) -> HeldAs:
        if weight.expert is None:
            return self.trunk
        return self.experts.get(weight.expert, HeldAs(self.trunk.dtype))


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """One actor: what it holds."""

    name: str
    parameters: int
    weight_bytes: int
    spare: bool = False
    """It holds copies of what others hold."""
    scale_bytes: int = 0
    """Of `weight_bytes`: scales and offsets of quantised weights."""
    held_as: tuple[str, ...] = ()
    """What its matrices are held as; those of a trunk without its embedding and gates."""
    kv_bytes_per_token: int = 0
    """Of a trunk: with the draft model's. 0: it is no trunk."""
    host: HostShare = ON_CARD
    """Of an expert: what of its weights is in the host's memory."""

    @property
    def card_bytes(self) -> int:
        """What it takes of its card."""
        return self.host.on_card(self.weight_bytes)


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """A draft model, which every trunk holds beside its own weights."""

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int

    @staticmethod
    def of(model: ModelConfig, dtype: str, quantize: str | None = None, kv_cache_dtype: str = "auto") -> DraftPlan:
        """Plan a draft model whose rows are in `dtype`; `quantize`: of all its matrices."""
        held = HeldAs(dtype, quantize)
        weights = WeightsHeld(held, dict.fromkeys(range(model.num_local_experts), held))
        every = [weight for weight in weights_of_model(model) if weight.role != "router"]
        cache = kv_bytes_per_token(model, held_in(kv_cache_dtype, dtype))
        return DraftPlan(sum(weight.numel for weight in every), sum(map(weights.nbytes, every)), cache)


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole model, pulled apart."""

    dtype: str
    actors: tuple[ActorPlan, ...]
    """The trunk first, then those of variants, then the experts in order, then spares."""
    kv_bytes_per_token: int
    """Of model and draft model, in the first trunk."""
    context: int
    """Tokens of one sequence at the model's full context length."""
    kv_cache_dtype: str
    draft: DraftPlan | None = None

    @property
    def draft_bytes(self) -> int:
        """Weights of the draft model; 0 where there is none."""
        return 0 if self.draft is None else self.draft.weight_bytes

    @property
    def total_parameters(self) -> int:
        """The model's; spares hold copies."""
        return sum(actor.parameters for actor in self.actors if not actor.spare)

    @property
    def total_bytes(self) -> int:
        """The model's; spares hold copies."""
        return sum(actor.weight_bytes for actor in self.actors if not actor.spare)

    @property
    def total_scale_bytes(self) -> int:
        """Of `total_bytes`: scales and offsets of quantised weights."""
        return sum(actor.scale_bytes for actor in self.actors if not actor.spare)

    def need_bytes(self, actor: ActorPlan) -> int:
        """Weights of an actor; of the trunk, with the draft model's, and KV cache for `LEAST_CACHE_TOKENS` tokens.

        Or for one whole sequence, where that is less.
        """
        return actor.card_bytes + (self._least_cache_bytes(actor) + self.draft_bytes if _is_trunk(actor) else 0)

    @property
    def whole_need_bytes(self) -> int:
        """The same of all actors together, without spares."""
        trunks = [actor for actor in self.actors if _is_trunk(actor)]
        return self.total_bytes + len(trunks) * self.draft_bytes + sum(map(self._least_cache_bytes, trunks))

    def _least_cache_bytes(self, trunk: ActorPlan) -> int:
        return min(LEAST_CACHE_TOKENS, self.context) * trunk.kv_bytes_per_token

    def fits(self, card_bytes: int, reserve: float = 0.1) -> list[tuple[ActorPlan, bool, int]]:
        """(actor, whether its weights fit a card of `card_bytes`, KV tokens that remain for it) for each actor.

        `reserve` is the share of the card kept for activations and the runtime. Experts hold no KV cache.
        """
        usable = int(card_bytes * (1 - reserve))
        rows = []
        for actor in self.actors:
            left = usable - actor.card_bytes - (self.draft_bytes if _is_trunk(actor) else 0)
            tokens = max(0, left) // actor.kv_bytes_per_token if _is_trunk(actor) else 0
            rows.append((actor, left >= 0 and (not _is_trunk(actor) or tokens > 0), tokens))
        return rows


def make_plan(
    model: ModelConfig,
    dtype: str,
    placed: Sequence[Holding] | None = None,
    held: WeightsHeld | None = None,
    kv_cache_dtype: str = "auto",
    draft: DraftPlan | None = None,
    variants: Mapping[str, tuple[ModelConfig, WeightsHeld]] | None = None,
    one_process: bool = False,
) -> Plan:
    """Plan `model`: one trunk, and the actors of `placed`; default: one per expert over all layers.

    Rows are in `dtype`, weights as `held` says (default: in `dtype`), and the KV cache as `engine.kv_cache_dtype` says.
    `variants`: name of a further model's trunk → its shape, and what that trunk's weights are held as. `one_process`:
    all of it is in one, so that experts whose layers are of one size share the buffers of an offload: they are counted
    with the first.
    """
    held = held or WeightsHeld.all_in(dtype)
    if placed is None:
        placed = holdings(model.num_hidden_layers, model.num_local_experts)
    cache = held_in(kv_cache_dtype, dtype)
    actors = []
    for name, (own, trunk_held) in {"Trunk": (model, held), **(variants or {})}.items():
        token_bytes = kv_bytes_per_token(own, cache) + (0 if draft is None else draft.kv_bytes_per_token)
        trunk = _actor(name, tuple(weights_of_trunk(own)), trunk_held)
        actors.append(replace(trunk, kv_bytes_per_token=token_bytes))
    sharers = sum(1 for nbytes in held.offloaded.values() if nbytes) if one_process else 1
    counted = set[int]()
    for one in placed:
        here = held if one.spare is None else held.in_spare(one.spare)
        actor = _actor(one.name, weights_of_keys(model, one.all_keys), here, one.spare is not None)
        host = _host_share(model, one, actor.weight_bytes, here, max(1, sharers))
        if one_process and host.buffer_bytes in counted:
            host = replace(host, buffer_bytes=0)
        counted.add(host.buffer_bytes)
        actors.append(replace(actor, host=host))
    return Plan(dtype, tuple(actors), actors[0].kv_bytes_per_token, model.max_position_embeddings, cache, draft)


def _host_share(model: ModelConfig, one: Holding, weight_bytes: int, held: WeightsHeld, sharers: int) -> HostShare:
    """What of an actor stays in the host's memory, all its layers being alike."""
    offload = 0 if one.spare is not None else held.offloaded.get(one.experts[0], 0)
    layers = sum(layer not in model.dense_layers for layer, _ in one.all_keys)
    return host_share(weight_bytes // layers, layers, offload, sharers) if offload else ON_CARD


def _is_trunk(actor: ActorPlan) -> bool:
    return actor.kv_bytes_per_token > 0


def weights_of_keys(model: ModelConfig, keys: Iterable[ExpertKey]) -> tuple[Weight, ...]:
    """Every weight of these (layer, expert) keys, in their order. Layers without experts have none."""
    held = sorted(key for key in keys if key[0] not in model.dense_layers)
    return tuple(weight for layer, expert in held for weight in weights_of_expert(model, layer, expert))


def _actor(name: str, weights: Sequence[Weight], held: WeightsHeld, spare: bool = False) -> ActorPlan:
    matrices = [weight for weight in weights if weight.role not in ("embed", "router") and len(weight.shape) > 1]
    return ActorPlan(
        name,
        sum(weight.numel for weight in weights),
        sum(map(held.nbytes, weights)),
        spare,
        sum(map(held.scale_bytes, weights)),
        tuple(dict.fromkeys(map(held.held_as, matrices))),
    )


def _matrix(weight: Weight) -> tuple[int, int]:
    """The shape of a weight that is quantised."""
    rows, columns = weight.shape
    return rows, columns
