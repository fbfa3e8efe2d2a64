"""Pods of Ray: their object store, their cards as Ray sees them, and the order of what runs before it."""

from __future__ import annotations

from typing import Any

import pytest
from helm_rendering import Manifest, Rendered, profile, render
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec
from ray.autoscaler._private.kuberay.utils import parse_quantity

LEAST = 75 * 2**20
"""Ray takes no smaller object store."""


def shm_size(group: Manifest) -> int:
    (volume,) = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
    return int(parse_quantity(volume["emptyDir"]["sizeLimit"]))


def object_store(group: Manifest) -> int:
    return int(group["rayStartParams"]["object-store-memory"])


def test_the_object_store_fits_in_dev_shm(rendered: Rendered) -> None:
    """Else Ray puts it on a disk."""
    for group in rendered.groups.values():
        assert LEAST <= object_store(group) <= shm_size(group)


@pytest.mark.parametrize("size", ["100Mi", "1.5Gi", "800M", "1073741824", "2G"])
def test_the_object_store_follows_dev_shm(size: str) -> None:
    groups = render({"pod": {"shmSize": size}, "head": {"shmSize": "256Mi"}}).groups
    assert shm_size(groups["experts"]) == parse_quantity(size)
    for group in groups.values():
        assert LEAST <= object_store(group) <= 0.8 * shm_size(group)
    assert shm_size(groups["headgroup"]) == 256 * 2**20


def test_an_object_store_that_is_given() -> None:
    flags = {"rayStartParams": {"object-store-memory": "400000000"}}
    groups = render({"head": flags, "workerGroups": {"experts": flags}}).groups
    assert object_store(groups["headgroup"]) == object_store(groups["experts"]) == 400000000


def ray_resources(group: Manifest) -> dict[str, Any]:
    """What Ray's autoscaler takes a pod of the group to have, before there is one."""
    found: dict[str, Any] = _get_ray_resources_from_group_spec(group, False)
    return found


def test_the_autoscaler_knows_the_cards() -> None:
    rendered = render(profile("mixtral-8x7b-fp16-8x16gb"))
    wanted = rendered.application["args"]
    for name, section in (("trunk", "trunk"), ("experts", "experts")):
        resources = ray_resources(rendered.groups[name])
        assert resources["GPU"] == wanted[section]["num_gpus"] == 1
        assert resources[f"accelerator_type:{wanted[section]['accelerator_type']}"] >= 1
        assert resources["CPU"] >= 1


def test_resources_of_ones_own_stay() -> None:
    mine = {"CPU": "4", "card": "2"}
    group = {"gpu": {"count": 1, "acceleratorType": "T4"}, "rayResources": mine}
    resources = ray_resources(render({"workerGroups": {"experts": group}}).groups["experts"])
    assert resources.items() >= {"CPU": 4, "GPU": 1, "card": 2, "accelerator_type:T4": 1}.items()
    without = render({"pod": {"gpu": {"acceleratorType": "T4"}}}).groups
    assert all("resources" not in group for group in without.values()), "no GPU, no card"


def test_init_containers_of_the_values_run_before_the_wait() -> None:
    """One may bring the model that is waited for."""
    fetch = {"name": "fetch", "image": "fetch:1"}
    rendered = render({"model": {"path": "/models/mixtral"}, "pod": {"initContainers": [fetch]}})
    for group in rendered.groups.values():
        names = [container["name"] for container in group["template"]["spec"]["initContainers"]]
        assert names == ["native-libraries", "fetch", "wait-for-model"]
