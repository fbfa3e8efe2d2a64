"""`DeviceMemory` of a CUDA card: memory by the driver, copies by torch on its current stream."""

from __future__ import annotations

import ctypes
import threading
from typing import Any, Final

import torch

from moe_ray.errors import MailboxRefused
from moe_ray.transport.mailbox.cuda_driver import CudaDriver
from moe_ray.transport.mailbox.memory import PAGE_BYTES, FlagPage, Region

_GRANULE: Final = 2 << 20
"""Smaller allocations share a block, and a handle is of the whole block."""


class CudaMemory:
    """`DeviceMemory` of the card that torch computes on in this process."""

    def __init__(self, device: torch.device | None = None, driver: CudaDriver | None = None) -> None:
        """Raises `MailboxRefused`."""
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        self._driver = driver or CudaDriver(self._device.index or 0)
        self.card = str(torch.cuda.get_device_properties(self._device).uuid)
        self._lock = threading.Lock()
        self._pages: dict[FlagPage, tuple[int, int]] = {}
        """Addresses of a page: the host's and the device's."""

    def allocate(self, nbytes: int) -> Region:
        address = self._driver.allocate(-(-nbytes // _GRANULE) * _GRANULE)
        try:
            handle = self._driver.handle_of(address)
        except MailboxRefused:
            self._driver.free(address)
            raise
        return Region(self._tensor(address, nbytes), handle, _once(lambda: self._driver.free(address)))

    def open(self, handle: bytes, nbytes: int) -> Region:
        address = self._driver.open(handle)
        return Region(self._tensor(address, nbytes), handle, _once(lambda: self._driver.close(address)))

    def register(self, page: FlagPage) -> None:
        host = ctypes.addressof(ctypes.c_char.from_buffer(page.words))
        device = self._driver.register(host, PAGE_BYTES)
        with self._lock:
            self._pages[page] = (host, device)

    def forget(self, page: FlagPage) -> None:
        with self._lock:
            addresses = self._pages.pop(page, None)
        if addresses is not None:
            self._driver.unregister(addresses[0])

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def write_flag(self, page: FlagPage, slot: int, generation: int) -> None:
        self._driver.write_value(self._stream(), self._pages[page][1] + page.offset(slot), generation)

    def wait_flag(self, page: FlagPage, slot: int, generation: int) -> None:
        self._driver.wait_value(self._stream(), self._pages[page][1] + page.offset(slot), generation)

    def join(self) -> None:
        """Nothing: it is torch's own stream."""

    def mark(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def _tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return torch.as_tensor(_Memory(address, nbytes), device=self._device)


class _Memory:
    """Device memory as libraries hand it to each other (version 3 of the CUDA array interface)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _once(close: Any) -> Any:
    """`close`, which does nothing from the second call on."""
    first = threading.Lock()

    def closed() -> None:
        if first.acquire(blocking=False):
            close()

    return closed
