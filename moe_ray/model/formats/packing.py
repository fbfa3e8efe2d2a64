"""Small integers in larger ones: what the quantised formats of checkpoints share. Little-endian, as safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np

WORD: Final = 32
"""Bits of the integers that hold codes."""
CHUNK: Final = 1 << 17
"""Bytes that are unpacked at a time."""


def unpack_rows(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The codes of each row, the lowest bits first: int32 [R, W] → uint8 [R, count]. Codes of 3 bits may lie in two."""
    import numpy as np

    as_bytes = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if bits == 8:
        return np.ascontiguousarray(as_bytes[:, :count])
    if 8 % bits:
        single = np.unpackbits(as_bytes, axis=1, count=count * bits, bitorder="little")
        return np.packbits(single.reshape(len(words), count, bits), axis=2, bitorder="little")[:, :, 0]
    if bits == 4:
        return np.ascontiguousarray(_nibbles(as_bytes)[:, :count])
    per_byte, mask = 8 // bits, np.uint8(2**bits - 1)
    codes = np.empty((*as_bytes.shape, per_byte), np.uint8)
    for place in range(per_byte):
        np.bitwise_and(as_bytes >> np.uint8(place * bits), mask, out=codes[:, :, place])
    return np.ascontiguousarray(codes.reshape(len(words), -1)[:, :count])


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """The halves of each byte, the low one first: uint8 [R, B] → uint8 [R, 2 B].

    A byte is widened to two, of which each keeps a half: whole vectors at a time, in parts that stay in the cache.
    """
    import numpy as np

    flat = packed.reshape(-1)
    pairs = np.empty(flat.size, "<u2")
    for start in range(0, flat.size, CHUNK):
        part = pairs[start : start + CHUNK]
        part[:] = flat[start : start + CHUNK]
        part |= part << np.uint16(4)
        part &= np.uint16(0x0F0F)
    return pairs.view(np.uint8).reshape(len(packed), -1)


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack_rows`: uint8 [R, count] → int32 [R, ceil(count * bits / 32)], filled up with zeros."""
    import numpy as np

    rows, count = codes.shape
    per_byte = 8 // bits
    width = -(-count * bits // WORD) * 4
    filled = np.zeros((rows, width, per_byte), np.uint8)
    filled.reshape(rows, -1)[:, :count] = codes
    as_bytes = np.zeros((rows, width), np.uint8)
    for place in range(per_byte):
        as_bytes |= filled[:, :, place] << np.uint8(place * bits)
    return as_bytes.view("<i4")


def words_of(count: int, bits: int) -> int:
    """Integers of 32 bits that hold `count` codes."""
    return -(-count * bits // WORD)
