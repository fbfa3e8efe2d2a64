"""Which experts of several models are equal, and the numbers by which replicas know each model's experts. Pure data.

Replicas number the experts of all models together: expert e of model m, the m-th from 0, is number m * E + e of E
experts a model. An expert that equals one that came before it, in the same layer, goes by the earlier one's number.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moe_ray.core import ExpertKey, ReplicaInfo


@dataclass(frozen=True, slots=True)
class ExpertNumbers:
    """The numbers of one model's experts at the replicas, as a trunk of that model needs them.

    >>> numbers = ExpertNumbers(((0, 1), (0, 3)))
    >>> numbers.of(1, 1)
    3
    >>> sorted(numbers.own({(0, 1), (1, 0), (1, 1)}))
    [(0, 1), (1, 0)]
    """

    table: tuple[tuple[int, ...], ...]
    """[num_hidden_layers][num_local_experts]; nothing in layers without experts."""

    def of(self, layer: int, expert: int) -> int:
        """The number of the model's own `expert` in one layer."""
        return self.table[layer][expert]

    def own(self, keys: Iterable[ExpertKey]) -> frozenset[ExpertKey]:
        """What of a replica's `keys` is this model's, by its own numbers of experts."""
        held = frozenset(keys)
        return frozenset(key for key, at_replica in self._keys() if at_replica in held)

    def told(self, infos: Iterable[ReplicaInfo]) -> list[ReplicaInfo]:
        """The same replicas with keys of this model's own numbers."""
        return [replace(info, keys=self.own(info.keys)) for info in infos]

    @property
    def keys(self) -> frozenset[ExpertKey]:
        """The keys of this model as replicas number them."""
        return frozenset(at_replica for _, at_replica in self._keys())

    def _keys(self) -> Iterable[tuple[ExpertKey, ExpertKey]]:
        for layer, numbers in enumerate(self.table):
            for expert, number in enumerate(numbers):
                yield (layer, expert), (layer, number)


def share(contents: Sequence[Mapping[ExpertKey, Hashable]]) -> tuple[ExpertNumbers, ...]:
    """The numbers of each model's experts. `contents`: of each, (layer, expert) → what is equal for equal weights.

    The models have the same keys. Among equals of one layer an expert goes by the one of its own number, else by the
    first, so that an expert stays in the actor of its number where it can.
    """
    layers = 1 + max(layer for layer, _ in contents[0])
    experts = 1 + max(expert for _, expert in contents[0])
    rows: list[list[tuple[int, ...]]] = [[] for _ in contents]
    for layer in range(layers):
        known: dict[Hashable, list[int]] = {}
        for model, content in enumerate(contents):
            numbers: list[int] = []
            for expert in range(experts if (layer, 0) in content else 0):
                equals = known.setdefault(content[layer, expert], [])
                if model == 0 or not equals:
                    equals.append(model * experts + expert)
                    numbers.append(equals[-1])
                else:
                    numbers.append(next((number for number in equals if number % experts == expert), equals[0]))
            rows[model].append(tuple(numbers))
    return tuple(ExpertNumbers(tuple(table)) for table in rows)


def added_keys(numbers: Iterable[ExpertNumbers], num_experts: int) -> frozenset[ExpertKey]:
    """The keys that replicas hold of these models beside those of the first one, of `num_experts`."""
    every = frozenset[ExpertKey]().union(*(each.keys for each in numbers))
    return frozenset(key for key in every if key[1] >= num_experts)


def origin(number: int, num_experts: int) -> tuple[int, int]:
    """(model, expert) that a number at replicas stands for."""
    return divmod(number, num_experts)
