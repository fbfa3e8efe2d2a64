"""What to replicate, from recorded load: greedily by load per replica, and what that does to the imbalance. Pure data.

The greedy step is that of EPLB, DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB): the next
replica goes to the expert with the most load per replica; what is spread is packed where least is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_ray.core import ExpertKey
from moe_ray.errors import ConfigError

GOOD_ENOUGH = 1.1
"""max/mean from which on another replica is not worth its card."""
MOST_EXTRA = 8
"""Further replicas that are proposed unasked."""

Rows = Sequence[Sequence[float]]
"""rows[layer][expert] that were routed there."""
Extras = tuple[frozenset[ExpertKey], ...]
"""The keys that each further replica holds, beside one replica of every expert (or group of experts)."""


@dataclass(frozen=True, slots=True)
class Imbalance:
    """max/mean over replicas of the rows that each computes; 1 is perfect."""

    per_layer: tuple[float, ...]
    total: float
    """The mean over layers, weighted by their rows: how much longer than perfectly spread all layers together take."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Further replicas, and what they are predicted to change."""

    extras: Extras
    before: Imbalance
    after: Imbalance

    def replicas(self, key: ExpertKey) -> int:
        """How many replicas hold `key`."""
        return 1 + sum(key in keys for keys in self.extras)


def parse_load(text: str, name: str) -> list[list[float]]:
    """Read rows[layer][expert] from JSON: what `GET /experts` answers, or {"rows": [[...] per layer]}.

    Raises `ConfigError` that begins with `name` and says what is wrong.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: not JSON ({error})") from None
    if isinstance(data, dict) and "rows" in data:
        rows = _matrix(data["rows"], f"{name}: rows", "layer", "expert")
    elif isinstance(data, dict) and "experts" in data:
        rows = _of_experts(data["experts"], name)
    else:
        raise ConfigError(f'{name}: expected an object with "experts" (as GET /experts answers) or "rows"')
    if not any(map(sum, rows)):
        raise ConfigError(f"{name}: no rows were routed: there is nothing to go by")
    return rows


def imbalance(rows: Rows, extras: Extras = (), per_actor: int = 1) -> Imbalance:
    """The imbalance of one replica per group of `per_actor` experts plus `extras`; a key's replicas share its rows."""
    copies = _copies(rows, extras)
    devices = len(_grouped(rows[0], per_actor)) + len(extras)
    per_layer = []
    for layer, loads in enumerate(rows):
        share = [load / copies[layer][expert] for expert, load in enumerate(loads)]
        extra = (sum(share[expert] for at, expert in keys if at == layer) for keys in extras)
        total = sum(loads)
        per_layer.append(max(*_grouped(share, per_actor), *extra, 0.0) * devices / total if total else 1.0)
    weights = [sum(loads) for loads in rows]
    mean = sum(weight * each for weight, each in zip(weights, per_layer, strict=True)) / sum(weights)
    return Imbalance(tuple(per_layer), mean)


def replicate(rows: Rows, count: int) -> Extras:
    """`count` further replicas of whole experts, each for the one with the most rows per replica (EPLB)."""
    loads = [sum(column) for column in zip(*rows, strict=True)]
    replicas, chosen = [1] * len(loads), []
    for _ in range(count):
        expert = max(range(len(loads)), key=lambda e: (loads[e] / replicas[e], -e))
        replicas[expert] += 1
        chosen.append(frozenset((layer, expert) for layer in range(len(rows))))
    return tuple(chosen)


def spread_layers(rows: Rows, count: int, layers_per_spare: int, per_actor: int = 1) -> Extras:
    """`count` spares that each hold at most `layers_per_spare` (layer, expert) keys: the hottest, whoever's they are.

    The next key is the one with the most rows per replica; it goes to the spare that has the fewest rows in that
    layer, unless that spare would then be as loaded as the layer's hottest replica is now. Spares may end up not full.
    """
    spares: list[set[ExpertKey]] = [set() for _ in range(count)]
    copies = [[1] * len(loads) for loads in rows]
    open_keys = {(layer, expert) for layer, loads in enumerate(rows) for expert, load in enumerate(loads) if load}

    def load(spare: set[ExpertKey], layer: int) -> float:
        return sum(rows[layer][expert] / copies[layer][expert] for at, expert in spare if at == layer)

    while open_keys:
        layer, expert = key = max(open_keys, key=lambda k: (rows[k[0]][k[1]] / copies[k[0]][k[1]], -k[0], -k[1]))
        free = [spare for spare in spares if len(spare) < layers_per_spare and key not in spare]
        target = min(free, key=lambda spare: (load(spare, layer), len(spare)), default=None)
        hottest = max(
            *_grouped([each / n for each, n in zip(rows[layer], copies[layer], strict=True)], per_actor),
            *(load(s, layer) for s in spares),
            0.0,
        )
        if target is None or load(target, layer) + rows[layer][expert] / (copies[layer][expert] + 1) >= hottest:
            open_keys.discard(key)
            continue
        target.add(key)
        copies[layer][expert] += 1
    return tuple(frozenset(spare) for spare in spares)


def propose(rows: Rows, count: int | None = None, layers_per_spare: int | None = None, per_actor: int = 1) -> Proposal:
    """Propose `count` further replicas: of whole experts, or spares of `layers_per_spare` keys each.

    None: the fewest that bring the imbalance to `GOOD_ENOUGH`; where `MOST_EXTRA` do not, the best number up to it.
    Raises `ConfigError` for a negative `count` or a spare that holds nothing.
    """
    if count is not None and count < 0:
        raise ConfigError("--extra-replicas: must be at least 0")
    if layers_per_spare is not None and layers_per_spare < 1:
        raise ConfigError("--layers-per-spare: must be at least 1")
    before = imbalance(rows, (), per_actor)
    best: Proposal | None = None
    for number in range(MOST_EXTRA + 1) if count is None else (count,):
        if layers_per_spare is None:
            extras = replicate(rows, number)
        else:
            extras = spread_layers(rows, number, layers_per_spare, per_actor)
        made = Proposal(extras, before, imbalance(rows, extras, per_actor))
        if best is None or made.after.total < best.after.total:
            best = made
        if made.after.total <= GOOD_ENOUGH:
            break
    assert best is not None, "at least one number was tried"
    return best


def _grouped(loads: Sequence[float], per_actor: int) -> list[float]:
    return [sum(loads[first : first + per_actor]) for first in range(0, len(loads), per_actor)]


def _copies(rows: Rows, extras: Extras) -> list[list[int]]:
    copies = [[1] * len(loads) for loads in rows]
    for keys in extras:
        for layer, expert in keys:
            copies[layer][expert] += 1
    return copies


def _of_experts(experts: object, name: str) -> list[list[float]]:
    """The matrix in the answer of `GET /experts`, whose entries may come in any order."""
    if not isinstance(experts, list) or not experts:
        raise ConfigError(f"{name}: experts: expected a list with an entry per expert")
    columns: dict[int, object] = {}
    for i, entry in enumerate(experts):
        where = f"{name}: experts[{i}]"
        number = entry.get("expert") if isinstance(entry, dict) else None
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(experts):
            raise ConfigError(f'{where}: "expert" must be a number from 0 to {len(experts) - 1}, got {number!r}')
        if number in columns:
            raise ConfigError(f"{where}: expert {number} is there twice")
        if "rows_per_layer" not in entry:
            raise ConfigError(f'{where}: expert {number} has no "rows_per_layer"')
        columns[number] = entry["rows_per_layer"]
    by_expert = _matrix([columns[e] for e in range(len(columns))], f"{name}: rows_per_layer", "expert", "layer")
    return [list(column) for column in zip(*by_expert, strict=True)]


def _matrix(value: object, name: str, outer: str, inner: str) -> list[list[float]]:
    """`value` as a matrix of numbers from 0. Raises `ConfigError` naming the place."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{name}: expected a list with one list per {outer}")
    for i, line in enumerate(value):
        if not isinstance(line, list) or not line:
            raise ConfigError(f"{name}: {outer} {i}: expected a list with a number per {inner}")
        if len(line) != len(value[0]):
            raise ConfigError(f"{name}: {outer} {i} has {len(line)} {inner}s, {outer} 0 has {len(value[0])}")
        for j, cell in enumerate(line):
            number = isinstance(cell, int | float) and not isinstance(cell, bool)
            if not number or not math.isfinite(cell) or cell < 0:
                raise ConfigError(f"{name}: {outer} {i}, {inner} {j}: expected a number from 0, got {cell!r}")
    return [[float(cell) for cell in line] for line in value]
