"""Compiles kernels for cards that are not here, into Triton's cache, where a process with such a card finds them.

Triton itself makes the keys of its cache: kernels go through the path that launches them, up to the launch, before a
driver that says which card there is. A key has the kernel's source, types, constants and alignment, the options, the
card's compute capability, Triton's own files and its environment variables; so the processes must have one installation
and one environment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor

from moe_ray.errors import ConfigError
from moe_ray.model.compute.triton.launch import INTERPRETED, Launch, triton


@dataclass(slots=True)
class Compiled:
    """Kernels by what was done for them."""

    made: int = 0
    found: int = 0
    """In the cache."""


def compile_ahead(launches: Iterable[Launch], capability: int) -> Compiled:
    """Compile what is not in Triton's cache (TRITON_CACHE_DIR) for a card of `capability`: 90 is 9.0.

    Raises `ConfigError` in a process whose kernels are interpreted. One thread of a process.
    """
    if INTERPRETED:
        raise ConfigError("TRITON_INTERPRET is set: kernels of this process are not compiled")
    counts = Compiled()

    def count(*, cache_hit: bool, **_: object) -> None:
        counts.found += cache_hit
        counts.made += not cache_hit

    with _card(capability), triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = count
        triton.knobs.compilation.store_binary_only = True  # a card's process reads no more
        for launch in launches:
            given = {name: _stand_in(tensor) for name, tensor in launch.tensors.items()}
            arguments = {**given, **launch.numbers, **launch.constants, **launch.options()}
            launch.kernel.run(grid=launch.grid, warmup=True, **arguments)
    return counts


class _Driver:
    """What Triton asks of the driver of a card before a launch."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # kernels know devices by number, and what each can do

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _card(capability: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver._active = before


class _Tensor(MockTensor):
    """A tensor's dtype, and the alignment that it has where memory begins at a multiple of 16 bytes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.dtype)
        self._offset = int(tensor.storage_offset()) * tensor.itemsize

    def data_ptr(self) -> int:
        return self._offset


def _stand_in(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else _Tensor(tensor)
