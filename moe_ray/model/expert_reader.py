"""Makes the networks of one replica's keys, one by one: of the checkpoint's weights, or of another replica's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moe_ray.core import ExpertKey, WeightLayout
from moe_ray.errors import ConfigError
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.native.expert import NativeFFN
from moe_ray.model.compute.native.held_form import HeldForm, form_of, hold
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.weights import weights_of_expert


@dataclass(frozen=True, slots=True)
class Blank:
    """Memory for one key's weights. Once `buffers` are filled with those of a like `FFN`, `make` makes its equal."""

    buffers: list[memoryview]
    make: Callable[[], FFN]


class ExpertReader:
    """Reads what one replica holds. Not thread-safe, as the checkpoint is not."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        keys: Iterable[ExpertKey],
        compute: Compute,
        progress: Progress | None = None,
        quantize: str | None = None,
    ) -> None:
        """Check every weight of `keys`, reading none. `progress` is told of each key made.

        `quantize`: hold the weights in fewer bits, a name of `held.GROUPINGS`. Raises `CheckpointError`, and
        `ConfigError` where they are to be quantised and have no native kernels.
        """
        config = checkpoint.config
        if quantize is not None and compute.backend.experts != "native":
            raise ConfigError(f"experts.quantize is {quantize!r}, but torch computes the experts of this process")
        self._checkpoint, self._compute, self._progress = checkpoint, compute, progress
        self._weights = {key: weights_of_expert(config, *key) for key in sorted(keys)}
        self._matrices = {key: tuple(map(checkpoint.matrix, weights)) for key, weights in self._weights.items()}
        self._stored = {key: sum(one.stored.nbytes for one in matrices) for key, matrices in self._matrices.items()}
        self._kernels = compute.kernels if compute.backend.experts == "native" else None
        self._quantize = quantize
        self._done = 0
        self.keys = tuple(self._weights)
        """Ascending."""
        packing = self._kernels.packing if self._kernels is not None else "w1 over w3, w2"
        held = dict.fromkeys(map(self.held, self.keys))
        self.layout = WeightLayout(
            ", ".join(held), packing, compute.dtype, (config.hidden_size, config.intermediate_size)
        )
        """What the bytes of a key's weights are in memory: replicas of equal layouts may take each other's.

        It says nothing of the format on disk."""

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the checkpoint."""
        return self._checkpoint.bytes_read

    def held(self, key: ExpertKey) -> str:
        """What the weights of one key are held as, in words."""
        if self._kernels is None:
            return self._compute.dtype
        up, down = map(str, self._forms(key))
        return up if up == down else f"{up}, down {down}"

    def read(self, key: ExpertKey) -> FFN:
        """Make one key of the checkpoint's weights. Raises `CheckpointError`."""
        ffn: FFN
        if self._kernels is not None:
            gate, up, down = self._matrices[key]
            joined, single = self._forms(key)
            w13 = hold(self._kernels, joined, [gate], [up])
            ffn = NativeFFN(w13, hold(self._kernels, single, [down]), self._kernels, self._compute.dtype)
        else:
            from moe_ray.model.compute.torch.expert import TorchFFN

            dtype, device = self._compute.torch_dtype, self._compute.torch_device
            w1, w3, w2 = (self._checkpoint.read(weight, dtype, device) for weight in self._weights[key])
            ffn = TorchFFN(w1, w3, w2, self._checkpoint.config.hidden_act)
        self._made(key)
        return ffn

    def blank(self, key: ExpertKey) -> Blank:
        """Memory for one key's weights, to be filled from elsewhere."""
        inner, hidden = self._weights[key][0].shape
        if self._kernels is not None:
            kernels = self._kernels
            joined, single = self._forms(key)
            gate_up = kernels.blank(joined.block((inner, hidden), 2))
            down = kernels.blank(single.block((hidden, inner), 1))

            def packed() -> FFN:
                self._made(key)
                return NativeFFN(gate_up, down, kernels, self._compute.dtype)

            return Blank([memoryview(gate_up.memory), memoryview(down.memory)], packed)

        import torch

        from moe_ray.model.compute.torch.expert import TorchFFN, bytes_of

        w13 = torch.empty((2 * inner, hidden), dtype=self._compute.torch_dtype)
        w2 = torch.empty((hidden, inner), dtype=self._compute.torch_dtype)

        def filled() -> FFN:
            device = self._compute.torch_device
            self._made(key)
            return TorchFFN.joined(w13.to(device), w2.to(device), self._checkpoint.config.hidden_act)

        return Blank([bytes_of(w13), bytes_of(w2)], filled)

    def _forms(self, key: ExpertKey) -> tuple[HeldForm, HeldForm]:
        """Of gate and up, which are one block, and of down."""
        gate, up, down = self._matrices[key]
        dtype = self._compute.dtype
        return form_of([gate, up], dtype, self._quantize), form_of([down], dtype, self._quantize, wide_inputs=True)

    def fingerprint(self, key: ExpertKey) -> bytes:
        """Names the weights of one key in this checkpoint by samples of their values. Raises `CheckpointError`."""
        return self._checkpoint.fingerprint(self._weights[key])

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()

    def _made(self, key: ExpertKey) -> None:
        self._done += self._stored[key]
        if self._progress is not None:
            self._progress(self._done, sum(self._stored.values()))


def read_experts(
    checkpoint: Checkpoint,
    keys: Iterable[ExpertKey],
    compute: Compute,
    progress: Progress | None = None,
    quantize: str | None = None,
) -> ExpertFFN:
    """Read just the weights of `keys`. Raises `CheckpointError`."""
    reader = ExpertReader(checkpoint, keys, compute, progress, quantize)
    return ExpertFFN({key: reader.read(key) for key in reader.keys})
