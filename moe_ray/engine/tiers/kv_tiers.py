"""`LowerTiers`: copies of KV blocks in host memory and on a disk.

A block that the cache gives up is copied to host memory. With a disk, it is written there as soon as it is computed, by
a thread of its own: a step copies what it computed, and no more. What a new request may find on the disk is read before
it is scheduled; from then on it is loaded as what lies in host memory is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import torch

from moe_ray.core import Batch, Sequence, TierStats
from moe_ray.engine.engine_options import TierOptions
from moe_ray.engine.kv_cache import KVCache
from moe_ray.engine.step_times import kind_of
from moe_ray.engine.tiers.disk_tier import DiskTier, ReadBlocks
from moe_ray.engine.tiers.host_tier import HostTier
from moe_ray.engine.tiers.load_times import LoadTimes
from moe_ray.engine.torch_threads import torch_threads

COUNTED: Final = (
    *("swap_stored_bytes", "swap_loaded_bytes", "swap_hit_tokens", "swap_load_seconds"),
    *("disk_loaded_bytes", "disk_hit_tokens", "tier_declined_tokens"),
)
STAGED_BYTES: Final = 2**29
"""Most bytes read from a disk that wait for their sequences."""


@dataclass(slots=True, eq=False)
class _Read:
    """Blocks that are on their way from the disk, or there."""

    number: int
    """They are read in this order."""
    keys: Seq[bytes]
    nbytes: int
    """Reserved for it."""
    done: Future[ReadBlocks]
    users: set[Sequence] = field(default_factory=set)


class KVTiers:
    """Below one KV cache. One thread."""

    def __init__(
        self, cache: KVCache, host_blocks: int, disk: DiskTier | None = None, times: LoadTimes | None = None
    ) -> None:
        """`host_blocks`: how many host memory keeps. `times`: what decides; default: nothing is known yet."""
        self._cache, self._disk = cache, disk
        self._host = HostTier(host_blocks, cache.block_nbytes, cache.device.type == "cuda")
        self.times = times or LoadTimes(cache.block_size)
        self._lent: list[tuple[torch.Tensor, bool]] = []
        """What `load` copies, and whether it comes from the disk."""
        self._reads_of: dict[Sequence, list[_Read]] = {}
        self._read_of: dict[bytes, _Read] = {}
        """Each key of those of them that are on their way, or there."""
        self._numbers = itertools.count()
        self._staged_bytes = 0
        self._counts = dict.fromkeys(COUNTED, 0.0)

    def evicted(self, blocks: Seq[tuple[int, bytes]]) -> None:
        """Copy blocks, with their keys, that will be written to next."""
        with torch_threads(1):
            for block, key in blocks:
                if self._host.find(key) is None and (row := self._host.place(key)) is not None:
                    self._cache.copy_out(block, row)
                    self._count("swap_stored_bytes", row.nbytes)
        self.computed(blocks)

    def computed(self, blocks: Seq[tuple[int, bytes]]) -> None:
        """Write what is not on the disk yet, as far as its queue has room."""
        if self._disk is None:
            return
        with torch_threads(1):
            for block, key in blocks:
                if self._disk.wants(key):
                    copy = torch.empty(self._cache.block_nbytes, dtype=torch.uint8)
                    self._cache.copy_out(block, copy)
                    self._disk.write(key, copy)

    def lend(self, seq: Sequence, keys: Seq[bytes], context: int) -> int:
        """How many leading blocks of `keys` will be loaded; `load` follows before anything else."""
        arrived: ReadBlocks = {}
        for read in self._reads_of.get(seq, ()):
            arrived |= read.done.result()  # it was waited for
        self._lent, at_home = [], []
        for key in keys:
            if (row := self._host.find(key)) is not None:
                self._lent.append((row, False))
                at_home.append(key)
            elif (staged := arrived.get(key)) is not None:
                self._lent.append((staged, True))
            else:
                break
        if self._lent and not self.times.pays(len(self._lent), context):
            self._decline(len(self._lent))
            self._lent, at_home = [], []
        self._host.lend(at_home)
        return len(self._lent)

    def load(self, seq: Sequence, keys: Seq[bytes], blocks: Seq[int]) -> None:
        """Fill blocks of the cache with what was lent by the last `lend`; the sequence's reads are done with."""
        assert len(blocks) == len(self._lent)
        started = time.perf_counter()
        with torch_threads(1):  # several wait for each other after every block
            for block, (row, _) in zip(blocks, self._lent, strict=True):
                self._cache.copy_in(block, row)
        for row, from_disk in self._lent:
            name = "disk" if from_disk else "swap"
            self._count(f"{name}_hit_tokens", self._cache.block_size)
            self._count(f"{name}_loaded_bytes", row.nbytes)
        if blocks:
            seconds = time.perf_counter() - started
            self.times.note_copies(len(blocks), seconds)
            self._count("swap_load_seconds", seconds)
        self._lent = []
        self._host.lend(())
        self.drop(seq)

    def fetch(self, seq: Sequence, keys: Seq[bytes], in_cache: Callable[[bytes], bool]) -> Future[ReadBlocks] | None:
        """Begin to read from the disk what a new sequence may need of it; None where it need not wait.

        `keys`: of its leading blocks. `in_cache`: which of them the KV cache has.
        """
        if self._disk is None:
            return None
        at = next((i for i, key in enumerate(keys) if not in_cache(key) and key not in self._host), len(keys))
        reads: list[_Read] = []
        while at < len(keys) and (shared := self._read_of.get(keys[at])) is not None:
            if shared not in reads:
                reads.append(shared)
            at += 1
        if (own := self._begin(keys[at:], at * self._cache.block_size)) is not None:
            reads.append(own)
        if not reads:
            return None
        for read in reads:
            read.users.add(seq)
        self._reads_of[seq] = reads
        return max(reads, key=lambda read: read.number).done

    def _begin(self, wanted: Seq[bytes], context: int) -> _Read | None:
        """Read leading blocks of `wanted`, behind `context` tokens, as far as they may be there and it pays.

        And as far as nobody else has them read.
        """
        assert self._disk is not None
        wanted = list(itertools.takewhile(lambda key: key not in self._read_of, wanted))
        room = (STAGED_BYTES - self._staged_bytes) // self._cache.block_nbytes
        count = min(self._disk.count(wanted), room)
        if count <= 0:
            return None
        if not self.times.pays(count, context, from_disk=True):
            self._decline(count)
            return None
        keys, nbytes = wanted[:count], count * self._cache.block_nbytes
        read = _Read(next(self._numbers), keys, nbytes, self._disk.read(keys, self.times.note_reads))
        self._read_of |= dict.fromkeys(keys, read)
        self._staged_bytes += nbytes
        return read

    def drop(self, seq: Sequence) -> None:
        """Forget what was read from a disk for a sequence. Idempotent."""
        for read in self._reads_of.pop(seq, ()):
            read.users.discard(seq)
            if not read.users:
                for key in read.keys:
                    del self._read_of[key]
                self._staged_bytes -= read.nbytes

    def note_step(self, batch: Batch, seconds: float) -> None:
        """Learn from a step what it takes to compute tokens."""
        if kind_of(batch) == "prefill":
            self.times.note_step(batch.num_tokens, max(batch.context_lens), seconds)

    def stats(self) -> TierStats:
        """Callable from any thread."""
        disk = {} if self._disk is None else self._disk.counts()
        swap = {
            "swap_bytes": len(self._host) * self._host.block_nbytes,
            "swap_evicted_blocks": self._host.evicted_blocks,
        }
        counts = {name: value if "seconds" in name else int(value) for name, value in self._counts.items()}
        return TierStats(**{**counts, **swap, **disk})  # type: ignore[arg-type]

    def check_integrity(self) -> None:
        """Raise AssertionError if bookkeeping is inconsistent. Between steps only."""
        self._host.check_integrity()
        reads = {id(read): read for read in self._read_of.values()}
        assert self._staged_bytes == sum(read.nbytes for read in reads.values())
        assert {id(read) for each in self._reads_of.values() for read in each} == set(reads)
        assert all(seq in read.users for seq, each in self._reads_of.items() for read in each)

    def close(self, blocks: Seq[tuple[int, bytes]]) -> None:
        """Write what the disk has not to it, as far as there is time, and end. Idempotent."""
        if self._disk is not None:
            self._disk.open_queue()
            self.computed(blocks)
            self._disk.close()

    def _decline(self, blocks: int) -> None:
        self._count("tier_declined_tokens", blocks * self._cache.block_size)

    def _count(self, name: str, value: float) -> None:
        self._counts[name] += value


def open_tiers(cache: KVCache, options: TierOptions | None) -> KVTiers | None:
    """What is to be below a cache. Raises `ConfigError` where the disk cannot be used."""
    if options is None:
        return None
    nbytes = cache.block_nbytes
    disk = None
    if options.disk is not None:
        disk = DiskTier(options.disk, options.identity, nbytes, options.disk_bytes)
    return KVTiers(cache, options.swap_bytes // nbytes, disk)
