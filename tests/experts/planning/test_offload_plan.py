"""Which layers stay in the host's memory, and what of them is said before anything starts."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moe_ray.commands.plan_report import plan_json, print_plan
from moe_ray.commands.planned import planned
from moe_ray.config import load_config
from moe_ray.deploy.cards import parts_of
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.card_placement import place
from moe_ray.experts.planning.cards import Card
from moe_ray.experts.planning.offload import BUFFERS, HostShare, host_share, streamed

KEYS = [(layer, 5) for layer in range(32)]
GIB = 2**30


def test_the_coldest_layers_go_where_a_load_is_recorded() -> None:
    loads = {key: float(key[0] % 8) for key in KEYS}
    assert streamed(KEYS, 10, 80, loads) == tuple((layer, 5) for layer in (0, 1, 8, 9, 16, 17, 24, 25))
    level = dict.fromkeys(KEYS, 1.0)
    assert streamed(KEYS, 10, 30, level) == ((29, 5), (30, 5), (31, 5)), "of equal ones the first stay on the card"


@given(st.integers(3, 64), st.integers(1, 700))
def test_as_many_as_are_asked_for_evenly_spread(layers: int, offload: int) -> None:
    keys = [(layer, 0) for layer in range(layers)]
    if 0 < offload <= 10 * BUFFERS:
        with pytest.raises(ConfigError, match="2 buffers on the card take as much; allowed are 0, or more than"):
            streamed(keys, 10, offload)
        return
    found = streamed(keys, 10, offload)
    assert len(set(found)) == len(found) == min(layers, -(-offload // 10))
    assert set(found) <= set(keys)
    gaps = [late[0] - early[0] for early, late in itertools.pairwise(found)]
    assert max(gaps) - min(gaps) <= 1
    share = host_share(10, layers, offload)
    assert share == HostShare(10 * len(found), 10 * BUFFERS)
    assert share.on_card(10 * layers) == 10 * (layers - len(found) + BUFFERS)


def test_nothing_is_offloaded_unasked() -> None:
    assert streamed(KEYS, 10, 0) == ()
    assert host_share(10, 32, 0) == HostShare()


def test_a_plan_counts_what_is_on_the_card_and_names_the_price(mixtral_plan: Path) -> None:
    flags = {"model": {"path": str(mixtral_plan), "dtype": "float16"}, "experts": {"cpu_offload_gib": 8.2}}
    made = planned(load_config(flags), mixtral_plan, without_weights=True, cards=True)
    trunk, *experts = made.plan.actors
    layer = experts[0].weight_bytes // 32
    # 10.5 GiB an expert, 0.328 a layer: 25 layers are 8.2 GiB, 7 and two buffers stay.
    assert {each.host for each in experts} == {HostShare(25 * layer, 2 * layer)}
    assert {each.card_bytes for each in experts} == {9 * layer}
    fits = {actor.name: ok for actor, ok, _ in made.plan.fits(4 * GIB)}
    assert fits == {"Trunk": True, **{each.name: True for each in experts}}
    out = io.StringIO()
    print_plan(Console(file=out, width=200), made, 4)
    assert "Expert0 to Expert7 each keep 8.20 GiB in the host's memory, 2.95 GiB on the card" in out.getvalue()
    assert "copies them in 699 ms, at 80% (assumed) of PCIe 3.0 x16's 15.75 GB/s" in out.getvalue()
    assert f'"host_bytes": {25 * layer},' in plan_json(made, 4)
    assert trunk.host == HostShare()


def test_experts_of_one_process_share_their_buffers(mixtral_plan: Path) -> None:
    flags = {"model": {"path": str(mixtral_plan), "dtype": "float16"}, "transport": "local"}
    experts = {"cpu_offload_gib": 8.2, "overrides": {3: {"cpu_offload_gib": 0}, 4: {"quantize": "int8"}}}
    made = planned(load_config({**flags, "experts": experts}), mixtral_plan, without_weights=True, cards=True)
    trunk, *rest = made.plan.actors
    layer, coded = rest[0].weight_bytes // 32, rest[4].weight_bytes // 32
    shares = [each.host for each in rest]
    assert [share.host_bytes for share in shares] == [25 * layer] * 3 + [0, 32 * coded] + [25 * layer] * 3
    assert [share.buffer_bytes for share in shares] == [2 * layer, 0, 0, 0, 2 * coded, 0, 0, 0]
    (part,) = parts_of(load_config({**flags, "experts": experts}), made.plan)
    assert part.weight_bytes == trunk.weight_bytes + (6 * 7 + 32 + 2) * layer + 2 * coded
    alike = planned(load_config({**flags, "experts": {"cpu_offload_gib": 0.3}}), mixtral_plan, True, cards=True)
    assert [each.host.host_bytes for each in alike.plan.actors[1:]] == [layer] * 8, "too few for buffers of its own"
    out = io.StringIO()
    print_plan(Console(file=out, width=200), alike, None)
    assert "Expert0 to Expert7 each keep 336.0 MiB in the host's memory, 82.03 GiB of all of them on" in out.getvalue()
    assert "copies them in 224 ms" in " ".join(out.getvalue().split())


@pytest.mark.parametrize(
    ("quantize", "offload", "gib", "cards"),
    [(None, 5, 8, 9), (None, 7.2, 6, 9), ("int4", 0.75, 24, 1), (None, 8.3, 24, 1), (None, 9.2, 16, 1)],
)
def test_the_rows_of_the_guide(mixtral_plan: Path, quantize: str | None, offload: float, gib: int, cards: int) -> None:
    experts = {"cpu_offload_gib": offload, "quantize": quantize}
    transport = "local" if cards == 1 else "auto"
    flags = {"model": {"path": str(mixtral_plan), "dtype": "float16"}, "experts": experts, "transport": transport}
    config = load_config(flags)
    plan = planned(config, mixtral_plan, without_weights=True, cards=True).plan
    parts = parts_of(config, plan)
    place([Card(f"n{number}", "some", gib * GIB) for number in range(cards)], parts)  # they fit
    host, copied = plan.actors[1].host, 1 if cards > 1 else 8
    on_card = parts[-1].weight_bytes / GIB
    where = "one card" if cards == 1 else "nine cards"
    row = (
        f"| {quantize or 'float16'} | {offload:g} | {where} of {gib} GiB | {on_card:.2f} GiB | "
        f"{8 * host.host_bytes / GIB:.1f} GiB | {1e3 * copied * host.copy_s:.0f} ms"
    )
    assert row in (mixtral_plan.parents[2] / "docs" / "scaling-and-placement.md").read_text()


@pytest.fixture
def mixtral_plan() -> Path:
    return Path(__file__).parents[3] / "examples" / "mixtral-8x7b" / "config.json"
