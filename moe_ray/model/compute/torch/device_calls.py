"""Computes calls of experts on a process's device. Small ones are recorded, on a card as CUDA graphs, and replayed.

What an expert launches for a few rows takes a card less time than an interpreter needs to launch it.
"""

from __future__ import annotations

import logging
import weakref
from typing import Final

import torch

from moe_ray.core import AdapterRows
from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.torch.hosted import check_like
from moe_ray.model.compute.torch.plan import power_of_two
from moe_ray.model.compute.torch.recorders import Recorder, Recording, Tensors
from moe_ray.model.compute.torch.staging import Staging, aligned, view_of
from moe_ray.model.compute.torch.streamed import Movable

logger = logging.getLogger(__name__)

MOST_ROWS: Final = 64
"""Of a call that is recorded: from there on a card computes for longer than an interpreter launches."""
AFTER: Final = 2
"""Calls of one network and count that are launched as they come before the next is recorded."""


class DeviceCalls:
    """One call at a time. A recording is of one network and count of rows."""

    def __init__(self, compute: Compute, hidden_size: int) -> None:
        """Calls are recorded where `compute` has a recorder, and copied where it has a staging."""
        self._recorder, self._device, self._dtype = compute.recorder, compute.torch_device, compute.torch_dtype
        self._staging, self._hidden_size = compute.staging, hidden_size
        self._inputs: dict[int, CallInputs] = {}
        """By padded count: of which recordings of all networks take theirs."""
        self._seen: weakref.WeakKeyDictionary[FFN, dict[int, int | Recording]] = weakref.WeakKeyDictionary()
        """By padded count: how many calls came, or, after `AFTER` of them, the recording."""

    def forward(
        self, ffn: FFN, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        """`ffn.forward` of rows [T, D] and weights [T], wherever they are: in memory of its own.

        Rows in the host's memory go through the staging, if there is one: then the result is there, and complete.
        Without one it is on the device.
        """
        if self._staging is None or rows.device.type != "cpu":
            return self._on_device(ffn, rows, weights, adapters)
        out = torch.empty_like(rows)
        self._staged(self._staging, ffn, rows, weights, adapters, out)
        return out

    def fill(
        self,
        ffn: FFN,
        rows: torch.Tensor,
        weights: torch.Tensor,
        adapters: tuple[AdapterRows, ...],
        out: torch.Tensor,
    ) -> None:
        """The same, put into `out` [T, D] in the host's memory, where rows and weights are too.

        Raises `ValueError` where the network's result is not of the rows' shape and dtype.
        """
        if self._staging is not None:
            self._staged(self._staging, ffn, rows, weights, adapters, out)
            return
        computed = self._on_device(ffn, rows, weights, adapters)
        check_like(computed, out)
        out.copy_(computed)

    @torch.inference_mode()
    def _staged(
        self,
        staging: Staging,
        ffn: FFN,
        rows: torch.Tensor,
        weights: torch.Tensor,
        adapters: tuple[AdapterRows, ...],
        out: torch.Tensor,
    ) -> None:
        """One copy to the device, one back, and one wait, at whose end both buffers are free again."""
        count = len(rows)
        recording = None if adapters else self._recording_for(ffn, count)
        inputs = CallInputs.on(self._device, count, self._hidden_size, self._dtype)
        if recording is not None:
            inputs = self._inputs[power_of_two(count)]
        sent = staging.take(inputs.nbytes(count))
        host = CallInputs(sent, inputs.padded, self._hidden_size, self._dtype)
        host.put(rows, weights)
        staging.copy(inputs.memory[: inputs.nbytes(count)], sent[: inputs.nbytes(count)])
        if recording is not None:
            recording.replay()
            computed = recording.outputs[0][:count]
        elif adapters:
            computed = ffn.forward(inputs.rows[:count], inputs.weights[:count], adapters)
        else:
            computed = ffn.forward(inputs.rows[:count], inputs.weights[:count])
        check_like(computed, out)
        returned = staging.take(computed.nbytes)
        arrived = view_of(returned, 0, computed.shape, computed.dtype)
        staging.wait(staging.copy(arrived, computed))
        out.copy_(arrived)
        staging.give(sent)
        staging.give(returned)

    @torch.inference_mode()
    def _on_device(
        self, ffn: FFN, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...]
    ) -> torch.Tensor:
        """By a recording; launched where there is none."""
        recording = None if adapters else self._recording_for(ffn, len(rows))
        if recording is None:
            rows, weights = (each.to(self._device, non_blocking=True) for each in (rows, weights))
            return ffn.forward(rows, weights, adapters) if adapters else ffn.forward(rows, weights)
        self._inputs[power_of_two(len(rows))].put(rows, weights)
        recording.replay()
        return recording.outputs[0][: len(rows)].clone()

    def _recording_for(self, ffn: FFN, count: int) -> Recording | None:
        if self._recorder is None or count > MOST_ROWS:
            return None
        return self._recording(self._recorder, ffn, power_of_two(count))

    def _recording(self, recorder: Recorder, ffn: FFN, padded: int) -> Recording | None:
        """That of the network for so many rows; None: this call is launched as it comes."""
        of_network = self._seen.setdefault(ffn, {})
        seen = of_network.get(padded, 0)
        if not isinstance(seen, int):
            return seen
        stays = isinstance(ffn, Movable)  # and is no layer that is copied to the card, now here, now there
        if seen < AFTER or not stays:
            of_network[padded] = seen + 1
            return None
        if padded not in self._inputs:
            # Zeros: what pads a call is computed, and nobody reads it.
            self._inputs[padded] = CallInputs.on(self._device, padded, self._hidden_size, self._dtype, zero=True)
        inputs = self._inputs[padded]
        network = weakref.proxy(ffn)  # a recording is kept for as long as its network is

        def run() -> Tensors:
            return (network.forward(inputs.rows, inputs.weights),)

        try:
            run()  # what it needs is compiled and loaded now, which cannot be recorded
            recording = recorder.record(run)
        except RuntimeError as error:
            self._recorder, why = None, str(error).partition("\n")[0]
            logger.warning("calls are launched kernel by kernel, which is slower: they cannot be recorded (%s)", why)
            return None
        of_network[padded] = recording
        return recording


class CallInputs:
    """Rows [P, D] and weights [P] of calls of up to P rows, in one piece of memory, so that one copy brings a call."""

    def __init__(self, memory: torch.Tensor, padded: int, hidden_size: int, dtype: torch.dtype) -> None:
        """`memory`: uint8, at least `nbytes(padded)` of it."""
        self.memory, self.padded = memory, padded
        self._start, self._row_bytes = aligned(4 * padded), hidden_size * dtype.itemsize
        self.weights = view_of(memory, 0, (padded,), torch.float32)
        self.rows = view_of(memory, self._start, (padded, hidden_size), dtype)

    @staticmethod
    def on(device: torch.device, padded: int, hidden_size: int, dtype: torch.dtype, zero: bool = False) -> CallInputs:
        """Inputs on a device."""
        nbytes = aligned(4 * padded) + padded * hidden_size * dtype.itemsize
        memory = (torch.zeros if zero else torch.empty)(nbytes, dtype=torch.uint8, device=device)
        return CallInputs(memory, padded, hidden_size, dtype)

    def nbytes(self, count: int) -> int:
        """Bytes from the beginning to the end of the first `count` rows: weights lie before them."""
        return self._start + count * self._row_bytes

    def put(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Copy the rows [T, D] and weights [T] of a call to the first places."""
        self.rows[: len(rows)].copy_(rows, non_blocking=True)
        self.weights[: len(weights)].copy_(weights, non_blocking=True)
