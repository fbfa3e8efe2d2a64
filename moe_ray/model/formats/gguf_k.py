"""ggml's "K" types: blocks of 256 weights in 8 groups of 32 or 16 of 16, whose scales are quantised themselves.

Codes of 2, 3, 5 and 6 bits become codes of 8 bits. Kernels do not compute on groups of 16: those types come as floats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.gguf_format import GgufFormat, Unpacked, halves, nibbles
from moe_ray.model.formats.grouped import MIDDLE, Grouping

if TYPE_CHECKING:
    import numpy as np

_MIDDLE: Final = MIDDLE[8]


def _bits(packed: np.ndarray, width: int, mask: int) -> np.ndarray:
    """[..., n] bytes → [..., 8 / width, n]: the lowest bits of all bytes, then the next ones, … up to the highest."""
    import numpy as np

    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return packed[..., None, :] >> shifts & np.uint8(mask)


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, 12] bytes → 8 scales and 8 minima of 6 bits each, float32 [B, 8] (ggml's get_scale_min_k4).

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minima 0-3, with the two high bits of the other four above them; bytes 8-11
    hold the low four bits of scales 4-7, and of minima 4-7 above them.
    """
    import numpy as np

    scale, minimum, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([scale & 63, (low & 0xF) | (scale >> 6) << 4], axis=-1)
    minima = np.concatenate([minimum & 63, (low >> 4) | (minimum >> 6) << 4], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q2_k(blocks: np.ndarray) -> Unpacked:
    """[16 scales and minima of 4 bits, 16][codes, 64][scale, 2][minimum, 2]: d * s * q - dmin * m"""
    import numpy as np

    codes = _bits(blocks[:, 16:80].reshape(-1, 2, 32), 2, 3).reshape(-1, 256)
    scales = halves(blocks, 80) * (blocks[:, :16] & 0xF).astype(np.float32)
    minima = halves(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    return Unpacked(codes + np.uint8(_MIDDLE), scales, -minima)


def _q3_k(blocks: np.ndarray) -> Unpacked:
    """[third bits, 32][codes, 64][16 scales of 6 bits, 12][scale, 2]: d * (s - 32) * (q - 4)"""
    import numpy as np

    low = _bits(blocks[:, 32:96].reshape(-1, 2, 32), 2, 3).reshape(-1, 256)
    high = _bits(blocks[:, :32], 1, 1).reshape(-1, 256)
    low_scales = nibbles(blocks[:, 96:104])
    high_scales = _bits(blocks[:, 104:108], 2, 3).reshape(-1, 16)
    scales = (low_scales | high_scales << 4).astype(np.float32) - 32
    return Unpacked((low | high << 2) + np.uint8(_MIDDLE - 4), halves(blocks, 108) * scales)


def _q4_k(blocks: np.ndarray) -> Unpacked:
    """[scale, 2][minimum, 2][8 scales and minima, 12][codes, 128]: d * s * q - dmin * m = d * s * (q - 8) + offset"""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales *= halves(blocks, 0)
    offsets = MIDDLE[4] * scales - halves(blocks, 2) * minima
    return Unpacked(nibbles(blocks[:, 16:].reshape(-1, 4, 32)), scales, offsets)


def _q5_k(blocks: np.ndarray) -> Unpacked:
    """[scale, 2][minimum, 2][8 scales and minima, 12][fifth bits, 32][codes, 128]: d * s * q - dmin * m"""
    import numpy as np

    scales, minima = _scales_and_minima(blocks[:, 4:16])
    low = nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256)
    high = _bits(blocks[:, 16:48], 1, 1).reshape(-1, 256)
    codes = (low | high << 4) + np.uint8(_MIDDLE)
    return Unpacked(codes, halves(blocks, 0) * scales, -halves(blocks, 2) * minima)


def _q6_k(blocks: np.ndarray) -> Unpacked:
    """[low bits, 128][high bits, 64][16 scales with a sign, 16][scale, 2]: d * s * (q - 32)"""
    import numpy as np

    low = nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), 2, 3).reshape(-1, 256)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return Unpacked((low | high << 4) + np.uint8(_MIDDLE - 32), halves(blocks, 208) * scales)


K_FORMATS: Final = (
    GgufFormat("Q2_K", 256, 84, Grouping(bits=8, group=16, offsets=True), _q2_k),
    GgufFormat("Q3_K", 256, 110, Grouping(bits=8, group=16), _q3_k),
    GgufFormat("Q4_K", 256, 144, Grouping(bits=4, group=32, offsets=True), _q4_k),
    GgufFormat("Q5_K", 256, 176, Grouping(bits=8, group=32, offsets=True), _q5_k),
    GgufFormat("Q6_K", 256, 210, Grouping(bits=8, group=16), _q6_k),
)
