"""Replicas per expert and of the trunk, set by hand or decided by policies: what controller and `moe-ray scale` share.

Where experts share a deployment, the number of its first one stands for it, here and in the store.

Numbers set by hand are in Ray's internal key-value store, one key per application and expert (or the trunk), so they
outlive replicas and controller. In the controller a `Scaler` per application reads them and the experts' reports, and
decides; a `TrunkScaler` does so for the trunk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ray.exceptions import RayError

from moe_ray.deploy import trunk_autoscale
from moe_ray.deploy.ray_internals import key_value_store
from moe_ray.deploy.trunk_autoscale import TrunkScaleOptions, TrunksState
from moe_ray.experts.planning.autoscale import AutoscaleOptions, ExpertState, decide

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

    from moe_ray.config.experts import ExpertsSection
    from moe_ray.config.trunk import TrunkSection

logger = logging.getLogger(__name__)

POLICY: Final = "moe_ray.deploy.policies.ExpertPolicy"
TRUNK_POLICY: Final = "moe_ray.deploy.policies.TrunkPolicy"
TRUNK: Final = "trunk"
"""Stands for the trunk where an expert has its number."""
DECIDE_EVERY_S: Final = 0.5
IDLE_REPORTS_S: Final = 10.0
"""How often replicas report where nothing is scaled by their load."""
FORGOTTEN_S: Final = 30.0
"""A deployment whose policy was not asked for so long is gone."""
QUIET_S: Final = 0.5
"""A replica that goes has been let go by the trunks when no call came for so long."""
KV_NAMESPACE: Final = b"moe_ray"
KV_TIMEOUT_S: Final = 1.0
BUSY, QUEUE, CALLS, BATCHES = "busy_s", "queue_s", "calls", "batches"
"""What a replica reports of the time since its start: seconds computed, seconds that calls waited, both counts."""
RUNNING, WAITING, KV_USE = "running", "waiting", "kv_use"
"""What a trunk reports: its requests, and the share of its KV blocks that they hold."""

Unit = TypeVar("Unit", int, str, int | str)
"""An expert's number, or `TRUNK`."""
Reports = Mapping[str, Mapping[Any, Sequence[Any]]]
"""By name and replica, the points (`timestamp`, `value`) of the look-back window."""


def autoscaling_config(experts: ExpertsSection, expert: int) -> dict[str, Any]:
    """Serve's `autoscaling_config` of the deployment whose first expert this is: our policy, room for the hand."""
    mine, scale = experts.of(expert), experts.autoscale
    bounds = (mine.min_replicas, mine.most_replicas) if scale.enabled else (mine.num_replicas, mine.num_replicas)
    options = AutoscaleOptions(
        target_busy=scale.target_busy,
        up_after_s=scale.up_after_s,
        down_after_s=scale.down_after_s,
        max_total=scale.max_total_replicas if scale.enabled else None,
    )
    return {
        "min_replicas": 1,
        "initial_replicas": mine.num_replicas,
        "max_replicas": max(experts.max_replicas_by_hand, mine.most_replicas),
        "upscale_delay_s": 0,  # the policy waits by itself
        "downscale_delay_s": 0,
        "metrics_interval_s": scale.interval_s if scale.enabled else IDLE_REPORTS_S,
        "look_back_period_s": scale.look_back_s if scale.enabled else 3 * IDLE_REPORTS_S,
        "policy": {
            "policy_function": POLICY,
            "policy_kwargs": {
                "expert": expert,
                "min_replicas": bounds[0],
                "max_replicas": bounds[1],
                "options": asdict(options),
            },
        },
    }


def trunk_autoscaling_config(trunk: TrunkSection, max_num_seqs: int, unit: str = TRUNK) -> dict[str, Any]:
    """Serve's `autoscaling_config` of the trunk, or of a variant's, another `unit`: our policy, room for the hand."""
    scale = trunk.autoscale
    bounds = (trunk.min_replicas, trunk.most_replicas) if scale.enabled else (trunk.num_replicas, trunk.num_replicas)
    options = TrunkScaleOptions(
        max_num_seqs=max_num_seqs,
        target_kv_use=scale.target_kv_use,
        target_waiting=scale.target_waiting,
        up_after_s=scale.up_after_s,
        down_after_s=scale.down_after_s,
    )
    kwargs = {"min_replicas": bounds[0], "max_replicas": bounds[1], "options": asdict(options)}
    if unit != TRUNK:
        kwargs["unit"] = unit
    return {
        "min_replicas": 1,
        "initial_replicas": trunk.num_replicas,
        "max_replicas": max(trunk.max_replicas_by_hand, trunk.most_replicas),
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "metrics_interval_s": scale.interval_s if scale.enabled else IDLE_REPORTS_S,
        "look_back_period_s": scale.look_back_s if scale.enabled else 3 * IDLE_REPORTS_S,
        "policy": {"policy_function": TRUNK_POLICY, "policy_kwargs": kwargs},
    }


def measured_trunks(reports: Reports, replicas: int) -> TrunksState:
    """Return the trunks of which `replicas` were asked for, as their reports say: means, summed over trunks."""

    def total(name: str) -> float:
        return sum(sum(p.value for p in points) / len(points) for points in reports.get(name, {}).values() if points)

    reporting = sum(1 for points in reports.get(KV_USE, {}).values() if points)
    return TrunksState(replicas, reporting, total(RUNNING), total(WAITING), total(KV_USE))


def measured(reports: Reports) -> tuple[float, float]:
    """Return (busy share, batches waiting) of one expert over the window, both summed over its replicas.

    Calls that are computed as one batch wait as one. A replica with a single report is too young to count.
    """

    def grown(name: str, replica: Any) -> float:
        points = reports.get(name, {}).get(replica)
        return max(points[-1].value - points[0].value, 0.0) if points else 0.0

    busy = waiting = 0.0
    for replica, points in reports.get(BUSY, {}).items():
        seconds = points[-1].timestamp - points[0].timestamp if points else 0.0
        if seconds > 0:
            busy += min(grown(BUSY, replica) / seconds, 1.0)
            calls_per_batch = max(grown(CALLS, replica) / max(grown(BATCHES, replica), 1.0), 1.0)
            waiting += grown(QUEUE, replica) / seconds / calls_per_batch
    return busy, waiting


def within_serve(bounds: tuple[int, int], context: AutoscalingContext) -> tuple[int, int]:
    """The policy's (fewest, most) replicas within those of Serve's own configuration, which may change on its own."""
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    fewest = max(bounds[0], least or 1)
    return fewest, max(fewest, min(bounds[1], most or bounds[1]))


def wait_until_quiet(calls: Callable[[], int], at_most_s: float, quiet_s: float = QUIET_S) -> None:
    """Return once the count `calls` has stood still for `quiet_s`, or after `at_most_s`."""
    end, seen, since = time.monotonic() + at_most_s, calls(), time.monotonic()
    while time.monotonic() < min(end, since + quiet_s):
        time.sleep(0.05)
        if (count := calls()) != seen:
            seen, since = count, time.monotonic()


class Scaler:
    """Decides for all experts of one application together. Used by one thread, the controller's."""

    def __init__(self, wanted: Callable[[Sequence[int]], Mapping[int, int]]) -> None:
        """`wanted` returns the numbers set by hand; it raises `RayError` when they cannot be read now."""
        self._read_wanted = wanted
        self._wanted: Mapping[int, int] = {}
        self._seen: dict[int, tuple[float, ExpertState]] = {}
        self._targets: dict[int, int] = {}
        self._memory: dict[int, tuple[int, float]] = {}
        self._decided_at = float("-inf")

    def replicas(self, expert: int, now: float, measure: Callable[[], ExpertState], options: AutoscaleOptions) -> int:
        """Return the replicas that `expert` should have. `measure` is called every `DECIDE_EVERY_S` at most."""
        if expert not in self._seen or now - self._seen[expert][0] >= DECIDE_EVERY_S:
            state = measure()
            # What was decided a moment ago Serve may not have done yet.
            self._seen[expert] = (now, replace(state, replicas=self._targets.get(expert, state.replicas)))
        if expert not in self._targets or now - self._decided_at >= DECIDE_EVERY_S:
            self._decide(options, now)
        return self._targets[expert]

    def _decide(self, options: AutoscaleOptions, now: float) -> None:
        self._seen = {expert: seen for expert, seen in self._seen.items() if now - seen[0] < FORGOTTEN_S}
        if now - self._decided_at >= FORGOTTEN_S:
            self._memory = {}
        self._decided_at = now
        try:
            self._wanted = self._read_wanted(list(self._seen))
        except RayError as error:
            logger.warning("cannot read the replicas set by hand, keeping what is known: %s", error)
        states = {e: replace(state, wanted=self._wanted.get(e)) for e, (_, state) in self._seen.items()}
        self._targets, self._memory = decide(states, options, self._memory, now)
        self._seen = {e: (at, replace(state, replicas=self._targets[e])) for e, (at, state) in self._seen.items()}


class TrunkScaler:
    """Decides for the trunks of one application. Used by one thread, the controller's."""

    def __init__(self, options: TrunkScaleOptions) -> None:
        self._options = options
        self._wanted: int | None = None
        self._target: int | None = None
        self._asked: trunk_autoscale.Asked | None = None
        self._decided_at = float("-inf")

    def replicas(self, now: float, measure: Callable[[], TrunksState], wanted: Callable[[], int | None]) -> int:
        """Return the trunks that there should be; `measure` and `wanted` are asked every `DECIDE_EVERY_S` at most.

        `wanted` returns the number set by hand; where it raises `RayError`, the last one holds.
        """
        if self._target is None or now - self._decided_at >= DECIDE_EVERY_S:
            try:
                self._wanted = wanted()
            except RayError as error:
                logger.warning("cannot read the trunks set by hand, keeping what is known: %s", error)
            state = replace(measure(), wanted=self._wanted)
            if self._target is not None:  # what was decided a moment ago Serve may not have done yet
                state = replace(state, replicas=self._target)
            self._target, self._asked = trunk_autoscale.decide(state, self._options, self._asked, now)
            self._decided_at = now
        return self._target


def decided_or(unchanged: int, decide: Callable[[], int]) -> int:
    """What `decide` returns; where it raises, which is logged, the `unchanged` number.

    A policy that raised would end the pass of Serve's control loop over all deployments.
    """
    try:
        return decide()
    except Exception:
        logger.exception("the number of replicas stays %d, for its policy failed", unchanged)
        return unchanged


_scalers: dict[str, Scaler] = {}
"""By application. Global because Serve makes one policy object per deployment and lets them share nothing else."""


def scaler_of(application: str) -> Scaler:
    """The one scaler that this process has for an application."""
    if application not in _scalers:
        _scalers[application] = Scaler(lambda experts: set_by_hand(application, experts))
    return _scalers[application]


def set_by_hand(application: str, experts: Sequence[Unit]) -> dict[Unit, int]:
    """Return expert or `TRUNK` → replicas set by hand. Raises `RayError` when Ray's store does not answer."""
    keys = {_key(application, expert): expert for expert in experts}
    found = key_value_store().internal_kv_multi_get(list(keys), KV_NAMESPACE, KV_TIMEOUT_S)
    return {keys[key]: int(value) for key, value in found.items()}


def set_replicas(application: str, experts: Sequence[Unit], replicas: int | None) -> None:
    """Set the replicas of `experts` (or of `TRUNK`) by hand; None gives them back to the policy."""
    store = key_value_store()
    for expert in experts:
        if replicas is None:
            store.internal_kv_del(_key(application, expert), False, KV_NAMESPACE)
        else:
            store.internal_kv_put(_key(application, expert), str(replicas).encode(), True, KV_NAMESPACE)


def forget_replicas(application: str) -> None:
    """Drop every number set by hand for an application."""
    key_value_store().internal_kv_del(_key(application, None), True, KV_NAMESPACE)


def _key(application: str, expert: int | str | None) -> bytes:
    return f"replicas/{application}/{'' if expert is None else expert}".encode()
