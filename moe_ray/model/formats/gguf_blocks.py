"""ggml's blocks of 32 weights with a scale each, and its types with a table of 16 levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.gguf_format import GgufFormat, Unpacked, halves, nibbles
from moe_ray.model.formats.grouped import MIDDLE, Grouping

if TYPE_CHECKING:
    import numpy as np

IQ4_LEVELS: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""ggml's kvalues_iq4nl."""
MXFP4_LEVELS: Final = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
"""E2M1 (OCP Microscaling Formats 1.0)."""


def _q4_0(blocks: np.ndarray) -> Unpacked:
    """[scale, 2][codes, 16]: d * (q - 8)"""
    return Unpacked(nibbles(blocks[:, 2:]), halves(blocks, 0))


def _q4_1(blocks: np.ndarray) -> Unpacked:
    """[scale, 2][minimum, 2][codes, 16]: d * q + m = d * (q - 8) + (m + 8 d)"""
    scales = halves(blocks, 0)
    return Unpacked(nibbles(blocks[:, 4:]), scales, halves(blocks, 2) + MIDDLE[4] * scales)


def _five_bits(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """[B, 4] bytes with the fifth bits and [B, 16] bytes with the others → [B, 32] values of 5 bits."""
    import numpy as np

    return nibbles(low) | np.unpackbits(high, axis=-1, bitorder="little") << 4


def _q5_0(blocks: np.ndarray) -> Unpacked:
    """[scale, 2][fifth bits, 4][codes, 16]: d * (q - 16)"""
    return Unpacked(_five_bits(blocks[:, 2:6], blocks[:, 6:]) + (MIDDLE[8] - 16), halves(blocks, 0))


def _q5_1(blocks: np.ndarray) -> Unpacked:
    """[scale, 2][minimum, 2][fifth bits, 4][codes, 16]: d * q + m"""
    return Unpacked(_five_bits(blocks[:, 4:8], blocks[:, 8:]) + MIDDLE[8], halves(blocks, 0), halves(blocks, 2))


def _q8_0(blocks: np.ndarray) -> Unpacked:
    """[scale, 2][codes with a sign, 32]: d * q"""
    return Unpacked(blocks[:, 2:] ^ 0x80, halves(blocks, 0))  # q + 128 of a byte with a sign


def _mxfp4(blocks: np.ndarray) -> Unpacked:
    """[exponent, 1][codes, 16]: 2^(e - 127) * level"""
    import numpy as np

    return Unpacked(nibbles(blocks[:, 1:]), np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 127))


def _iq4_xs(blocks: np.ndarray) -> Unpacked:
    """[scale, 2][high bits of 8 scales, 2][low ones, 4][codes, 8 x 16]: d * (s - 32) * level"""
    import numpy as np

    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 0xF, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales = (low | high.astype(np.uint8) << 4).astype(np.float32) - 32
    return Unpacked(nibbles(blocks[:, 8:].reshape(-1, 8, 16)), halves(blocks, 0) * scales)


_IQ4: Final = Grouping(bits=4, group=32, levels=tuple(map(float, IQ4_LEVELS)))

BLOCK_FORMATS: Final = (
    GgufFormat("Q4_0", 32, 18, Grouping(bits=4, group=32), _q4_0),
    GgufFormat("Q4_1", 32, 20, Grouping(bits=4, group=32, offsets=True), _q4_1),
    GgufFormat("Q5_0", 32, 22, Grouping(bits=8, group=32), _q5_0),
    GgufFormat("Q5_1", 32, 24, Grouping(bits=8, group=32, offsets=True), _q5_1),
    GgufFormat("Q8_0", 32, 34, Grouping(bits=8, group=32), _q8_0),
    GgufFormat("IQ4_NL", 32, 18, _IQ4, _q4_0),
    GgufFormat("IQ4_XS", 256, 136, _IQ4, _iq4_xs),
    GgufFormat("MXFP4", 32, 17, Grouping(bits=4, group=32, levels=tuple(map(float, MXFP4_LEVELS))), _mxfp4),
)
