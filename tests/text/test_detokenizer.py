"""Decoding that streams: equal to decoding at once, whole characters only, cut at stop strings."""

from __future__ import annotations

import random

import pytest
from tokenizer_forms import TEXTS

from moe_ray.core import SamplingParams
from moe_ray.text.detokenizer import IncrementalDetokenizer
from moe_ray.text.tokenizer import Tokenizer


def stream(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, prompt: list[int], rng: random.Random
) -> tuple[list[str], IncrementalDetokenizer]:
    """Push `ids` in random portions; return the deltas, `finish()` last."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, params)
    deltas, at = [], 0
    while at < len(ids):
        size = rng.choice([1, 1, 1, 2, 5])
        deltas.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*deltas, detokenizer.finish()], detokenizer


@pytest.mark.parametrize("skip", [True, False])
def test_stream_equals_decode_on_random_byte_level_tokens(smol: Tokenizer, skip: bool) -> None:
    rng = random.Random(1)
    params = SamplingParams(skip_special_tokens=skip)
    for _ in range(300):
        ids = [rng.choice([rng.randrange(smol.vocab_size), rng.randrange(300)]) for _ in range(rng.randrange(1, 60))]
        deltas, _ = stream(smol, ids, params, [], rng)
        assert "".join(deltas) == smol.decode(ids, skip)


def test_stream_equals_decode_on_random_mixtral_tokens(mixtral: Tokenizer) -> None:
    rng = random.Random(2)
    characters = list("".join(TEXTS))
    for _ in range(300):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 12)):
            if rng.random() < 0.5:
                ids += [rng.randrange(259, 32000) for _ in range(rng.randrange(1, 5))]
            else:  # characters that are not in the vocabulary become runs of byte tokens
                ids += mixtral.encode("".join(rng.choices(characters, k=4)), add_special_tokens=False)
        prompt = rng.choice([[], [1], mixtral.encode("A prompt: 😀")])
        deltas, _ = stream(mixtral, ids, SamplingParams(), prompt, rng)
        before = mixtral.decode(prompt)
        assert before + "".join(deltas) == mixtral.decode(prompt + ids)
        assert "\ufffd" not in "".join(deltas)


def test_stream_survives_bytes_that_are_not_utf8(mixtral: Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.randrange(3, 259) if rng.random() < 0.7 else rng.randrange(32000) for _ in range(40)]
        deltas, _ = stream(mixtral, ids, SamplingParams(), rng.choice([[], ids[:5]]), rng)
        text = "".join(deltas)
        for i in ids:  # every token that is text comes through, whatever the bytes around it are
            if i > 258:
                assert mixtral.token_to_str(i).strip() in text
        assert text.count("\ufffd") <= len(ids)


def test_a_broken_byte_does_not_disturb_the_characters_before_it(mixtral: Tokenizer) -> None:
    llama = [3 + byte for byte in "🦙".encode()]
    ids = [*llama, 3 + 0xE6, *mixtral.encode("b", add_special_tokens=False)]
    assert mixtral.decode(ids) == "\ufffd" * 5 + " b"  # byte fallback gives up the whole run; what was sent stays sent
    detokenizer = IncrementalDetokenizer(mixtral, [], SamplingParams())
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == "🦙\ufffd b"


@pytest.mark.parametrize("name", ["smol", "mixtral"])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_continues_a_prompt_and_never_shows_half_a_character(
    name: str, text: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    for cut in range(len(ids)):
        prompt, rest = ids[:cut], ids[cut:]
        before = tokenizer.decode(prompt)
        detokenizer = IncrementalDetokenizer(tokenizer, prompt, SamplingParams())
        deltas = [detokenizer.push([i]) for i in rest]
        if not before.endswith("\ufffd"):  # else the prompt ends inside a character
            assert "\ufffd" not in "".join(deltas)
            assert before + "".join(deltas) + detokenizer.finish() == tokenizer.decode(ids)
            assert tokenizer.decode(ids).strip() == text.strip()


@pytest.mark.parametrize("name", ["smol", "mixtral"])
def test_half_a_character_is_flushed_at_the_end(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("x🦙", add_special_tokens=False)
    assert len(ids) > 2
    detokenizer = IncrementalDetokenizer(tokenizer, [], SamplingParams())
    assert [detokenizer.push([i]) for i in ids[:-1]] == ["x"] + [""] * (len(ids) - 2)
    assert set(detokenizer.finish()) == {"\ufffd"}
    assert detokenizer.finish() == ""


def test_stop_string_over_several_tokens(smol: Tokenizer) -> None:
    ids = [i for c in "abcSTOPdef" for i in smol.encode(c)]
    detokenizer = IncrementalDetokenizer(smol, [], SamplingParams(stop=("STOP", "zzz")))
    assert [detokenizer.push([i]) for i in ids] == ["a", "b", "c", *[""] * 7]
    assert (detokenizer.stopped_on, detokenizer.finish()) == ("STOP", "")
    detokenizer = IncrementalDetokenizer(smol, [], SamplingParams(stop=("STOP",), include_stop_str_in_output=True))
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == "abcSTOP"


def test_held_back_text_comes_when_the_stop_string_does_not(smol: Tokenizer) -> None:
    ids = [i for c in "aSTSTOabST" for i in smol.encode(c)]
    detokenizer = IncrementalDetokenizer(smol, [], SamplingParams(stop=("STOP",)))
    assert [detokenizer.push([i]) for i in ids] == ["a", "", "", "ST", "", "", "STOa", "b", "", ""]
    assert (detokenizer.finish(), detokenizer.stopped_on) == ("ST", None)


@pytest.mark.parametrize("include", [True, False])
def test_stop_strings_against_a_character_by_character_search(smol: Tokenizer, include: bool) -> None:
    rng = random.Random(4)
    hits = 0
    for _ in range(400):
        text = "".join(rng.choices("ab中", k=rng.randrange(1, 25)))
        stops = tuple("".join(rng.choices("ab中", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4)))
        expected, met = text, None
        for end in range(1, len(text) + 1):
            met = max((s for s in stops if text[:end].endswith(s)), key=len, default=None)
            if met is not None:
                expected = text[:end] if include else text[: end - len(met)]
                break
        params = SamplingParams(stop=stops, include_stop_str_in_output=include)
        one_by_one = [i for c in text for i in smol.encode(c)]
        for ids in (smol.encode(text), one_by_one):
            deltas, detokenizer = stream(smol, ids, params, [], rng)
            assert ("".join(deltas), detokenizer.stopped_on) == (expected, met)
        hits += met is not None
    assert 100 < hits < 400


def test_stop_strings_wait_for_min_tokens(smol: Tokenizer) -> None:
    ids = [i for c in "aXbXc" for i in smol.encode(c)]
    detokenizer = IncrementalDetokenizer(smol, [], SamplingParams(stop=("X",), min_tokens=3))
    assert detokenizer.push(ids) == "aXb"
    assert detokenizer.stopped_on == "X"


def test_long_runs_without_text_do_not_grow_the_window(smol: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(smol, smol.encode("Hi"), SamplingParams())
    eos = next(iter(smol.eos_token_ids))
    broken = smol.encode("🦙")[0]  # the beginning of a character, over and over
    assert detokenizer.push([eos] * 1000) == ""
    text = detokenizer.push([broken] * 1000) + detokenizer.push(smol.encode(" ok")) + detokenizer.finish()
    assert text.endswith(" ok")
    assert len(detokenizer._ids) < 100
