"""The expert networks that one replica holds, one for each (layer, expert). Stateless between calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_ray.core import AdapterRows, ExpertKey
from moe_ray.model.compute.base import FFN
from moe_ray.model.lora.parts import ExpertPart

if TYPE_CHECKING:
    import torch


class ExpertFFN:
    """The weights of a set of (layer, expert) keys and their forward pass: w2(act(w1 x) * (w3 x)).

    Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202); Mixtral: Jiang et al. 2024 (2401.04088).
    One thread may add keys while others compute.
    """

    def __init__(self, ffns: Mapping[ExpertKey, FFN]) -> None:
        self._ffns = dict(ffns)
        self.keys = frozenset(ffns)

    def __getitem__(self, key: ExpertKey) -> FFN:
        """The network of one key. Raises `KeyError` where it is not held."""
        return self._ffns[key]

    def add(self, key: ExpertKey, ffn: FFN) -> None:
        """Hold one more key."""
        # Both are replaced, never changed, so that threads which compute or count need no lock.
        self._ffns = {**self._ffns, key: ffn}
        self.keys = frozenset(self._ffns)

    @property
    def nbytes(self) -> int:
        """Bytes of weights held in memory."""
        return sum(ffn.nbytes for ffn in self._ffns.values())

    def forward(
        self, key: ExpertKey, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32).

        `adapters`: which is added to its weights for which rows, as `ExpertCall.adapters`. Raises `AdapterNotHeld`.
        """
        if not adapters:
            return self._ffns[key].forward(rows, weights)
        return self._ffns[key].forward(rows, weights, adapters)

    def has_adapter(self, key: ExpertKey, adapter_id: int) -> bool:
        """Whether calls of a key may name this adapter. Raises `KeyError` where the key is not held."""
        return self._ffns[key].has_adapter(adapter_id)

    def add_adapter(self, key: ExpertKey, adapter_id: int, part: ExpertPart) -> None:
        """Hold what an adapter adds to one key's network. Raises `KeyError` where the key is not held."""
        self._ffns[key].add_adapter(adapter_id, part)

    def remove_adapter(self, key: ExpertKey, adapter_id: int) -> None:
        """Hold it no more: `FFN.remove_adapter`. Idempotent. Raises `KeyError` where the key is not held."""
        self._ffns[key].remove_adapter(adapter_id)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of what adapters add, in memory."""
        return sum(ffn.adapter_bytes for ffn in self._ffns.values())

    def buffers(self, key: ExpertKey) -> list[memoryview]:
        """The bytes of one key's weights. Raises `KeyError` where it is not held."""
        return self._ffns[key].buffers()


def joined_runs(calls: Sequence[tuple[tuple[AdapterRows, ...], int]]) -> tuple[AdapterRows, ...]:
    """The runs of calls whose rows lie one call behind the other, each given as its runs and its number of rows."""
    if not any(runs for runs, _ in calls):
        return ()
    return tuple(run for runs, count in calls for run in runs or (AdapterRows(0, count),))
