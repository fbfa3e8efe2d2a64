"""The promise: what a request is answered does not depend on what is computed beside it, in what parts, or where.

Not its tokens, and not a bit of their log-probabilities: what each request of a fixed set gets alone, in one piece and
in one process, it gets under every circumstance that is drawn here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from spread import Placement, Spread
from stepping import events_of

from moe_ray.core import AdapterRef, Request, SamplingParams, TokenLogprobs
from moe_ray.engine.engine import Engine

LONGEST, NEW = 60, 14
"""Tokens of a prompt, and of an answer."""
MOST = LONGEST + NEW + 2

Answer = tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]
"""Tokens, and their log-probabilities with the two likeliest."""


@dataclass(frozen=True)
class Circumstances:
    """Under which the requests are computed."""

    order: Sequence[int]
    """In which they come."""
    pauses: Sequence[int]
    """Steps before each comes."""
    engine: Mapping[str, Any]
    threads: int
    placement: Placement
    loses: int | None
    """The step before which a replica is lost."""


def homes(least: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Each expert on `least` of three replicas or more."""
    one = st.lists(st.integers(0, 2), min_size=least, max_size=3, unique=True).map(tuple)
    return st.lists(one, min_size=1, max_size=5).map(tuple)


IN_PROCESS = st.just((Placement(), None))
SPREAD = st.tuples(
    st.builds(Placement, carrier=st.sampled_from(["local", "socket", "grpc"]), homes=homes(1), native=st.booleans()),
    st.none(),
)
LOSING = st.tuples(
    st.builds(Placement, carrier=st.sampled_from(["socket", "grpc"]), homes=homes(2), native=st.booleans()),
    st.integers(1, 12),
)
ENGINES = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([4, 8, 16]),
        "max_num_seqs": st.integers(2, 8),
        "max_num_batched_tokens": st.integers(8, 96),
        "kv_cache_tokens": st.integers(MOST + 16, 4 * MOST),
        "micro_batches": st.integers(1, 3),
        "speculative": st.sampled_from(["off", "ngram"]),
        "enable_prefix_caching": st.booleans(),
        "kv_swap_gib": st.sampled_from([0.0, 0.01]),
    }
).map(lambda drawn: drawn if drawn["enable_prefix_caching"] else {**drawn, "kv_swap_gib": 0.0})


def circumstances(requests: int) -> st.SearchStrategy[Circumstances]:
    return st.builds(
        lambda order, pauses, engine, threads, place: Circumstances(order, pauses, engine, threads, *place),
        st.permutations(range(requests)),
        st.lists(st.integers(0, 3), min_size=requests, max_size=requests),
        ENGINES,
        st.sampled_from([1, 2]),
        st.one_of(IN_PROCESS, SPREAD, LOSING),
    )


def requests_of(vocab_size: int, adapters: Sequence[AdapterRef | None] = (None,)) -> list[Request]:
    """The fixed set: greedy and sampled, long, short, alike at their beginnings, repetitive; adapters in turn."""
    generator = torch.Generator().manual_seed(4)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab_size, (count,), generator=generator).tolist())

    long, short = words(LONGEST), words(5)
    greedy = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=2)
    drawn = replace(greedy, temperature=0.9, seed=7)
    asked = [
        (words(1), greedy),
        (long, drawn),
        ((*long[:32], *short), replace(drawn, top_p=0.8, repetition_penalty=1.2, seed=8)),
        (short * 8, greedy),
        (words(37), replace(greedy, presence_penalty=0.7)),
        (long, greedy),
    ]
    made = [Request(f"r{i}", prompt, sampling) for i, (prompt, sampling) in enumerate(asked)]
    told = [adapters[i % len(adapters)] for i in range(len(made))]
    return [
        request if adapter is None else request.with_adapter(adapter)
        for request, adapter in zip(made, told, strict=True)
    ]


@dataclass
class Promise:
    """A model, and what each request gets alone."""

    directory: Path
    settings: Mapping[str, Any]
    requests: Sequence[Request]
    label: str = ""
    """Models of different ones meet different circumstances."""
    alone: dict[str, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        engine = {"max_num_batched_tokens": 512, "enable_prefix_caching": False, "micro_batches": 1}
        spread = self._spread(engine, 1, Placement())
        for request in self.requests:
            self.alone |= run(spread.engine, [request])
        spread.close()
        answers = list(self.alone.values())
        assert len({tokens for tokens, _ in answers}) == len(answers), "answers that could be told apart"

    def keep(self, examples: int, tolerance: float = 0.0) -> None:
        """Assert it under so many circumstances. `tolerance`: of log-probabilities, where torch computes."""

        # Each model meets circumstances of its own. A failing case is told as it was found: each try takes its time.
        @seed(zlib.crc32(repr((self.settings, self.label)).encode()))
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(circumstances(len(self.requests)))
        def under(drawn: Circumstances) -> None:
            found = self._under(drawn)
            if tolerance:
                alike(found, self.alone, tolerance)
            else:
                assert found == self.alone

        under()

    def _under(self, drawn: Circumstances) -> dict[str, Answer]:
        spread = self._spread(drawn.engine, drawn.threads, drawn.placement)
        try:
            requests = [self.requests[i] for i in drawn.order]
            return run(spread.engine, requests, drawn.pauses, lambda step: self._lose(spread, drawn, step))
        finally:
            spread.close()

    @staticmethod
    def _lose(spread: Spread, drawn: Circumstances, step: int) -> None:
        if step == drawn.loses:
            spread.lose(drawn.placement.homes[0][0])

    def _spread(self, engine: Mapping[str, Any], threads: int, placement: Placement) -> Spread:
        made = {
            **self.settings,
            "model": {"max_model_len": MOST, **self.settings.get("model", {})},
            "engine": {"kv_cache_gib": 0.02, **self.settings.get("engine", {}), **engine},
            "trunk": {"threads": threads, **self.settings.get("trunk", {})},
        }
        return Spread(self.directory, made, placement)


def run(
    engine: Engine,
    requests: Sequence[Request],
    pauses: Sequence[int] = (),
    before_step: Callable[[int], None] = lambda _: None,
) -> dict[str, Answer]:
    """Answers by request."""
    answers = {}
    for name, events in events_of(engine, requests, pauses, before_step).items():
        assert events[-1].error is None, events[-1].error
        tokens = tuple(token for event in events for token in event.token_ids)
        answers[name] = tokens, tuple(entry for event in events for entry in event.logprobs)
    return answers


def alike(found: Mapping[str, Answer], expected: Mapping[str, Answer], tolerance: float) -> None:
    """Tokens are equal, and log-probabilities nearly."""
    assert {name: tokens for name, (tokens, _) in found.items()} == {name: t for name, (t, _) in expected.items()}
    for name, (_, logprobs) in expected.items():
        for one, other in zip(found[name][1], logprobs, strict=True):
            assert abs(one.logprob - other.logprob) < tolerance, name
