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
from moe_ray.model.compute.torch.plan import power_of_two
from moe_ray.model.compute.torch.recorders import Recorder, Recording, Tensors
from moe_ray.model.compute.torch.streamed import Movable

logger = logging.getLogger(__name__)

MOST_ROWS: Final = 64
"""Of a call that is recorded: from there on a card computes for longer than an interpreter launches."""
AFTER: Final = 2
"""Calls of one network and count that are launched as they come before the next is recorded."""


class DeviceCalls:
    """One call at a time. A recording is of one network and count of rows."""

    def __init__(self, compute: Compute, hidden_size: int) -> None:
        """Calls are recorded where `compute` has a recorder."""
        self._recorder, self._device, self._dtype = compute.recorder, compute.torch_device, compute.torch_dtype
        self._hidden_size = hidden_size
        self._inputs: dict[int, Tensors] = {}
        """By padded count: rows [P, D] and weights [P], of which recordings of all networks take theirs."""
        self._seen: weakref.WeakKeyDictionary[FFN, dict[int, int | Recording]] = weakref.WeakKeyDictionary()
        """By padded count: how many calls came, or, after `AFTER` of them, the recording."""

    def forward(
        self, ffn: FFN, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        """`ffn.forward` of rows [T, D] and weights [T], wherever they are: on the device, in memory of its own."""
        if self._recorder is None or adapters or len(rows) > MOST_ROWS:
            return self._launched(ffn, rows, weights, adapters)
        return self._replayed(self._recorder, ffn, rows, weights)

    @torch.inference_mode()
    def _replayed(self, recorder: Recorder, ffn: FFN, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """By a recording; launched where there is none yet."""
        count, padded = len(rows), power_of_two(len(rows))
        recording = self._recording(recorder, ffn, padded)
        if recording is None:
            return self._launched(ffn, rows, weights, ())
        held_rows, held_weights = self._inputs[padded]
        held_rows[:count].copy_(rows, non_blocking=True)
        held_weights[:count].copy_(weights, non_blocking=True)
        recording.replay()
        return recording.outputs[0][:count].clone()

    def _launched(
        self, ffn: FFN, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...]
    ) -> torch.Tensor:
        rows, weights = (each.to(self._device, non_blocking=True) for each in (rows, weights))
        return ffn.forward(rows, weights, adapters) if adapters else ffn.forward(rows, weights)

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
        rows, weights = self._inputs.setdefault(padded, self._blank(padded))
        network = weakref.proxy(ffn)  # a recording is kept for as long as its network is

        def run() -> Tensors:
            return (network.forward(rows, weights),)

        try:
            run()  # what it needs is compiled and loaded now, which cannot be recorded
            recording = recorder.record(run)
        except RuntimeError as error:
            self._recorder, why = None, str(error).partition("\n")[0]
            logger.warning("calls are launched kernel by kernel, which is slower: they cannot be recorded (%s)", why)
            return None
        of_network[padded] = recording
        return recording

    def _blank(self, padded: int) -> Tensors:
        """Zeros: what pads a call is computed, and nobody reads it."""
        rows = torch.zeros(padded, self._hidden_size, dtype=self._dtype, device=self._device)
        return rows, torch.zeros(padded, dtype=torch.float32, device=self._device)
