"""Values of a step on their way to the device and back: one copy each way, of which the one back alone is waited for.

Whatever else reads a tensor of a card on the host, or writes one from a list, waits for all that was queued there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNED = 16


class Sent:
    """Values that are on the device once their `Upload` was sent."""

    __slots__ = ("tensor",)

    tensor: torch.Tensor
    """[N], or in the shape of the array that was given."""


class Upload:
    """Collects values on the host, and brings them to a device by one copy that nothing waits for."""

    def __init__(self) -> None:
        self._parts: list[tuple[Sent, np.ndarray]] = []

    def ints(self, values: Sequence[int]) -> Sent:
        """int64 [N]"""
        return self.array(np.array(values, np.int64))

    def floats(self, values: Sequence[float]) -> Sent:
        """float32 [N]"""
        return self.array(np.array(values, np.float32))

    def array(self, values: np.ndarray) -> Sent:
        sent = Sent()
        self._parts.append((sent, np.ascontiguousarray(values)))
        return sent

    def send(self, device: torch.device) -> None:
        """From now on everything that was added is on the device. Once."""
        if not self._parts:
            return
        ends = np.cumsum([-(-array.nbytes // _ALIGNED) * _ALIGNED for _, array in self._parts]).tolist()
        host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        starts, to = [0, *ends[:-1]], host.numpy()
        for start, (_, array) in zip(starts, self._parts, strict=True):
            to[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        there = host.to(device, non_blocking=True)
        for start, (sent, array) in zip(starts, self._parts, strict=True):
            dtype = torch.from_numpy(array[:0].reshape(-1)).dtype
            sent.tensor = there[start : start + array.nbytes].view(dtype).view(array.shape)


class Readback:
    """Collects tensors of one device, and brings them to the host by one copy, which is waited for once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[torch.Tensor] = []
        self._arrays: list[np.ndarray] = []

    def add(self, tensor: torch.Tensor) -> int:
        """The number by which `array` gives it, once `wait` was called."""
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def wait(self) -> None:
        """Wait for all that was queued on the device, and for the copy. Once."""
        if not self._tensors:
            return
        packed = torch.cat([each.contiguous().view(-1).view(torch.uint8) for each in self._tensors])
        host = packed
        if self._device.type == "cuda":
            host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True).copy_(packed, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
        start, found = 0, host.numpy()
        for each in self._tensors:
            dtype = torch.empty(0, dtype=each.dtype).numpy().dtype
            self._arrays.append(found[start : start + each.nbytes].view(dtype).reshape(each.shape))
            start += each.nbytes

    def array(self, number: int) -> np.ndarray:
        """A tensor's values, in its shape."""
        return self._arrays[number]
