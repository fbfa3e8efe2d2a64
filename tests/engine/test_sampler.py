"""The sampler: a pure function of (logits, parameters, seed, position), with the distributions of transformers."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from moe_ray.core import Request, SamplingParams, Sequence
from moe_ray.engine import sampler
from moe_ray.engine.adjustments import Row, adjustments
from moe_ray.engine.draws import TOP_CANDIDATES
from moe_ray.engine.host_copies import Upload
from moe_ray.engine.sampler import sample, uniform

VOCAB = 200
torch.set_num_threads(1)  # a second thread only waits for the first on work this small


def sequence(params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None) -> Sequence:
    prompt, output = prompt or [1, 2, 3], output or []
    return Sequence(Request("r", tuple(prompt), params), [*prompt, *output])


def spiky(rows: int, vocab: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def hf_probabilities(logits: torch.Tensor, params: SamplingParams, tokens: list[int] | None = None) -> torch.Tensor:
    """The distribution that transformers would draw from. logits [V]; returns [V] float64."""
    scores, ids = logits.double()[None], torch.tensor([tokens or [0]])
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    if params.temperature != 1.0:
        scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p > 0.0:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    if params.typical_p < 1.0:
        scores = TypicalLogitsWarper(params.typical_p)(ids, scores)
    return scores.softmax(-1)[0]


def adjusted(
    logits: torch.Tensor,
    group: list[Sequence],
    drafts: list[list[int]] | None = None,
    eos: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """Logits as tokens are chosen of them."""
    upload, changed = Upload(), logits.clone()
    rows = [Row(seq, draft) for seq, draft in zip(group, drafts or [[]] * len(group), strict=True)]
    made = adjustments(rows, eos, logits.shape[-1], upload)
    upload.send(logits.device)
    for each in made:
        each.apply(changed)
    return changed


def draw(logits: torch.Tensor, params: SamplingParams, count: int, first_seed: int = 0) -> np.ndarray:
    """Tokens that `count` seeds draw from logits [V]."""
    drawn: list[int] = []
    for start in range(0, count, 1000):
        size = min(1000, count - start)
        group = [sequence(replace(params, seed=first_seed + start + i)) for i in range(size)]
        drawn += sample(logits.expand(size, -1), group).token_ids
    return np.array(drawn)


def chi_square(drawn: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; rare tokens are pooled so that each cell expects at least 5."""
    counts = np.bincount(drawn, minlength=len(probabilities)).astype(float)
    expected = probabilities * len(drawn)
    order = np.argsort(-expected)
    cells: list[tuple[float, float]] = []
    got = want = 0.0
    for i in order:
        got, want = got + counts[i], want + expected[i]
        if want >= 5:
            cells.append((got, want))
            got = want = 0.0
    if cells:
        cells[-1] = (cells[-1][0] + got, cells[-1][1] + want)
    return sum((g - w) ** 2 / w for g, w in cells), len(cells) - 1


def critical(freedom: int) -> float:
    """Chi-square quantile at about 1 - 1e-5 (Wilson & Hilferty 1931); seeds are fixed, so a test never flickers."""
    z = 4.265
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def test_greedy_is_argmax() -> None:
    logits = spiky(16, VOCAB, 0)
    params = SamplingParams(temperature=0, top_k=3, top_p=0.2, seed=9)
    assert sample(logits, [sequence(params)] * 16).token_ids == logits.argmax(-1).tolist()


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [17, 60, 199]] = 4.0
    assert sample(logits, [sequence(SamplingParams(temperature=0))]).token_ids == [17]


KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(top_k=5),
    SamplingParams(top_k=1500),
    SamplingParams(top_p=0.7),
    SamplingParams(top_p=0.99, temperature=2.0),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1e-4, temperature=2.0),
    SamplingParams(top_k=40, top_p=0.9, min_p=0.02, temperature=0.8),
    SamplingParams(typical_p=0.6),
    SamplingParams(top_k=60, typical_p=0.9, temperature=1.2),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, top_p=0.9),
    SamplingParams(logit_bias={3: 5.0, 9: -100.0}),
    SamplingParams(min_tokens=4, stop_token_ids=(5,)),
]


@pytest.mark.parametrize("kind", ["spiky", "flat", "ties"])
def test_a_token_depends_on_its_own_row_only(kind: str) -> None:
    vocab, rows = 3000, 60
    rng = random.Random(1)
    logits = spiky(rows, vocab, 5, {"spiky": 3.0, "flat": 0.05, "ties": 1.0}[kind])
    if kind == "ties":
        logits = (2 * logits).round() / 2
    group = [
        sequence(
            replace(KINDS[i % len(KINDS)], seed=rng.getrandbits(60)),
            output=[rng.randrange(vocab) for _ in range(rng.randrange(30))],
        )
        for i in range(rows)
    ]
    alone = [sample(logits[i : i + 1], [group[i]], frozenset({2})).token_ids[0] for i in range(rows)]
    for _ in range(12):
        some = rng.sample(range(rows), rng.randint(2, rows))
        together = sample(logits[some], [group[i] for i in some], frozenset({2})).token_ids
        assert together == [alone[i] for i in some]


def test_a_row_behind_drafts_is_the_row_of_a_sequence_that_has_them() -> None:
    rng = random.Random(2)
    rows = 4 * len(KINDS)
    logits = spiky(rows, VOCAB, 12)
    kinds = [replace(KINDS[i % len(KINDS)], seed=rng.getrandbits(60)) for i in range(rows)]
    outputs = [[rng.randrange(9) for _ in range(rng.randrange(6))] for _ in range(rows)]
    cuts = [rng.randint(0, len(output)) for output in outputs]
    whole = [sequence(p, output=output) for p, output in zip(kinds, outputs, strict=True)]
    parts = [sequence(p, output=output[:cut]) for p, output, cut in zip(kinds, outputs, cuts, strict=True)]
    ahead = [output[cut:] for output, cut in zip(outputs, cuts, strict=True)]
    none: list[list[int]] = [[]] * rows
    changed = [
        adjusted(logits, group, drafts, frozenset({2}))
        for group, drafts in ((whole, none), (parts, ahead), (parts, none))
    ]
    assert torch.equal(changed[0], changed[1])
    assert not torch.equal(changed[0], changed[2])
    wanted = sample(logits, whole, frozenset({2})).token_ids
    assert sample(logits, parts, frozenset({2}), ahead).token_ids == wanted
    assert sample(logits, parts, frozenset({2})).token_ids != wanted, "what is ahead made no difference"


def test_the_logits_are_left_as_they_were() -> None:
    logits = spiky(len(KINDS), VOCAB, 3)
    before = logits.clone()
    sample(logits, [sequence(replace(p, seed=1), output=[4, 4]) for p in KINDS], frozenset({2}))
    assert torch.equal(logits, before)


def test_seed_and_position_decide() -> None:
    logits = torch.zeros(1, 20000)
    seen = set()
    for seed in range(20):
        for length in range(1, 20):
            seq = sequence(SamplingParams(seed=seed), prompt=[1], output=[1] * (length - 1))
            seen.add(tuple(sample(logits, [seq]).token_ids))
    assert len(seen) > 365  # of 380 draws from 20,000 equally likely tokens


DISTRIBUTIONS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.7),
    SamplingParams(top_k=7),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=0.3, temperature=1.5),
    SamplingParams(min_p=0.1),
    SamplingParams(min_p=0.02, temperature=1.3),
    SamplingParams(top_k=20, top_p=0.7),
    SamplingParams(top_k=20, min_p=0.05, temperature=0.9),
    SamplingParams(top_p=0.95, min_p=0.03, temperature=1.4),
    SamplingParams(top_k=50, top_p=0.9, min_p=0.02, temperature=1.2),
    SamplingParams(typical_p=0.4, temperature=1.1),
    SamplingParams(repetition_penalty=1.5, top_p=0.9),
]


@pytest.mark.parametrize("index", range(len(DISTRIBUTIONS)))
def test_draws_follow_the_distribution_of_transformers(index: int) -> None:
    params = DISTRIBUTIONS[index]
    logits = spiky(1, VOCAB, 100 + index, 2.0)[0]
    wanted = hf_probabilities(logits, params, [1, 2, 3]).numpy()
    drawn = draw(logits, params, 8000, first_seed=10**6 * index)
    assert wanted[drawn].min() > 0, "a token was drawn that transformers cuts off"
    statistic, freedom = chi_square(drawn, wanted)
    assert freedom == 0 or statistic < critical(freedom)


def test_the_chi_square_test_can_fail() -> None:
    logits = spiky(1, VOCAB, 0, 2.0)[0]
    drawn = draw(logits, SamplingParams(temperature=1.1), 8000)
    statistic, freedom = chi_square(drawn, hf_probabilities(logits, SamplingParams()).numpy())
    assert statistic > critical(freedom)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=3000, top_p=0.5),
        SamplingParams(min_p=0.9),
        SamplingParams(top_k=2500),
        SamplingParams(top_k=100, top_p=0.5),
        SamplingParams(),
    ],
    ids=["top_p", "top_k+top_p", "min_p", "top_k", "few", "all"],
)
def test_flat_distributions_over_more_than_the_first_candidates(params: SamplingParams) -> None:
    logits = spiky(1, 4 * TOP_CANDIDATES, 7, 0.03)[0]
    wanted = hf_probabilities(logits, params)
    kept = wanted > 0
    if params.top_k != 100:
        assert int(kept.sum()) > TOP_CANDIDATES, "this case is meant to need the second pass"
    drawn = draw(logits, params, 3000)
    # float32 and float64 may differ about the one token at the edge of top_p.
    assert int((~kept)[torch.from_numpy(drawn)].sum()) <= 8
    covered = len(set(drawn.tolist())) / int(kept.sum())
    assert covered > 0.95 * (1 - math.exp(-len(drawn) / int(kept.sum()))), "whole parts of the distribution never come"
    halves = (drawn < len(logits) // 2).mean(), float(wanted[: len(logits) // 2].sum())
    assert abs(halves[0] - halves[1]) < 0.03


def test_a_tiny_top_p_and_top_k_1_are_greedy() -> None:
    logits = spiky(50, VOCAB, 11)
    for params in (SamplingParams(top_p=1e-9), SamplingParams(top_k=1), SamplingParams(min_p=1.0)):
        group = [sequence(replace(params, seed=i)) for i in range(50)]
        assert sample(logits, group).token_ids == logits.argmax(-1).tolist()


def test_ties_at_the_cut_go_to_the_lower_ids() -> None:
    logits = torch.zeros(VOCAB)
    logits[[150, 30, 90, 60]] = 5.0
    for params, kept in ((SamplingParams(top_k=2), {30, 60}), (SamplingParams(min_p=0.5), {30, 60, 90, 150})):
        assert set(draw(logits, params, 400).tolist()) == kept


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=10)])
def test_tokens_of_minus_infinity_never_come(params: SamplingParams) -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    allowed = [0, 77, VOCAB - 1]
    logits[allowed] = torch.tensor([0.5, 0.0, 0.5])
    assert set(draw(logits, params, 500).tolist()) == set(allowed)


def test_a_single_token_left_is_drawn_at_any_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    for at in (0, 100, VOCAB - 1):
        logits[:] = -torch.inf
        logits[0, at] = 1.0
        for noise in (0.0, 0.5, 1 - 2.0**-53):
            monkeypatch.setattr(sampler, "uniform", lambda seed, position, noise=noise: noise)
            for params in (SamplingParams(), SamplingParams(top_p=0.5)):
                assert sample(logits, [sequence(params)]).token_ids == [at]


def test_extreme_noise_gives_the_ends_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = spiky(1, VOCAB, 2)
    logits[0, -1] = -torch.inf
    for noise, at in ((0.0, 0), (1 - 2.0**-53, VOCAB - 2)):
        monkeypatch.setattr(sampler, "uniform", lambda seed, position, noise=noise: noise)
        assert sample(logits, [sequence(SamplingParams())]).token_ids == [at]


def test_logit_bias_forces_and_forbids() -> None:
    logits = spiky(1, VOCAB, 4)
    best = int(logits.argmax())
    assert sample(logits, [sequence(SamplingParams(temperature=0, logit_bias={8: 100.0}))]).token_ids == [8]
    second = logits.clone()
    second[0, best] -= 100
    banned = SamplingParams(temperature=0, logit_bias={best: -100.0})
    assert sample(logits, [sequence(banned)]).token_ids == [int(second.argmax())]
    assert set(draw(logits[0], SamplingParams(logit_bias={8: 100.0}), 200).tolist()) == {8}


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = spiky(1, VOCAB, 6)
    prompt, output = [1, 5, 5, 9], [7, 9]
    for penalty in (0.7, 1.3, 2.0):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
        group = [sequence(SamplingParams(repetition_penalty=penalty), prompt, output)]
        assert torch.equal(adjusted(logits, group), wanted)


def test_presence_and_frequency_penalties_are_those_of_openai() -> None:
    # platform.openai.com: mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, over the output
    logits = spiky(1, VOCAB, 6)
    prompt, output = [1, 5, 5, 9], [7, 9, 7, 7]
    wanted = logits.clone()
    for token in set(output):
        wanted[0, token] -= 0.4 * output.count(token) + 0.9
    params = SamplingParams(presence_penalty=0.9, frequency_penalty=0.4)
    torch.testing.assert_close(adjusted(logits, [sequence(params, prompt, output)]), wanted)


def test_penalties_touch_no_other_row() -> None:
    logits = spiky(3, VOCAB, 6)
    params = [SamplingParams(), SamplingParams(frequency_penalty=1.0), SamplingParams()]
    group = [sequence(p, output=[4, 5]) for p in params]
    changed = (adjusted(logits, group) != logits).nonzero().tolist()
    assert changed == [[1, 4], [1, 5]]


@pytest.mark.parametrize(("ignore_eos", "masked"), [(False, {5, 6, 2}), (True, {5, 6})])
def test_min_tokens_masks_what_would_end_the_sequence(ignore_eos: bool, masked: set[int]) -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=(5, 6), ignore_eos=ignore_eos)
    logits = spiky(1, VOCAB, 8)
    for output, gone in (([], masked), ([9, 9], masked), ([9, 9, 9], set())):
        out = adjusted(logits, [sequence(params, output=output)], eos=frozenset({2}))
        assert set((out[0] == -torch.inf).nonzero()[:, 0].tolist()) == gone


def test_only_allowed_tokens_are_chosen_whatever_the_bias() -> None:
    allowed = (7, 9, 30)
    for params in (
        SamplingParams(temperature=0, allowed_token_ids=allowed, logit_bias={5: 100.0}),
        SamplingParams(temperature=2, allowed_token_ids=allowed, top_p=0.9),
        SamplingParams(temperature=1, allowed_token_ids=allowed, min_tokens=4, stop_token_ids=(7,)),
    ):
        drawn = set(draw(spiky(1, VOCAB, 3)[0], params, 200).tolist())
        assert drawn <= set(allowed) - ({7} if params.min_tokens else set())


def test_masks_that_would_leave_nothing_are_not_applied() -> None:
    for params in (
        SamplingParams(allowed_token_ids=(7,), min_tokens=4, stop_token_ids=(7,)),
        SamplingParams(allowed_token_ids=(7,), bad_words_ids=((7,),)),
    ):
        assert set(draw(spiky(1, VOCAB, 3)[0], params, 20).tolist()) == {7}


def test_a_forbidden_word_is_never_completed() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 9.0, 8.0
    params = SamplingParams(temperature=0, bad_words_ids=((3, 4, 5), (6,)))
    assert sample(logits, [sequence(params, output=[3, 4])]).token_ids not in ([5], [6])
    assert sample(logits, [sequence(params, output=[4])]).token_ids == [5]
    assert sample(logits, [sequence(params, prompt=[3, 4])]).token_ids == [5], "the prompt may hold its beginning"
    drafted = sample(logits.expand(2, -1), [sequence(params, output=[3])] * 2, drafts=[(), (4,)]).token_ids
    assert drafted[0] == 5 != drafted[1], "a draft counts as output"


def test_a_row_is_masked_alone() -> None:
    logits = spiky(3, VOCAB, 8)
    alone = [SamplingParams(temperature=0), SamplingParams(temperature=0, allowed_token_ids=(4, 5)), SamplingParams()]
    together = sample(logits, [sequence(params) for params in alone]).token_ids
    assert together == [sample(logits[i : i + 1], [sequence(p)]).token_ids[0] for i, p in enumerate(alone)]


def test_min_tokens_beats_a_bias() -> None:
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=(5,), logit_bias={5: 100.0})
    assert sample(spiky(1, VOCAB, 8), [sequence(params)]).token_ids != [5]
    assert sample(spiky(1, VOCAB, 8), [sequence(params, output=[1, 1, 1])]).token_ids == [5]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = spiky(4, VOCAB, 9)
    wants = [None, 0, 3, 20]
    params = [
        SamplingParams(logprobs=n, temperature=0.5, top_k=4, logit_bias={3: -50.0}, presence_penalty=1.0, seed=1)
        for n in wants
    ]
    sampled = sample(logits, [sequence(p, output=[8]) for p in params])
    table = logits.log_softmax(-1)
    assert sampled.logprobs[0] is None
    for row, count in enumerate(wants):
        found = sampled.logprobs[row]
        if count is None or found is None:
            assert count is None
            continue
        assert found.token_id == sampled.token_ids[row]
        assert found.logprob == pytest.approx(float(table[row, found.token_id]), abs=1e-6)
        values, ids = table[row].topk(max(count, 1))
        assert [i for i, _ in found.top] == ids[:count].tolist()
        assert [v for _, v in found.top] == pytest.approx(values[:count].tolist(), abs=1e-6)


def test_uniform_is_uniform_and_independent() -> None:
    table = np.array([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert table.min() >= 0.0
    assert table.max() < 1.0
    flat, deviations = table.ravel(), 5.0 / math.sqrt(table.size)
    for power in range(1, 5):
        exact, spread = 1 / (power + 1), math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs((flat**power).mean() - exact) < deviations * spread
    statistic, freedom = chi_square((flat * 256).astype(int), np.full(256, 1 / 256))
    assert statistic < critical(freedom)
    for lag in (1, 2, 7):
        for one, other in ((table[:, :-lag], table[:, lag:]), (table[:-lag], table[lag:])):
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5.0 / math.sqrt(one.size)
            pairs = (one.ravel() * 16).astype(int) * 16 + (other.ravel() * 16).astype(int)
            statistic, freedom = chi_square(pairs, np.full(256, 1 / 256))
            assert statistic < critical(freedom)
    # seed s at position p + 1 must not be seed s' at position p, for seeds apart by the generator's own step
    assert uniform(0x9E3779B97F4A7C15, 4) != uniform(0, 5)


def test_uniform_is_pinned() -> None:
    # Changing it breaks streams that are replayed between trunks of two versions.
    pinned = [0.28176129772258496, 0.20679255571009714, 0.4830256674862293]
    assert [uniform(0, 0), uniform(7, 1), uniform(2**63 - 1, 10**6)] == pinned
