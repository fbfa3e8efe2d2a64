"""A device on a CPU that several processes share: its memory is POSIX shared memory, its stream a late thread."""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moe_ray.errors import MailboxRefused
from moe_ray.transport.mailbox.memory import FlagPage, Region

SHARED = Path("/dev/shm")
PREFIX = "moe-ray-test-device-"
LATE_S = 0.002


class SharedDevice:
    """`DeviceMemory`. What is begun happens later, in order; what reads too early reads what was there before."""

    def __init__(self, card: str = "card-0", late_s: float = LATE_S) -> None:
        self.card = card
        self._late_s = late_s
        self._begun: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._shared: set[int] = set()
        self.pages: list[FlagPage] = []
        """That the device sees now."""
        self.regions = 0
        """That are allocated or open now."""
        self.copies = 0
        self._go_on = threading.Event()
        self._go_on.set()
        threading.Thread(target=self._run, name="device-stream", daemon=True).start()

    def hold(self) -> None:
        """The stream does nothing from now on."""
        self._go_on.clear()

    def go_on(self) -> None:
        self._go_on.set()

    def allocate(self, nbytes: int) -> Region:
        path = SHARED / f"{PREFIX}{secrets.token_hex(8)}"
        path.write_bytes(bytes(nbytes))
        return self._mapped(path, nbytes, lambda: path.unlink(missing_ok=True))

    def open(self, handle: bytes, nbytes: int) -> Region:
        path = Path(os.fsdecode(handle))
        if path.parent != SHARED or not path.name.startswith(PREFIX) or not path.exists():
            raise MailboxRefused(f"{path} is no handle of this device")
        if path.stat().st_size != nbytes:
            raise MailboxRefused(f"{path} has not {nbytes} bytes")
        opened = self._mapped(path, nbytes, lambda: None)
        path.unlink()  # so that nothing is left of a process that is killed
        return opened

    def register(self, page: FlagPage) -> None:
        self.pages.append(page)

    def forget(self, page: FlagPage) -> None:
        with contextlib.suppress(ValueError):
            self.pages.remove(page)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.copies += 1
        values = source if source.untyped_storage().data_ptr() in self._shared else source.clone()
        self._begin(lambda: target.copy_(values))

    def write_flag(self, page: FlagPage, slot: int, generation: int) -> None:
        assert page in self.pages
        self._begin(lambda: page.store(slot, generation))

    def wait_flag(self, page: FlagPage, slot: int, generation: int) -> None:
        assert page in self.pages

        def wait() -> None:
            while not page.reached(slot, generation):
                time.sleep(0.0002)

        self._begin(wait)

    def join(self) -> None:
        self.wait(self.mark())

    def mark(self) -> threading.Event:
        reached = threading.Event()
        self._begin(reached.set)
        return reached

    def wait(self, mark: threading.Event) -> None:
        mark.wait()

    def _begin(self, what: Callable[[], object]) -> None:
        self._begun.put(what)  # type: ignore[arg-type]

    @torch.inference_mode()  # as those who began it may be
    def _run(self) -> None:
        late = random.Random(1)
        while True:
            what = self._begun.get()
            time.sleep(late.uniform(0, self._late_s))
            self._go_on.wait()
            what()

    def _mapped(self, path: Path, nbytes: int, unlink: Callable[[], None]) -> Region:
        with path.open("r+b") as file:
            memory = torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
        at = memory.untyped_storage().data_ptr()
        self._shared.add(at)
        self.regions += 1
        closed = threading.Lock()

        def close() -> None:
            if closed.acquire(blocking=False):
                self._shared.discard(at)
                self.regions -= 1
                unlink()

        return Region(memory, os.fsencode(path), close)
