"""A file of tensors: a header that says where each tensor's bytes lie, and those bytes. What its two kinds share.

Reading does not map the file, and does not hold the interpreter's lock while the disk works, as a page fault in a map
would: replicas serve while they load.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    import numpy as np

ALIGNMENT: Final = 64
"""Of what is read, in bytes: a cache line, as torch's own memory."""


class NotWhole(Exception):
    """A file is not of the kind that its name says, or a part of one. Raised and caught inside `model/`."""


def aligned(nbytes: int) -> np.ndarray:
    """Memory of its own for so many bytes, uint8."""
    import numpy as np

    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    skip = -room.ctypes.data % ALIGNMENT
    return room[skip : skip + nbytes]


def read_bytes(file: BinaryIO, start: int, into: memoryview) -> int:
    """Fill `into` with the file's bytes from `start`; how many are missing at the file's end. Raises `OSError`."""
    done = 0
    while done < len(into) and (count := os.preadv(file.fileno(), [into[done:]], start + done)):
        done += count
    return len(into) - done
