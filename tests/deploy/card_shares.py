"""`python tests/deploy/card_shares.py` has Ray place shares of cards, kill them and place them again, in random orders.

Prints "all found room" where, of four declared GPUs, each time one is left for an actor that wants a whole one beside
nine that want a third: what placements with a trunk on a card of its own rest on. Actors are placed again once Ray
knows that those before are gone, as Serve does: while it does not, their shares are taken, and others would do.
"""

from __future__ import annotations

import random
import time

from moe_ray.deploy.local_ray import prepare_local_ray, start

prepare_local_ray()

import ray  # noqa: E402 - after the environment is prepared

ROUNDS, WAIT_S, GPUS = 8, 120.0, 4


@ray.remote(num_cpus=0, max_restarts=0)
class Holder:
    """Holds its share of a card."""

    def gpu(self) -> int:
        return int(ray.get_gpu_ids()[0])


def main() -> None:
    """Nine thirds and a whole on four cards, killed and placed anew `ROUNDS` times."""
    chance = random.Random(0)
    start(num_gpus=GPUS, num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
    shares = {"trunk": 1.0, **{f"expert{number}": 0.3333 for number in range(9)}}
    held = {}
    for _ in range(ROUNDS):
        gone = chance.sample(sorted(shares), chance.randint(1, len(shares))) if held else sorted(shares)
        for name in gone:
            if name in held:
                ray.kill(held.pop(name))
        wait_for_room(sum(shares[name] for name in held))
        chance.shuffle(gone)
        for name in gone:
            held[name] = Holder.options(num_gpus=shares[name]).remote()
        cards = dict(zip(held, ray.get([each.gpu.remote() for each in held.values()], timeout=WAIT_S), strict=True))
        assert cards["trunk"] not in {card for name, card in cards.items() if name != "trunk"}, cards
    print("all found room")


def wait_for_room(taken: float) -> None:
    """Return when Ray has no more than `taken` of the cards taken."""
    end = time.monotonic() + WAIT_S
    while ray.available_resources().get("GPU", 0.0) < GPUS - taken - 1e-3:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.05)


if __name__ == "__main__":
    main()
