"""A replica that arrives while another serves: in use from its first layer on, weights from disk or from its peer."""

from __future__ import annotations

from pathlib import Path

import pytest
from asking import Asking
from served import Served, complete, eventually, second_replicas, statuses

from moe_ray.core import ReplicaInfo
from moe_ray.deploy.expert_replica import ExpertReplica
from moe_ray.deploy.peers import find_peers
from moe_ray.errors import CheckpointError, EngineError, NotReady
from moe_ray.experts.server.weight_loader import CARRIER, WeightLoader, peer_of
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.expert import FFN
from moe_ray.model.expert_reader import ExpertReader

EXPERT = 4


def test_second_replicas_arrive_under_a_stream(served_demo: Served) -> None:
    name, prompt = f"Expert{EXPERT}", "The old lighthouse keeper"
    undisturbed = complete(served_demo, prompt)
    (first,) = statuses(served_demo, name)
    assert (first["loaded_keys"], first["bytes_from_peers"]) == (first["keys"], 0)
    from_peers = 0
    with Asking(lambda: complete(served_demo, prompt)) as streams:
        # One on a quick disk may have read everything before it has found its peer.
        for first, status in second_replicas(served_demo, EXPERT):
            of_disk = status["bytes_read"] / first["bytes_read"]
            of_peer = status["bytes_from_peers"] / first["weight_bytes"]
            assert of_disk + of_peer == pytest.approx(1, abs=1e-12), "each layer came once, one way or the other"
            assert status["weight_bytes"] == first["weight_bytes"]
            from_peers += status["bytes_from_peers"]
            answers = len(streams.answers)
            eventually(lambda answers=answers: len(streams.answers) > answers + 1, 60)
            if from_peers:
                break
    assert from_peers
    assert set(streams.answers) == {undisturbed}


def test_who_else_serves_an_expert(served_random: Served) -> None:
    found = find_peers("Expert3", served_random.app_name)()
    assert len(found) == 2
    for info in found:
        assert isinstance(info, ReplicaInfo)
        assert (len(info.keys), info.loading) == (4, False)
        others = [other.addresses[CARRIER] for other in found if other is not info]
        assert [peer_of(found, info.replica_id, info.node_id, info.keys)] == others
    with pytest.raises(NotReady, match="Expert9"):
        find_peers("Expert9", served_random.app_name)()


class Broken(ExpertReader):
    def read(self, key: tuple[int, int]) -> FFN:
        if key[0] == 1:
            raise CheckpointError("the disk is gone")
        return super().read(key)


def test_serve_hears_of_a_replica_that_could_not_load(random_model: Path) -> None:
    replica = ExpertReplica.__new__(ExpertReplica)
    reader = Broken(Checkpoint.open(random_model), {(layer, 0) for layer in range(4)}, Compute(Backend("float32")))
    replica._weight_loader = WeightLoader("Expert0", reader, 64, Compute(Backend("float32")))
    replica.check_health()
    replica._weight_loader.start(list, "me", "here", None)  # type: ignore[arg-type]
    assert replica._weight_loader.wait(20)
    with pytest.raises(EngineError, match=r"loading failed: .*the disk is gone"):
        replica.check_health()
