"""KV blocks in a directory that outlives the process, and that several processes may share.

A cache: what cannot be read, written or believed is left out, and counted. Each identity (see `cache_identity.py`) has
a folder of its own, and the files of all of them together are held below a limit.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import torch

from moe_ray.engine.tiers.disk_file import HEADER, Damaged, read_block, write_block
from moe_ray.errors import ConfigError

logger = logging.getLogger(__name__)
ReadBlocks = dict[bytes, torch.Tensor]
"""Key → uint8 [block_nbytes] on the host."""

SUFFIX: Final = ".kv"
QUEUED_BYTES: Final = 2**28
"""Most bytes that wait to be written."""
RESCAN_S: Final = 30.0
"""How old what is known of other processes' files may be while this one writes."""
PAUSE_S: Final = 30.0
"""After a write that failed nothing is written for so long."""
CLOSE_S: Final = 20.0
"""How long `close` may write."""
LEFTOVER_S: Final = 600.0
"""Age at which a partial file belongs to no process any more."""


class DiskTier:
    """Blocks of one engine. `wants`, `write`, `count`, `read` and `close` on its thread; files on two others."""

    def __init__(self, root: Path, identity: bytes, block_nbytes: int, most_bytes: int) -> None:
        """`identity`: 16 bytes, of all that determines a block's bits. Raises `ConfigError` if nothing can be written.

        Files are readable by this user only: prompts can be guessed from them.
        """
        self._root, self._identity, self._nbytes, self._most = root, identity, block_nbytes, most_bytes
        self._folder = root / identity.hex()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._folder.chmod(0o700)
            trial = self._folder / f".{os.getpid()}.trial"
            trial.touch(mode=0o600)
            trial.unlink()
        except OSError as error:
            raise ConfigError(f"engine.kv_disk_dir {root}: nothing can be written there: {error}") from None
        if most_bytes < HEADER.size + block_nbytes:
            raise ConfigError(f"engine.kv_disk_gib: one block takes {HEADER.size + block_nbytes} bytes; raise it")
        self._lock = threading.Lock()
        self._known: set[bytes] = set()
        """Keys of files of this identity; some may have been removed by others since."""
        self._total = self._written = self._removed = self._damaged = self._failures = self._dropped = 0
        self._read_s = 0.0
        self._queued: set[bytes] = set()
        self._scanned_s = self._failed_s = -float("inf")
        self._queue_most = QUEUED_BYTES
        self._give_up_s = float("inf")
        self._closed = False
        self._scan()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kv-read")

    def wants(self, key: bytes) -> bool:
        """Whether a block is neither there nor on its way, and can be queued."""
        with self._lock:
            if self._closed or key in self._known or key in self._queued:
                return False
            if (len(self._queued) + 1) * self._nbytes > max(self._queue_most, self._nbytes):
                self._dropped += 1
                return False
            return time.monotonic() > self._failed_s + PAUSE_S

    def write(self, key: bytes, block: torch.Tensor) -> None:
        """Have a block written that `wants` wanted; it is not changed any more."""
        with self._lock:
            self._queued.add(key)
        self._writer.submit(self._write, key, block.numpy())

    def open_queue(self) -> None:
        """Let any number of blocks wait: the process ends."""
        self._queue_most = self._most

    def count(self, keys: Sequence[bytes]) -> int:
        """How many leading keys may be there. Asks the disk for the first one only."""
        with self._lock:
            known = next((i for i, key in enumerate(keys) if key not in self._known), len(keys))
        if known or not keys or self._closed:
            return 0 if self._closed else known
        return len(keys) if self._path(keys[0]).exists() else 0  # of another process, since the last scan

    def read(self, keys: Sequence[bytes], note: Callable[[int, float], None]) -> Future[ReadBlocks]:
        """Read leading blocks of `keys`, up to the first that is not there. `note` is told (blocks, seconds)."""
        return self._reader.submit(self._read, list(keys), note)

    def counts(self) -> dict[str, float]:
        """Fields of `TierStats`; callable from any thread."""
        with self._lock:
            return {
                "disk_bytes": self._total,
                "disk_written_bytes": self._written,
                "disk_removed_files": self._removed,
                "disk_damaged_files": self._damaged,
                "disk_failures": self._failures,
                "disk_dropped_blocks": self._dropped,
                "disk_read_seconds": self._read_s,
            }

    def close(self) -> None:
        """Write what is queued, for at most `CLOSE_S`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._give_up_s = time.monotonic() + CLOSE_S
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=True)

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}{SUFFIX}"

    def _write(self, key: bytes, block: np.ndarray) -> None:
        try:
            if time.monotonic() < self._give_up_s:
                self._make_room(HEADER.size + self._nbytes)
                written = write_block(self._path(key), self._identity, key, block)
                with self._lock:
                    self._known.add(key)
                    self._total += written
                    self._written += written
        except OSError as error:
            logger.warning("engine.kv_disk_dir %s: a block cannot be written: %s", self._root, error)
            with self._lock:
                self._failures += 1
                self._failed_s = time.monotonic()
        finally:
            with self._lock:
                self._queued.discard(key)

    def _read(self, keys: list[bytes], note: Callable[[int, float], None]) -> ReadBlocks:
        started, found = time.perf_counter(), ReadBlocks()
        for key in keys:
            path = self._path(key)
            try:
                found[key] = torch.from_numpy(read_block(path, self._identity, key, self._nbytes))
                continue
            except FileNotFoundError:
                pass
            except Damaged as error:
                logger.warning("%s is ignored and removed: %s", path, error)
                self._forget_file(path, damaged=True)
            except OSError as error:
                logger.warning("%s cannot be read: %s", path, error)
                with self._lock:
                    self._failures += 1
            with self._lock:
                self._known.discard(key)
            break
        seconds = time.perf_counter() - started
        with self._lock:
            self._read_s += seconds
            self._known.update(found)
        if found:
            note(len(found), seconds)
        return found

    def _make_room(self, nbytes: int) -> None:
        """Remove what was not used for longest, of any identity, until there is room for `nbytes`. Writer's thread."""
        if time.monotonic() > self._scanned_s + RESCAN_S:
            self._scan()
        if self._total + nbytes <= self._most:
            return
        # A tenth at once: each time the folder is listed.
        files = sorted(self._scan(), key=lambda file: file[1])
        for path, _, _ in files:
            if self._total + nbytes <= self._most - min(self._most // 10, self._most - nbytes):
                break
            self._forget_file(path)

    def _forget_file(self, path: Path, damaged: bool = False) -> None:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return  # by another process
        except OSError as error:
            logger.warning("%s cannot be removed: %s", path, error)
            return
        with self._lock:
            self._total -= size
            self._damaged += damaged
            self._removed += not damaged
            if path.parent == self._folder:
                self._known.discard(_key_of(path.name))

    def _scan(self) -> list[tuple[Path, float, int]]:
        """Look at all files; each with when it was used last, and its size."""
        files: list[tuple[Path, float, int]] = []
        known: set[bytes] = set()
        now = time.time()
        for folder in _entries(self._root):
            ours = len(folder.name) == 32 and _key_of(folder.name) and folder.is_dir(follow_symlinks=False)
            for entry in _entries(Path(folder.path)) if ours else ():
                try:
                    stat = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(".partial") and stat.st_mtime < now - LEFTOVER_S:
                        os.unlink(entry.path)
                except OSError:
                    continue
                if entry.name.endswith(SUFFIX):
                    files.append((Path(entry.path), stat.st_mtime, stat.st_size))
                    if folder.name == self._folder.name:
                        known.add(_key_of(entry.name))
        with self._lock:
            self._known, self._total = known, sum(size for _, _, size in files)
        self._scanned_s = time.monotonic()
        return files


def _key_of(name: str) -> bytes:
    try:
        return bytes.fromhex(name.removesuffix(SUFFIX))
    except ValueError:
        return b""


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # of another user, or removed
        return []
