"""Which adapters a trunk holds, and which of them are added for which tokens of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from moe_ray.core import AdapterRows, Batch
from moe_ray.errors import AdapterNotHeld


class HeldAdapter(Protocol):
    """What a backend holds of an adapter."""

    expert_layers: frozenset[int]
    """Layers in which it adds to experts."""


HeldT = TypeVar("HeldT", bound=HeldAdapter)


@dataclass(frozen=True, slots=True)
class TokenRun(Generic[HeldT]):
    """Consecutive tokens of a batch with one adapter."""

    adapter_id: int
    held: HeldT | None
    """None: of no adapter."""
    start: int
    end: int


class StepAdapters(Generic[HeldT]):
    """The adapters of one batch."""

    def __init__(self, batch: Batch, held: Mapping[int, HeldT]) -> None:
        """Raises `AdapterNotHeld` for one that the batch names and the trunk does not hold."""
        self.runs: list[TokenRun[HeldT]] = []
        """That cover all tokens; none where no sequence has an adapter."""
        start = 0
        for index, adapter_id in enumerate(batch.adapter_ids if any(batch.adapter_ids) else ()):
            if adapter_id and adapter_id not in held:
                raise AdapterNotHeld(f"adapter {adapter_id} is not held by this trunk")
            end = batch.query_start[index + 1]
            if self.runs and self.runs[-1].adapter_id == adapter_id:
                start = self.runs.pop().start
            self.runs.append(TokenRun(adapter_id, held.get(adapter_id), start, end))
            start = end
        self._of_experts: dict[tuple[bool, ...], np.ndarray | None] = {}

    @property
    def shared_runs(self) -> tuple[AdapterRows, ...]:
        """The adapters of all tokens, as `ExpertCall.adapters`: for the expert that every token goes to."""
        return tuple(AdapterRows(run.adapter_id, run.end - run.start) for run in self.runs)

    def token_adapters(self, layer: int) -> np.ndarray | None:
        """`Routed.token_adapters` of a layer: those that add to its experts."""
        if not self.runs:
            return None
        adding = tuple(run.held is not None and layer in run.held.expert_layers for run in self.runs)
        if adding not in self._of_experts:
            ids = [run.adapter_id if adds else 0 for run, adds in zip(self.runs, adding, strict=True)]
            lengths = [run.end - run.start for run in self.runs]
            self._of_experts[adding] = np.repeat(np.array(ids, dtype=np.uint64), lengths) if any(adding) else None
        return self._of_experts[adding]
