"""The replica's end of the socket carrier in C++, as Python calls it. See host.h."""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import CFUNCTYPE, POINTER, c_char, c_int, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from moe_ray.native.build import HOST, declare, shared_library

DTYPE_CODES: Final[Mapping[str, int]] = {"float32": 1, "bfloat16": 2, "float16": 3}
"""As the wire numbers them."""
MAX_ROWS: Final = 2**62
_WHY_BYTES: Final = 512
_EXIT_MS: Final = 2000


class HostStats(ctypes.Structure):
    """`HostStats` of calls.h."""

    _fields_ = tuple(
        (name, c_uint64) for name in ("calls", "batches", "rows", "queued_rows", "busy_ns", "queue_ns", "cancelled")
    )


class KeyStats(ctypes.Structure):
    """`KeyStats` of calls.h: what one (layer, expert) has done since the start."""

    _fields_ = tuple((name, c_uint64) for name in ("layer", "expert", "calls", "rows", "busy_ns", "queue_ns"))


class AdapterRun(ctypes.Structure):
    """`AdapterRun` of adapter_run.h."""

    _fields_ = (("id", c_uint64), ("adapter", c_void_p), ("count", c_int64))


_SIGNATURES: Final = {
    "host_new": (c_void_p, (c_int64, c_uint64, c_int64, c_uint64, c_int)),
    "host_free": (None, (c_void_p,)),
    "host_add": (None, (c_void_p, c_uint64, c_uint64, c_void_p, c_void_p)),
    "host_add_adapter": (c_int, (c_void_p, c_uint64, c_uint64, c_uint64, c_void_p)),
    "host_remove_adapter": (None, (c_void_p, c_uint64, c_uint64, c_uint64)),
    "host_stats": (None, (c_void_p, c_void_p)),
    "host_key_stats": (c_uint64, (c_void_p, c_void_p, c_uint64)),
    "host_serve": (None, (c_void_p, c_int)),
    "hosts_end": (None, (c_int,)),
}
_FORWARD: Final = CFUNCTYPE(
    c_int32, *(c_void_p,) * 3, c_int64, c_int64, c_void_p, POINTER(AdapterRun), c_int64, c_void_p
)
"""`Forward` of calls.h."""

Runs = tuple[tuple[int, int], ...]
"""Which adapter is added for which rows: (id, rows) of consecutive rows, 0 for none; (): no row has one."""


@dataclass(frozen=True, slots=True)
class HostEntry:
    """What a host calls to compute one (layer, expert): a `Forward` of calls.h, and the handle it is given."""

    function: int | None
    """Its address."""
    handle: int | None
    keeps: object
    """What has to live as long as the function may be called."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """The host's memory for one computation, by address: valid while it computes, and often used again."""

    rows: int
    weights: int
    """float32 [count]"""
    count: int
    row_bytes: int
    out: int
    """As large as the rows."""


def memory_at(address: int, size: int) -> memoryview:
    """The bytes at an address, which must be valid whenever they are read or written."""
    return memoryview((c_char * size).from_address(address)).cast("B")


def interpreted(compute: Callable[[Buffers, Runs], None]) -> HostEntry:
    """An entry that runs `compute` in this interpreter, which fills `out`. What it raises, the trunk is told."""

    def forward(
        _: int, rows: int, weights: int, count: int, row_bytes: int, out: int, runs: Any, num_runs: int, why: int
    ) -> int:
        try:
            adapters = tuple((runs[i].id, runs[i].count) for i in range(num_runs))
            compute(Buffers(rows, weights, count, row_bytes, out), adapters)
        except Exception as error:  # noqa: BLE001 - whatever it is, the host answers these calls with it, and goes on
            said = f"{type(error).__name__}: {error}".encode()[: _WHY_BYTES - 1]
            text = said.decode(errors="ignore").encode() + b"\0"  # whole characters
            ctypes.memmove(why, text, len(text))
            return 0
        return 1

    function = _FORWARD(forward)
    return HostEntry(ctypes.cast(function, c_void_p).value, None, function)


class Host:
    """Serves experts on sockets without the interpreter. Thread-safe: they may be added while it serves."""

    def __init__(
        self,
        cache_dir: Path,
        hidden_size: int | None,
        dtype: str | None,
        max_batched_rows: int,
        spread: bool = True,
        max_queued_rows: int = MAX_ROWS,
    ) -> None:
        """A host of experts that are yet to be added, for rows of this width and dtype; None: of any.

        `max_queued_rows`: rows that wait or compute, beyond which further calls are answered as busy.

        `spread`: whether each connection may have a thread bound to each core. Not for interpreted entries: threads of
        their own would inherit the core, and a thread that the interpreter does not know enters it slowly. Loads (on
        first use: builds) the library. Raises `KernelsUnavailable`.
        """
        self._library = _library(cache_dir)
        self._entries = list[HostEntry]()
        self._adapters = dict[tuple[int, int, int], object]()
        code = 0 if dtype is None else DTYPE_CODES[dtype]
        self._host: int | None = self._library.host_new(
            hidden_size or 0, code, max_batched_rows, max_queued_rows, spread
        )

    @staticmethod
    def echo(cache_dir: Path) -> Host:
        """A host that returns the rows of (layer 0, expert 0) as they come: to measure what carries them."""
        host = Host(cache_dir, None, None, 0)
        function = ctypes.cast(host._library.echo, c_void_p).value
        host.add(0, 0, HostEntry(function, None, host._library))
        return host

    def __del__(self) -> None:
        if getattr(self, "_host", None) is not None:
            self._library.host_free(self._host)

    def add(self, layer: int, expert: int, entry: HostEntry) -> None:
        """Serve this expert's layer from now on. Each key once."""
        self._entries.append(entry)
        self._library.host_add(self._host, layer, expert, entry.function, entry.handle)

    def add_adapter(self, layer: int, expert: int, adapter_id: int, handle: int | None, keeps: object) -> None:
        """Let calls of a key that is held name an adapter. `handle`: what its entry's function knows it by.

        None: nothing is added, or the entry is interpreted, which goes by the id. `keeps` lives until it is removed.
        Nothing where it names the adapter already. Raises `KeyError` where the key is not held.
        """
        if (layer, expert, adapter_id) in self._adapters:
            return
        if not self._library.host_add_adapter(self._host, layer, expert, adapter_id, handle):
            raise KeyError((layer, expert))
        self._adapters[layer, expert, adapter_id] = keeps

    def remove_adapter(self, layer: int, expert: int, adapter_id: int) -> None:
        """Refuse calls that name the adapter from now on, and wait for those that came before. Idempotent.

        Not from a thread that computes a call.
        """
        self._library.host_remove_adapter(self._host, layer, expert, adapter_id)
        self._adapters.pop((layer, expert, adapter_id), None)

    def serve(self, fd: int) -> None:
        """Answer calls that come on a connected socket until it ends."""
        self._library.host_serve(self._host, fd)

    def stats(self) -> HostStats:
        """Counters since the start; rows that wait now."""
        stats = HostStats()
        self._library.host_stats(self._host, ctypes.byref(stats))
        return stats

    def key_stats(self) -> Sequence[KeyStats]:
        """Counters of every (layer, expert) held, since the start, all as of one moment."""
        copy = self._library.host_key_stats
        keys = (KeyStats * copy(self._host, None, 0))()
        copy(self._host, keys, len(keys))
        return list(keys)


@cache
def _library(cache_dir: Path) -> ctypes.CDLL:
    library = declare(shared_library(HOST, cache_dir), _SIGNATURES)
    atexit.register(library.hosts_end, _EXIT_MS)  # a thread that comes into a dead interpreter would abort the process
    return library
