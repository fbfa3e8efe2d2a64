"""One expert: a SwiGLU feed-forward network for each layer it holds. Stateless between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

import torch
import torch.nn.functional as F

from moe_ray.core import ExpertKey
from moe_ray.model.checkpoint import Checkpoint, Progress, expert_specs
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.kernels import Host, Kernels

ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class FFN(Protocol):
    """One expert in one layer: its weights, in the form that its kernels want."""

    nbytes: int

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32)."""
        ...


class TorchFFN:
    """`FFN` by torch: any device and dtype."""

    def __init__(self, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, hidden_act: str) -> None:
        """w1 and w3 [I, D], w2 [D, I]."""
        self._w13 = torch.cat((w1, w3))  # gate and up share their input: one matrix, one pass over the rows
        self._w2 = w2
        self._act = ACTIVATIONS[hidden_act]
        self.nbytes = self._w13.nbytes + w2.nbytes

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(rows, self._w13).chunk(2, dim=-1)  # [T, I] each
        out = F.linear(self._act(gate) * up, self._w2)  # [T, D]
        return (out * weights.unsqueeze(-1)).to(rows.dtype)


class NativeFFN:
    """`FFN` by the native kernels: bfloat16 on a CPU, sums in float32, a row's result independent of its neighbours."""

    def __init__(self, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, kernels: Kernels) -> None:
        """w1 and w3 [I, D], w2 [D, I]; D and I multiples of 32."""
        self.kernels, self.inner = kernels, w1.shape[0]
        self.w13, self.w2 = kernels.pack(w1, w3), kernels.pack(w2)
        self.nbytes = self.w13.nbytes + self.w2.nbytes

    @staticmethod
    def supports(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether there are kernels for this model, dtype and device."""
        return (
            dtype == torch.bfloat16
            and device.type == "cpu"
            and config.hidden_act == "silu"
            and config.hidden_size % 32 == config.intermediate_size % 32 == 0
        )

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.kernels.expert_ffn(rows.contiguous(), weights.contiguous(), self.w13, self.w2, self.inner)


class ExpertFFN:
    """The weights of a set of (layer, expert) keys and their forward pass: w2(act(w1 x) * (w3 x)).

    Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202); Mixtral: Jiang et al. 2024 (2401.04088).
    """

    def __init__(self, ffns: Mapping[ExpertKey, FFN]) -> None:
        self._ffns = ffns
        self.keys = frozenset(ffns)

    @staticmethod
    def load(
        checkpoint: Checkpoint,
        keys: Iterable[ExpertKey],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        kernels: Kernels | None = None,
    ) -> ExpertFFN:
        """Read just the tensors of `keys`; `kernels` are used where they exist for them. Raises `CheckpointError`."""
        config = checkpoint.config
        specs = {key: expert_specs(config, *key) for key in sorted(keys)}
        total = checkpoint.check(spec for group in specs.values() for spec in group)
        start, ffns = checkpoint.bytes_read, dict[ExpertKey, FFN]()
        native = kernels is not None and NativeFFN.supports(config, dtype, device)
        for key, group in specs.items():
            w1, w3, w2 = (checkpoint.read(spec, dtype, device) for spec in group)
            if native and kernels is not None:
                ffns[key] = NativeFFN(w1, w3, w2, kernels)
            else:
                ffns[key] = TorchFFN(w1, w3, w2, config.hidden_act)
            if progress is not None:
                progress(checkpoint.bytes_read - start, total)
        return ExpertFFN(ffns)

    @property
    def nbytes(self) -> int:
        """Bytes of weights held in memory."""
        return sum(ffn.nbytes for ffn in self._ffns.values())

    @torch.inference_mode()
    def forward(self, key: ExpertKey, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32)."""
        return self._ffns[key].forward(rows, weights)

    def host(self, hidden_size: int, max_batched_rows: int) -> Host | None:
        """Who serves these experts on sockets without the interpreter; None where the kernels are not native."""
        native = {key: ffn for key, ffn in self._ffns.items() if isinstance(ffn, NativeFFN)}
        if len(native) < len(self._ffns) or not native:
            return None
        first = next(iter(native.values()))
        host = Host.of(first.kernels, hidden_size, first.inner, max_batched_rows)
        for key, ffn in native.items():
            host.add(*key, ffn.w13, ffn.w2)
        return host
