"""Sets the replicas of experts and trunk by hand, within what their deployments allow. Does not wait for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from moe_ray.deploy.replica_targets import POLICY, TRUNK, TRUNK_POLICY, set_replicas
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.placement import experts_in

TRUNK_NAME: Final = "Trunk"
"""Of its deployment."""


def change(
    units: Sequence[int | str], replicas: int | None, application: str, deployments: Mapping[str, Any]
) -> list[str]:
    """Set the numbers of `units` (experts' numbers, or `TRUNK`); the names of the deployments that hold them.

    `deployments`: name → Serve's details of each deployment of the application. Raises `ConfigError` on an expert that
    is not there or a number beyond its limit, before anything is changed.
    """
    names = [_holder(expert, deployments) for expert in sorted(unit for unit in set(units) if isinstance(unit, int))]
    held: dict[str, int | str] = {name: experts_in(name)[0] for name in names}
    if TRUNK in units:
        held[TRUNK_NAME] = TRUNK
    for name in held:
        _check(name, replicas, deployments)
    set_replicas(application, list(held.values()), replicas)
    return list(held)


def _holder(expert: int, deployments: Mapping[str, Any]) -> str:
    """The name of the deployment that holds `expert`. Raises `ConfigError`."""
    known = {number: name for name in deployments for number in experts_in(name)}
    if not known:
        raise ConfigError(
            "the experts of this application run inside its trunk (`transport: local`) and have no replicas"
        )
    if expert not in known:
        raise ConfigError(f"no expert {expert}: this model has {min(known)} to {max(known)}")
    return known[expert]


def _check(name: str, replicas: int | None, deployments: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless the deployment may run `replicas`."""
    policy, section = (TRUNK_POLICY, "trunk") if name == TRUNK_NAME else (POLICY, "experts")
    scaling = deployments[name]["deployment_config"]["autoscaling_config"]
    if scaling is None or scaling["policy"]["policy_function"] != policy:
        raise ConfigError(f"the Serve config file of this application sets the replicas of {name}: change it there")
    least, most = max(1, scaling["min_replicas"] or 1), scaling["max_replicas"]
    if replicas is not None and not least <= replicas <= most:
        raise ConfigError(f"{replicas} replicas: must be {least} to {most} (`{section}.max_replicas_by_hand`)")
