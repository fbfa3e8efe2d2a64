"""One KV block in one file: what it must say of itself to be believed.

8 bytes "MRKVBLK1" | 16 bytes identity | 16 bytes key | 8 bytes length | 16 bytes BLAKE2b of what follows | the block
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from pathlib import Path
from typing import Final

import numpy as np

MAGIC: Final = b"MRKVBLK1"
HEADER: Final = struct.Struct("<8s16s16sQ16s")


class Damaged(Exception):
    """A file is not what its name says."""


def write_block(path: Path, identity: bytes, key: bytes, block: np.ndarray) -> int:
    """Write a block (uint8) so that `path` is whole or not there, and nobody else may read it; bytes written.

    Raises `OSError`.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    header = HEADER.pack(MAGIC, identity, key, block.nbytes, _digest(block))
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(partial, flags, 0o600), "wb", buffering=0) as file:
            for part in (header, block.data):
                if file.write(part) != len(part):
                    raise OSError(f"{path.name}: the disk took only a part")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return len(header) + block.nbytes


def read_block(path: Path, identity: bytes, key: bytes, nbytes: int) -> np.ndarray:
    """Read a block of `nbytes`, uint8, and note that it was used. Raises `Damaged`, `OSError`."""
    block = np.empty(nbytes, np.uint8)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != HEADER.size + nbytes:
            raise Damaged("its size is another")
        header = file.read(HEADER.size)
        if file.readinto(block.data) != nbytes:
            raise Damaged("it is cut short")
        if header != HEADER.pack(MAGIC, identity, key, nbytes, _digest(block)):
            raise Damaged("it is damaged, or of another model")
        os.utime(file.fileno())
    return block


def _digest(block: np.ndarray) -> bytes:
    return hashlib.blake2b(block.data, digest_size=16).digest()
