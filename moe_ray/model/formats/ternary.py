"""Ternary weights at a bit each or less, moe_ray's own format for research (the idea: QMoE, arXiv:2310.16795).

value[n, k] = weight_scale[n] * t[n, k], t one of -1, 0, 1. `weight_words` has t row after row, in the words of
`word_code`; `weight_dictionary` is [worth of the dictionary]. The fewer of t are not 0, the fewer words there are. On
disk only: in memory a weight has 4 bits, which kernels compute on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.grouped import MIDDLE, GroupedCodes, Grouping
from moe_ray.model.formats.integers import expect_shape
from moe_ray.model.formats.weight_format import BadTensor, Place, Source, StoredWeight, TensorPart
from moe_ray.model.formats.word_code import WORTHS, BadWords, dictionary, worth_of

if TYPE_CHECKING:
    import numpy as np
    import torch

METHOD: Final = "moe-ray-ternary"
"""`quant_method` of config.json."""
WORDS, WORTH, SCALE = "weight_words", "weight_dictionary", "weight_scale"


@dataclass(frozen=True, slots=True)
class Ternary:
    """`WeightFormat` of digits in words and a scale a row."""

    name: str

    def names(self, place: Place) -> tuple[str, ...]:
        return tuple(place.named(suffix) for suffix in (WORDS, WORTH, SCALE))

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        words_name, worth_name, scale_name = self.names(place)
        words = source.entry(words_name)
        if words is None or place.experts is not None or len(shape) != 2:
            return None
        source.require(words_name, words_name, ("U16",))
        n, k = shape
        worth_of_words = source.require(worth_name, words_name, ("U16",))
        expect_shape(worth_name, worth_of_words, (1,), "the format")
        worth = int(source.read(worth_name)[0])
        if worth not in WORTHS:
            raise BadTensor(worth_name, f"damaged: dictionary {worth}, there are {', '.join(map(str, WORTHS))}")
        if words.shape != (words.nbytes // 2,) or not 0 < words.shape[0] <= n * k:
            raise BadTensor(words_name, f"shape {list(words.shape)}: not words of {n * k} digits")
        scale = source.require(scale_name, words_name, ("BF16", "F16", "F32"))
        expect_shape(scale_name, scale, (n,), f"a weight [{n}, {k}]")
        used = ((words_name, words), (worth_name, worth_of_words), (scale_name, scale))
        return StoredWeight(self.name, shape, tuple(TensorPart.whole(*one) for one in used), Grouping(4, k))

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return self.codes(stored, arrays).values()

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes:
        import numpy as np

        words, worth, scale = arrays
        n, k = stored.shape
        try:
            digits = dictionary(int(worth[0])).decode(words, n * k)
        except BadWords as error:
            raise BadTensor(stored.parts[0].name, f"damaged: {error}") from None
        codes = digits + np.uint8(MIDDLE[4]) - 3 * (digits >> 1)  # 0, 1, 2 → the codes of 0, 1 and -1
        codes = codes.reshape(n, k)
        return GroupedCodes(Grouping(4, k), codes, scale.astype(np.float32).reshape(n, 1))


TERNARY: Final = Ternary("ternary")


def pack_ternary(place: Place, weight: GroupedCodes) -> dict[str, torch.Tensor]:
    """The tensors of a weight whose codes of 4 bits are all -1, 0 or 1, with a scale a row, exact in bfloat16.

    In the words of the dictionary that needs the fewest for so many digits that are not 0. Columns lie in the order of
    the inputs: a scale is of a whole row, so that no order needs to be kept.
    """
    import numpy as np
    import torch

    codes = weight.codes
    if weight.order is not None:
        codes = np.empty_like(weight.codes)
        codes[:, weight.order] = weight.codes
    digits = codes - np.uint8(MIDDLE[4])
    digits[codes < MIDDLE[4]] = 2
    best = dictionary(worth_of(np.count_nonzero(digits) / digits.size))
    return {
        place.named(WORDS): torch.from_numpy(best.encode(digits)),
        place.named(WORTH): torch.tensor([best.worth], dtype=torch.uint16),
        place.named(SCALE): torch.from_numpy(weight.scales[:, 0]).bfloat16(),
    }
