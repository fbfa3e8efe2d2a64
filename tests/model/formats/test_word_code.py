"""Digits in words are a plain Tunstall code's, nearly as short as digits can be, and a corrupt word harms no more."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

import numpy as np
import pytest

from moe_ray.model.formats.word_code import WORDS, WORTHS, BadWords, bits_of, dictionary, worth_of

PLAIN = (1, 16)
"""Worths of which all words are compared."""


def plain_words(worth: int) -> list[str]:
    """All words as strings of digits, by their numbers: a sorted list of leaves whose first one is divided."""
    leaves = [(0, 0, "")]
    made = 1
    while len(leaves) + 2 <= WORDS:
        cost, _, run = leaves.pop(0)
        for digit in "012":
            bisect.insort(leaves, (cost + (1 if digit == "0" else worth), made, run + digit))
            made += 1
    return [run for _, _, run in sorted(leaves, key=lambda leaf: leaf[1])]


def random_digits(count: int, share: float, seed: int = 1) -> np.ndarray:
    random = np.random.default_rng(seed)
    return ((random.random(count) < share) * random.integers(1, 3, count)).astype(np.uint8)


@pytest.mark.parametrize("worth", PLAIN)
def test_it_is_tunstalls_code(worth: int) -> None:
    """Digits are cut into the same words, and words are the same digits, as by strings."""
    words, made = plain_words(worth), dictionary(worth)
    assert made.lengths.tolist() == [len(word) for word in words]
    assert made.counts.tolist() == [len(word) - word.count("0") for word in words]
    number = {word: at for at, word in enumerate(words)}
    digits = random_digits(5000, 1.5 / (worth + 1))
    rest, expected = "".join(map(str, digits)), []
    while rest:
        padded = rest + "0" * int(made.lengths.max())
        word = next(padded[:length] for length in range(1, len(padded)) if padded[:length] in number)
        expected.append(number[word])
        rest = rest[len(word) :]
    encoded = made.encode(digits)
    assert encoded.tolist() == expected
    every = np.random.default_rng(2).permutation(len(words)).astype(np.uint16)
    total = sum(map(len, words))
    decoded = made.decode(every, total)
    assert "".join(map(str, decoded)) == "".join(words[word] for word in every)


@pytest.mark.parametrize("worth", WORTHS)
def test_words_are_runs_that_cover_all_digits_once(worth: int) -> None:
    """A complete code without prefixes: Kraft's sum over three digits is exactly 1 (Cover & Thomas, theorem 5.2.1)."""
    made = dictionary(worth)
    assert WORDS - 2 < len(made.lengths) <= WORDS
    by_length = np.bincount(made.lengths)
    assert sum(Fraction(int(count), 3**length) for length, count in enumerate(by_length)) == 1


@pytest.mark.parametrize("worth", WORTHS)
@pytest.mark.parametrize(
    "digits",
    [
        *(random_digits(count, share) for count in (1, 2, 7, 4099, 70001) for share in (0.02, 0.2, 0.7)),
        *(np.full(count, digit, np.uint8) for count in (1, 63, 20011) for digit in range(3)),
        np.tile(np.array([1, 0, 2], np.uint8), 5000),
        np.repeat(np.arange(3, dtype=np.uint8), 3333),
        np.arange(9999, dtype=np.uint8).reshape(99, 101) % 3,
    ],
    ids=lambda digits: f"{digits.size} digits, {np.count_nonzero(digits)} not 0" if hasattr(digits, "size") else None,
)
def test_digits_come_back(digits: np.ndarray, worth: int) -> None:
    made = dictionary(worth)
    words = made.encode(digits)
    assert words.dtype == np.uint16
    assert np.array_equal(made.decode(words, digits.size), digits.reshape(-1))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.15, 0.22, 0.3, 0.54])
def test_words_are_short(share: float) -> None:
    """Within a twelfth of Shannon's bound, and as long as they are said to be before there are any."""
    digits = random_digits(400_000, share)
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share) + share
    bits = 16 * len(dictionary(worth_of(share)).encode(digits)) / digits.size
    assert entropy * 0.995 < bits < entropy * 1.09
    assert bits == pytest.approx(bits_of(share), rel=0.01)


@pytest.mark.parametrize(("share", "worth"), [(0.0, 128), (1.0, 1), (2 / 3, 1), (0.227, 8), (0.1, 32), (1e-9, 128)])
def test_the_dictionary_fits_the_digits(share: float, worth: int) -> None:
    assert worth_of(share) == worth


def test_corrupt_words_are_refused() -> None:
    made = dictionary(16)
    digits = random_digits(10_000, 0.2)
    words = made.encode(digits)
    beyond = words.copy()
    beyond[len(beyond) // 2] = 65535
    with pytest.raises(BadWords, match="word 65535, there are 65535"):
        made.decode(beyond, digits.size)
    for wrong in (words[:-1], np.concatenate((words, words[:1])), words[:0]):
        with pytest.raises(BadWords, match=r"words of \d+ digits, for 10000"):
            made.decode(wrong, digits.size)
    ending = next(word for word in range(len(made.lengths)) if made.places[-1, word] == made.lengths[word] - 1)
    with pytest.raises(BadWords, match="not 0 behind the last one"):
        made.decode(np.array([ending], np.uint16), int(made.lengths[ending]) - 1)


def test_any_words_decode_to_what_they_say_or_are_refused() -> None:
    """Random bytes: as many digits as asked for, all of them 0, 1 or 2, or `BadWords`."""
    random = np.random.default_rng(5)
    decoded = 0
    for worth in WORTHS:
        made = dictionary(worth)
        for _ in range(50):
            words = random.integers(0, 1 << 16, random.integers(1, 200)).astype(np.uint16)
            whole = int(made.lengths[words[words < len(made.lengths)]].sum())
            count = whole - int(random.integers(0, 3))
            try:
                found = made.decode(words, count)
            except BadWords:
                continue
            decoded += 1
            assert found.shape == (count,)
            assert found.max() <= 2
    assert decoded > 50
