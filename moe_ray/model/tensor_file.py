"""A file of tensors: a header that says where each tensor's bytes lie, and those bytes. What its two kinds share.

Reading does not map the file, and does not hold the interpreter's lock while the disk works, as a page fault in a map
would: replicas serve while they load.
"""

from __future__ import annotations

import os
from typing import BinaryIO


class NotWhole(Exception):
    """A file is not of the kind that its name says, or a part of one. Raised and caught inside `model/`."""


def read_bytes(file: BinaryIO, start: int, into: memoryview) -> int:
    """Fill `into` with the file's bytes from `start`; how many are missing at the file's end. Raises `OSError`."""
    done = 0
    while done < len(into) and (count := os.preadv(file.fileno(), [into[done:]], start + done)):
        done += count
    return len(into) - done
