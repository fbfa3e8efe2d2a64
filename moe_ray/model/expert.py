"""One expert: a SwiGLU feed-forward network for each layer it holds. Stateless between calls.

Where its kernels are native nothing here imports torch, unless a call comes as tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from moe_ray.core import ExpertKey
from moe_ray.model.compute.numerics import Numerics
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.kernels import Host, Kernels, Packed

if TYPE_CHECKING:
    import numpy as np
    import torch


class FFN(Protocol):
    """One expert in one layer: its weights, in the form that its kernels want."""

    nbytes: int

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32)."""
        ...

    def buffers(self) -> list[memoryview]:
        """The bytes of its weights, in the order in which `ExpertReader.blank` takes them."""
        ...


class NativeFFN:
    """`FFN` by the native kernels: bfloat16 on a CPU, sums in float32, a row's result independent of its neighbours."""

    def __init__(self, w1: np.ndarray, w3: np.ndarray, w2: np.ndarray, kernels: Kernels) -> None:
        """w1 and w3 [I, D], w2 [D, I], of bfloat16 items; D and I multiples of 32."""
        self._hold(kernels.pack(w1, w3), kernels.pack(w2), kernels)

    @classmethod
    def packed(cls, w13: Packed, w2: Packed, kernels: Kernels) -> NativeFFN:
        """Of weights that are packed already."""
        ffn = cls.__new__(cls)
        ffn._hold(w13, w2, kernels)
        return ffn

    def _hold(self, w13: Packed, w2: Packed, kernels: Kernels) -> None:
        self.w13, self.w2, self.kernels = w13, w2, kernels
        self.nbytes = w13.nbytes + w2.nbytes

    @staticmethod
    def supports(config: ModelConfig, how: Numerics) -> bool:
        """Whether there are kernels for this model, dtype and device."""
        return (
            how.dtype == "bfloat16"
            and how.device == "cpu"
            and config.hidden_act == "silu"
            and config.hidden_size % 32 == config.intermediate_size % 32 == 0
        )

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.kernels.expert_ffn(rows.contiguous(), weights.contiguous(), self.w13, self.w2)

    def buffers(self) -> list[memoryview]:
        return [memoryview(self.w13.memory), memoryview(self.w2.memory)]


class ExpertFFN:
    """The weights of a set of (layer, expert) keys and their forward pass: w2(act(w1 x) * (w3 x)).

    Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202); Mixtral: Jiang et al. 2024 (2401.04088).
    One thread may add keys while others compute.
    """

    def __init__(self, ffns: Mapping[ExpertKey, FFN]) -> None:
        self._ffns = dict(ffns)
        self.keys = frozenset(ffns)

    def add(self, key: ExpertKey, ffn: FFN) -> None:
        """Hold one more key."""
        # Both are replaced, never changed, so that whoever computes or counts needs no lock.
        self._ffns = {**self._ffns, key: ffn}
        self.keys = frozenset(self._ffns)

    @property
    def nbytes(self) -> int:
        """Bytes of weights held in memory."""
        return sum(ffn.nbytes for ffn in self._ffns.values())

    def forward(self, key: ExpertKey, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32)."""
        return self._ffns[key].forward(rows, weights)

    def buffers(self, key: ExpertKey) -> list[memoryview]:
        """The bytes of one key's weights. Raises `KeyError` where it is not held."""
        return self._ffns[key].buffers()

    def host(self, hidden_size: int, max_batched_rows: int) -> Host | None:
        """Who serves these experts on sockets without the interpreter; None where the kernels are not native.

        What is added here later has to be added there, too.
        """
        native = {key: ffn for key, ffn in self._ffns.items() if isinstance(ffn, NativeFFN)}
        if len(native) < len(self._ffns) or not native:
            return None
        first = next(iter(native.values()))
        host = Host.of(first.kernels, hidden_size, first.w13.n, max_batched_rows)
        for key, ffn in native.items():
            host.add(*key, ffn.w13, ffn.w2)
        return host
