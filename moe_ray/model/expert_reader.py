"""Makes the networks of one replica's keys, one by one: of the checkpoint's weights, or of another replica's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_ray.core import ExpertKey, WeightLayout
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.native.expert import NativeFFN
from moe_ray.model.compute.native.held_form import HeldForm, form_of, hold
from moe_ray.model.compute.triton.limits import codes_lack
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.families import Weight
from moe_ray.model.weights import biases_of_expert, matrices_of_expert
from moe_ray.native.codes import lacks
from moe_ray.native.gating import Gating

if TYPE_CHECKING:
    import numpy as np

    from moe_ray.model.compute.triton.expert import ExpertWeights


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
        variants: Sequence[Checkpoint] = (),
    ) -> None:
        """Check every weight of `keys`, reading none. `progress` is told of each key made.

        `quantize`: hold the weights in fewer bits, a name of `held.GROUPINGS`. `variants`: checkpoints of further
        models; with E experts a model, expert m * E + e of a key is expert e of the m-th of them, `checkpoint` being
        the 0th. Raises `CheckpointError`, and `ConfigError` where weights are to be quantised and torch computes. Keys
        of layers without experts are passed over; raises `CheckpointError` where there are no others.
        """
        config = checkpoint.config
        self._tiled = compute.backend.experts == "triton"
        if quantize is not None and compute.backend.experts == "torch":
            raise ConfigError(f"experts.quantize is {quantize!r}, but torch computes the experts of this process")
        self._config, self._compute, self._progress = config, compute, progress
        self._checkpoints = (checkpoint, *variants)
        self._sources: dict[ExpertKey, Checkpoint] = {}
        self._weights: dict[ExpertKey, tuple[Weight, Weight, Weight]] = {}
        self._biases: dict[ExpertKey, tuple[Weight, ...]] = {}
        wanted = frozenset(keys)
        held = sorted(key for key in wanted if key[0] not in config.dense_layers)
        if not held:
            layers = ", ".join(map(str, sorted({layer for layer, _ in wanted})))
            raise CheckpointError(f"{checkpoint.directory}: nothing to hold: layers {layers} have no experts")
        for layer, number in held:
            model, expert = divmod(number, config.num_local_experts)
            self._sources[layer, number] = source = self._checkpoints[model]
            self._weights[layer, number] = matrices_of_expert(source.config, layer, expert)
            self._biases[layer, number] = biases_of_expert(source.config, layer, expert)
        self._matrices = {key: tuple(map(self._sources[key].matrix, each)) for key, each in self._weights.items()}
        self._stored = {
            key: sum(one.stored.nbytes for one in matrices) + self._sources[key].check(self._biases[key])
            for key, matrices in self._matrices.items()
        }
        self._kernels = compute.kernels if compute.backend.experts == "native" else None
        self._quantize = quantize
        self._compiled: set[tuple[HeldForm, HeldForm]] = set()
        self._done = 0
        self.keys = tuple(self._weights)
        """Ascending."""
        packing = self._kernels.packing if self._kernels is not None else "w1 over w3, w2"
        if self._tiled:
            packing = "Triton's tiles 1"
        forms = dict.fromkeys(map(self.held, self.keys))
        shape = (config.hidden_size, config.intermediate_size)
        options = (("biases", "gate and up, down"),) if config.family.expert_biases else ()
        self.layout = WeightLayout(", ".join(forms), packing, compute.dtype, shape, options)
        """What the bytes of a key's weights are in memory: replicas of equal layouts may take each other's.

        It says nothing of the format on disk."""

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the checkpoint."""
        return sum(checkpoint.bytes_read for checkpoint in self._checkpoints)

    def held(self, key: ExpertKey) -> str:
        """What the weights of one key are held as, in words."""
        if self._kernels is None and not self._tiled:
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
            held_w2 = hold(self._kernels, single, [down])
            gating = self._gating([self._sources[key].read_values(bias) for bias in self._biases[key]])
            ffn = NativeFFN(w13, held_w2, self._kernels, self._compute.dtype, gating)
        elif self._tiled:
            from moe_ray.model.compute.triton.reading import read_expert

            gate, up, down = self._matrices[key]
            device, source = self._compute.torch_device, self._sources[key]
            biases = [source.read(bias, self._compute.torch_dtype, device) for bias in self._biases[key]]
            ffn = self._by_triton(key, read_expert(self._forms(key), (gate, up, down), biases, device))
        else:
            from moe_ray.model.compute.torch.expert import TorchFFN

            device, dtype = self._compute.torch_device, self._compute.torch_dtype
            w1, w3, w2, *biases = (
                self._sources[key].read(weight, dtype, device) for weight in (*self._weights[key], *self._biases[key])
            )
            ffn = TorchFFN(w1, w3, w2, self._config.hidden_act, biases, self._config.clamped_swiglu)
        self._made(key)
        return ffn

    def blank(self, key: ExpertKey) -> Blank:
        """Memory for one key's weights, to be filled from elsewhere."""
        import numpy as np

        inner, hidden = self._weights[key][0].shape
        if self._kernels is not None:
            kernels = self._kernels
            joined, single = self._forms(key)
            gate_up = kernels.blank(joined.block((inner, hidden), 2))
            down = kernels.blank(single.block((hidden, inner), 1))

            gating = self._gating([np.zeros(bias.shape, np.float32) for bias in self._biases[key]])  # to be filled

            def packed() -> FFN:
                self._made(key)
                return NativeFFN(gate_up, down, kernels, self._compute.dtype, gating)

            return Blank([memoryview(gate_up.memory), memoryview(down.memory), *gating.buffers()], packed)

        import torch

        from moe_ray.model.compute.torch.expert import TorchFFN, bytes_of

        if self._tiled:
            from moe_ray.model.compute.triton.reading import blank_expert

            memory = blank_expert(self._forms(key), (inner, hidden), bool(self._biases[key]))

            def tiled() -> FFN:
                self._made(key)
                return self._by_triton(key, memory.to(self._compute.torch_device))

            return Blank([bytes_of(each) for each in memory.tensors()], tiled)

        w13 = torch.empty((2 * inner, hidden), dtype=self._compute.torch_dtype)
        w2 = torch.empty((hidden, inner), dtype=self._compute.torch_dtype)
        lengths = (2 * inner, hidden) if self._biases[key] else ()
        biases = [torch.empty(length, dtype=self._compute.torch_dtype) for length in lengths]

        def filled() -> FFN:
            device, c = self._compute.torch_device, self._config
            self._made(key)
            of = [bias.to(device) for bias in biases]
            return TorchFFN.joined(w13.to(device), w2.to(device), c.hidden_act, of, c.clamped_swiglu)

        return Blank([bytes_of(each) for each in (w13, w2, *biases)], filled)

    def _by_triton(self, key: ExpertKey, weights: ExpertWeights) -> FFN:
        """The network; the first of its form computes a row, so that its kernels are compiled before calls come."""
        from moe_ray.model.compute.triton.expert import TritonFFN

        ffn = TritonFFN(weights, self._config.clamped_swiglu)
        if self._forms(key) not in self._compiled:
            row = weights.w2.codes.new_zeros((1, self._config.hidden_size), dtype=self._compute.torch_dtype)
            ffn.forward(row, row.float()[:, 0])
            self._compiled.add(self._forms(key))
        return ffn

    def _forms(self, key: ExpertKey) -> tuple[HeldForm, HeldForm]:
        """Of gate and up, which are one block, and of down."""
        gate, up, down = self._matrices[key]
        dtype, lacking = self._compute.dtype, codes_lack if self._tiled else lacks
        return (
            form_of([gate, up], dtype, self._quantize, lacking=lacking),
            form_of([down], dtype, self._quantize, wide_inputs=True, lacking=lacking),
        )

    def fingerprint(self, key: ExpertKey) -> bytes:
        """Names the weights of one key in this checkpoint by samples of their values. Raises `CheckpointError`."""
        return self._sources[key].fingerprint((*self._weights[key], *self._biases[key]))

    def close(self) -> None:
        """Close the checkpoints."""
        for checkpoint in self._checkpoints:
            checkpoint.close()

    def _gating(self, biases: Sequence[np.ndarray]) -> Gating:
        """What a native expert computes beside its matrices; `biases` of gate [I], up [I] and down [D], or none."""
        clamped = self._config.clamped_swiglu
        return Gating.of(biases) if clamped is None else Gating.of(biases, clamped.limit, clamped.alpha)

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
