"""Which trunk a request goes to, and how many trunks there should be: data in, data out."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import pytest
from ray.exceptions import RpcError
from ray.serve.config import AutoscalingConfig

from moe_ray.config import load_config
from moe_ray.deploy.replica_targets import (
    DECIDE_EVERY_S,
    TRUNK,
    TRUNK_POLICY,
    TrunkScaler,
    measured_trunks,
    trunk_autoscaling_config,
)
from moe_ray.deploy.scale_by_hand import parse_units
from moe_ray.deploy.trunk_autoscale import TrunkScaleOptions, TrunksState, decide, fitting
from moe_ray.engine.blocks import ROOT_KEY, block_key
from moe_ray.errors import ConfigError
from moe_ray.gateway.trunk_choice import (
    FULL_KV,
    MOST_AHEAD,
    REQUEST_TOKENS,
    KnownPrefixes,
    TrunkCandidate,
    TrunkView,
    choose,
    extend_keys,
)

SIZE = 4


def keys(*token_ids: int) -> list[bytes]:
    found: list[bytes] = []
    extend_keys(found, token_ids, SIZE)
    return found


def view(*prompts: range) -> TrunkView:
    made = TrunkView.of(SIZE, 1000)
    for prompt in prompts:
        made.known.add(keys(*prompt))
    return made


def always(*candidates: TrunkCandidate) -> int:
    """The choice, which no drawing changes."""
    (chosen,) = {choose(candidates, random.Random(seed)) for seed in range(20)}
    return chosen


# ---- known prefixes


def test_keys_are_those_of_the_engine_and_go_on_where_they_ended() -> None:
    first = block_key(ROOT_KEY, range(4))
    assert keys(*range(10)) == [first, block_key(first, range(4, 8))]
    grown = keys(*range(6))
    extend_keys(grown, list(range(10)), SIZE)
    assert grown == keys(*range(10))
    assert keys(1, 2, 3) == []
    extend_keys(none := [], range(100), 0)
    assert none == []


def test_a_prefix_is_known_up_to_where_it_differs() -> None:
    known = KnownPrefixes(100)
    known.add(keys(*range(16)))
    assert known.match(keys(*range(16))) == 4
    assert known.match(keys(*range(8), 99, 98, 97, 96, *range(12, 16))) == 2
    assert known.match(keys(5, *range(1, 16))) == 0


def test_memory_is_bounded_and_the_end_of_the_oldest_goes_first() -> None:
    known = KnownPrefixes(6)
    known.add(keys(*range(16)))
    known.add(keys(*range(100, 116)))
    assert known.match(keys(*range(100, 116))) == 4
    assert known.match(keys(*range(16))) == 2, "its first blocks are still of use"
    known.add(keys(*range(16)))
    assert known.match(keys(*range(100, 116))) == 2, "what is used again is young again"


def test_a_trunk_remembers_no_more_than_its_cache_holds() -> None:
    small = TrunkView.of(SIZE, 16)
    small.known.add(keys(*range(400)))
    assert small.known.match(keys(*range(400))) == 4
    assert TrunkView.of(0, 1000).candidate([], 50).known_tokens == 0


def test_one_token_is_always_computed() -> None:
    prompt = range(16)
    assert view(prompt).candidate(keys(*prompt), 16).known_tokens == 12
    assert view(prompt).candidate(keys(*prompt), 17).known_tokens == 16


def test_what_a_trunk_tells_includes_what_was_sent_to_it() -> None:
    trunk = TrunkView.of(SIZE, 1000)
    trunk.live = 3
    trunk.told(5, 0.5, draining=False)
    assert trunk.candidate([], 1).requests == 5
    trunk.live = 1
    assert trunk.candidate([], 1).requests == 3
    trunk.live = 9  # sent a moment ago: it does not count them yet
    trunk.told(5, 0.5, draining=True)
    assert (trunk.others, trunk.draining) == (0, True)


# ---- the choice


def test_balanced_the_one_that_knows_most() -> None:
    assert always(TrunkCandidate(0), TrunkCandidate(64), TrunkCandidate(128)) == 2
    assert always(TrunkCandidate(200, requests=3), TrunkCandidate(0)) == 0


def test_a_short_prefix_does_not_outweigh_many_requests() -> None:
    assert always(TrunkCandidate(REQUEST_TOKENS - 16, requests=1), TrunkCandidate(0)) == 1
    assert always(TrunkCandidate(REQUEST_TOKENS + 16, requests=1), TrunkCandidate(0)) == 0
    assert always(TrunkCandidate(128, unanswered_tokens=2000), TrunkCandidate(0)) == 1


def test_an_overloaded_trunk_gets_none_whatever_it_knows() -> None:
    knows = TrunkCandidate(100_000, requests=MOST_AHEAD + 1)
    assert always(knows, TrunkCandidate(0)) == 1
    assert always(replace(knows, requests=MOST_AHEAD), TrunkCandidate(0)) == 0
    busy = TrunkCandidate(0, requests=40)
    assert always(replace(knows, requests=60), busy) == 0, "of many requests a few more are no imbalance"
    assert always(replace(knows, requests=61), busy) == 1


def test_a_full_cache_gets_none_while_another_has_room() -> None:
    full = TrunkCandidate(500, kv_use=FULL_KV)
    assert always(full, TrunkCandidate(0)) == 1
    assert always(full, TrunkCandidate(0, kv_use=FULL_KV)) == 0


def test_among_equals_two_are_drawn_and_the_roomier_is_taken() -> None:
    equal = [TrunkCandidate(0, kv_use=use) for use in (0.1, 0.2, 0.3)]
    draws = [choose(equal, random.Random(seed)) for seed in range(300)]
    assert {0, 1} == set(draws), "the fullest of three never wins a draw of two"
    same = [TrunkCandidate(0)] * 3
    assert {choose(same, random.Random(seed)) for seed in range(50)} == {0, 1, 2}


def test_conversations_stay_where_they_began_and_spread() -> None:
    """Twelve conversations of four turns on three trunks, all at once, as a gateway would route them."""
    trunks, draw, histories, went = [TrunkView.of(SIZE, 10_000) for _ in range(3)], random.Random(0), {}, {}
    for turn in range(4):
        sent = []
        for talk in range(12):
            history = histories.setdefault(talk, [])
            history += [1000 * talk + 100 * turn + i for i in range(40)]
            own = keys(*history)
            chosen = choose([trunk.candidate(own, len(history)) for trunk in trunks], draw)
            trunks[chosen].live += 1
            trunks[chosen].known.add(own)
            sent.append(chosen)
            went.setdefault(talk, []).append(chosen)
        for chosen in sent:
            trunks[chosen].live -= 1
    moves = sum(a != b for places in went.values() for a, b in itertools.pairwise(places))
    assert sorted([places[0] for places in went.values()].count(t) for t in range(3)) == [4, 4, 4]
    assert moves <= 3, "a first turn of 40 tokens weighs less than one request; longer ones stay"


# ---- how many trunks

OPTIONS = TrunkScaleOptions(max_num_seqs=10, target_kv_use=0.8, target_waiting=2, up_after_s=5, down_after_s=60)


def state(replicas: int, **load: float) -> TrunksState:
    return replace(TrunksState(replicas, replicas, max_replicas=8), **load)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("replicas", "load", "trunks"),
    [
        (1, {}, 1),
        (1, {"running": 10}, 1),
        (2, {"running": 15, "kv_use": 0.3}, 2),
        (1, {"kv_use": 0.85}, 2),
        (2, {"kv_use": 1.7}, 3),
        (1, {"running": 3, "waiting": 3}, 2),
        (1, {"running": 1, "waiting": 9}, 2),  # a queue of nobody knows what size: one more
        (3, {"running": 12, "waiting": 5}, 3),
        (1, {"running": 10, "waiting": 40}, 5),  # that many never fit into fewer
    ],
)
def test_what_runs_and_waits_needs_so_many(replicas: int, load: dict[str, float], trunks: int) -> None:
    assert fitting(state(replicas, **load), OPTIONS) == trunks


def run(states: list[TrunksState], step: float = 1.0, options: TrunkScaleOptions = OPTIONS) -> list[int]:
    """What is decided at each step, from states whose `replicas` are what was decided before."""
    decided, asked = [states[0].replicas], None
    for i, each in enumerate(states):
        target, asked = decide(replace(each, replicas=decided[-1]), options, asked, i * step)
        decided.append(target)
    return decided[1:]


def test_up_when_it_persists() -> None:
    assert run([state(1, kv_use=0.9)] * 5) == [1] * 5
    assert run([state(1, kv_use=0.9)] * 6)[-1] == 2
    assert run([state(1, waiting=5)] * 4 + [state(1)] + [state(1, waiting=5)] * 4) == [1] * 9


def test_a_queue_asks_for_no_third_before_the_second_has_come() -> None:
    starting = TrunksState(1, 1, waiting=50, max_replicas=8)
    assert run([starting] * 60, options=replace(OPTIONS, max_num_seqs=100))[-1] == 2
    assert (
        max(run([starting] * 6 + [replace(starting, reporting=2)] * 6, options=replace(OPTIONS, max_num_seqs=100))) == 3
    )


def test_down_one_at_a_time_when_all_would_fit_for_long() -> None:
    decided = run([state(3)] * 200)
    assert [i for i, (a, b) in enumerate(itertools.pairwise(decided), 1) if a != b] == [60, 120]
    assert decided[-1] == 1
    assert run([state(2, kv_use=0.79)] * 200)[-1] == 2, "it would fit, but barely"
    assert run([replace(state(3), reporting=2)] * 200)[-1] == 3, "one is just coming"


def test_bounds_hand_and_silence() -> None:
    assert run([replace(state(2), min_replicas=2)] * 100)[-1] == 2
    assert run([replace(state(2, kv_use=1.9), max_replicas=2)] * 100)[-1] == 2
    assert run([replace(state(1), wanted=4)]) == [4]
    assert run([replace(state(2, waiting=99), reporting=0)] * 100)[-1] == 2
    fixed = [replace(state(2, waiting=99, kv_use=2.0), min_replicas=2, max_replicas=2)] * 100
    assert set(run(fixed)) == {2}, "without autoscaling: what the configuration says"


# ---- what Serve's controller is given


@dataclass(frozen=True)
class Point:
    timestamp: float
    value: float


def test_reports_are_means_summed_over_trunks() -> None:
    reports = {
        "running": {"a": [Point(0, 2), Point(1, 4)], "b": [Point(1, 1)]},
        "waiting": {"a": [Point(0, 0), Point(1, 1)], "b": [Point(1, 0)]},
        "kv_use": {"a": [Point(0, 0.5), Point(1, 0.7)], "b": [Point(1, 0.1)], "mute": []},
    }
    assert measured_trunks(reports, 3) == TrunksState(3, 2, 4.0, 0.5, pytest.approx(0.7))
    assert measured_trunks({}, 2) == TrunksState(2, 0)


def test_the_scaler_obeys_the_hand_and_keeps_what_it_knows() -> None:
    scaler, wanted = TrunkScaler(OPTIONS), [None, 4, RpcError("away"), None, None]
    asked = iter(wanted)

    def by_hand() -> int | None:
        value = next(asked)
        if isinstance(value, Exception):
            raise value
        return value

    times = [i * DECIDE_EVERY_S for i in range(len(wanted))]
    seen = [scaler.replicas(now, lambda: replace(state(2, kv_use=1.2), max_replicas=3), by_hand) for now in times]
    assert seen == [2, 4, 4, 3, 3]
    assert scaler.replicas(times[-1] + 0.1, lambda: pytest.fail("asked too soon"), by_hand) == 3


@pytest.mark.parametrize("enabled", [False, True])
def test_serve_takes_the_configuration(enabled: bool) -> None:
    flags = {"trunk": {"num_replicas": 2, "max_replicas": 6, "autoscale": {"enabled": enabled}}}
    loaded = load_config(flags)
    config = AutoscalingConfig(**trunk_autoscaling_config(loaded.trunk, loaded.engine.max_num_seqs))
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, 2, 16)
    assert config.policy.policy_function == TRUNK_POLICY
    kwargs = config.policy.policy_kwargs
    assert (kwargs["min_replicas"], kwargs["max_replicas"]) == ((1, 6) if enabled else (2, 2))
    assert type(config.policy.get_policy()(**kwargs)).__name__ == "TrunkPolicy"


def test_words_of_the_command_line() -> None:
    assert parse_units(["3", "trunk", "0"]) == [3, TRUNK, 0]
    for word in ("Trunk0", "-1", "three", ""):
        with pytest.raises(ConfigError, match="expected the number of an expert, or `trunk`"):
            parse_units([word])
