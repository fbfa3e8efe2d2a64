"""The trunk's end of the socket carrier in C++, as Python calls it. See links.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Final

import torch

from moe_ray.native.build import LINKS, declare, shared_library

WAITING, DONE, ERROR, BROKEN = range(4)
_TEXT: Final = 4096


class Result(ctypes.Structure):
    """`Result` of links.cpp: what became of a call."""

    _fields_ = (
        *((name, c_int32) for name in ("outcome", "status", "misfit", "infinite")),
        *((n, c_uint64) for n in ("num_rows", "hidden_size", "dtype", "queued_rows", "compute_us", "queue_us")),
    )


_SIGNATURES: Final = {
    "link_new": (c_void_p, (c_int,)),
    "link_free": (None, (c_void_p,)),
    "link_fail": (None, (c_void_p, c_char_p)),
    "link_reason": (c_int, (c_void_p, c_char_p, c_int)),
    "scatter": (
        None,
        (c_int, c_void_p, c_void_p, c_uint64, c_void_p, c_void_p, c_uint64, c_uint64, *(c_void_p,) * 6),
    ),
    "gather": (None, (c_int, c_void_p, c_void_p, c_int64, POINTER(Result))),
    "call_error": (c_int, (c_void_p, c_uint64, c_char_p, c_int)),
    "call_forget": (None, (c_void_p, c_uint64)),
    "call_cancel": (None, (c_void_p, c_uint64)),
    "link_ping": (None, (c_void_p,)),
}


class Links:
    """The library. Links are opaque numbers; every function may be called from any thread."""

    def __init__(self, cache_dir: Path) -> None:
        """Load (on first use: build) the library. Raises `KernelsUnavailable`."""
        self._library = declare(shared_library(LINKS, cache_dir), _SIGNATURES)

    def open(self, fd: int) -> int:
        """A link over a connected, authenticated socket, which must stay open until `free`."""
        return int(self._library.link_new(fd))

    def free(self, link: int) -> None:
        """Give the link's memory back."""
        self._library.link_free(link)

    def fail(self, link: int, why: str) -> None:
        """End the link; threads that wait on it wake."""
        self._library.link_fail(link, why.encode())

    def reason(self, link: int) -> str:
        """Why the link is broken; empty while it is not."""
        text = ctypes.create_string_buffer(_TEXT)
        size = self._library.link_reason(link, text, _TEXT)
        return text.raw[:size].decode(errors="replace")

    def scatter(
        self,
        links: Sequence[int],
        ids: Sequence[int],
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        dtype: int,
        rows: torch.Tensor,
        weights: torch.Tensor,
        target: torch.Tensor,
        adapters: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> None:
        """Send call i (`counts[i]` of the rows [R, D], in order) on links[i]; replies will come into target [R, D].

        `adapters`: of each call its runs of rows with one adapter, as (id, rows), at most 64. `target` must live until
        each call was gathered or forgotten. A link that breaks says so in `gather`.
        """
        n = len(links)
        runs = [run for call in adapters for run in call]
        told: tuple[object, ...] = (None, None, None)
        if runs:
            told = (
                (c_uint32 * n)(*map(len, adapters)),
                *((c_uint64 * len(runs))(*values) for values in zip(*runs, strict=True)),
            )
        self._library.scatter(
            *(n, (c_void_p * n)(*links), (c_uint64 * n)(*ids), layer),
            *((c_uint64 * n)(*experts), (c_uint64 * n)(*counts), rows.shape[1], dtype),
            *(rows.data_ptr(), weights.data_ptr(), target.data_ptr(), *told),
        )

    def gather(self, links: Sequence[int], ids: Sequence[int], timeout_s: float) -> Sequence[Result]:
        """Wait for the outcome of every call. Done calls are forgotten."""
        n = len(links)
        results = (Result * n)()
        self._library.gather(n, (c_void_p * n)(*links), (c_uint64 * n)(*ids), int(1e6 * timeout_s), results)
        return results  # type: ignore[return-value]  # a ctypes array is a sequence

    def error(self, link: int, call_id: int) -> str:
        """The text of a reply that was an error."""
        text = ctypes.create_string_buffer(_TEXT)
        size = self._library.call_error(link, call_id, text, _TEXT)
        return text.raw[:size].decode(errors="replace")

    def forget(self, link: int, call_id: int) -> None:
        """Drop a call; its target is not written to from now on."""
        if link:
            self._library.call_forget(link, call_id)

    def ping(self, link: int) -> None:
        """Send something that the other machine must acknowledge, if that takes no waiting."""
        if link:
            self._library.link_ping(link)

    def cancel(self, link: int, call_id: int) -> None:
        """Drop a call and let the replica skip it, if it can be told at once."""
        if link:
            self._library.call_cancel(link, call_id)
