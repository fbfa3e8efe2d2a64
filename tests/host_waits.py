"""Counts where a program would wait for a card, on tensors of a CPU, which nothing has to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ray.engine.host_copies import Readback, Upload

READS: Final = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "unique_dim"),
    *("unique_consecutive", "_unique2", "repeat_interleave", "histc"),
}
"""Operations whose results, or their sizes, are values of a card: item(), boolean masks, and the like."""
CALLS: Final = {"tolist", "item", "numpy", "cpu", "tensor", "as_tensor", "from_numpy", "to", "cuda", "pin_memory"}
"""What else moves values between a host and a card, and waits for it unless it is done with care."""
INDEXING: Final = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class Waits:
    """Where a card was waited for."""

    readbacks: int = 0
    others: list[str] = field(default_factory=list)
    paused: bool = False


class _Calls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in CALLS and not self._waits.paused:
            self._waits.others.append(name)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(each is not None and each.dtype == torch.bool for each in args[1])
        if (name in READS or by_mask) and not self._waits.paused:
            self._waits.others.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_waits() -> Iterator[Waits]:
    """Counts from here on: waits of `Readback`, and all others by the operation that waits."""
    waits = Waits()

    def paused(inner: Callable[..., None], count: int) -> Callable[..., None]:
        def call(*args: Any) -> None:
            waits.paused = True
            try:
                inner(*args)
            finally:
                waits.paused = False
            waits.readbacks += count

        return call

    with pytest.MonkeyPatch.context() as patch, _Calls(waits), _Operations(waits):
        patch.setattr(Upload, "send", paused(Upload.send, 0))
        patch.setattr(Readback, "wait", paused(Readback.wait, 1))
        yield waits
