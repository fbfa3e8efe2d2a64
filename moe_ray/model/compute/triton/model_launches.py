"""All that a model's trunk and experts launch, found from its config.json alone: on tensors that have no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_ray.core import AdapterRows
from moe_ray.model.compute.base import FFN, HeldMatrix, LayerCache
from moe_ray.model.compute.native.held_form import HeldForm, form_of
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.compute.triton.expert import ExpertWeights, TritonFFN
from moe_ray.model.compute.triton.launch import Launch
from moe_ray.model.compute.triton.ops import TritonOps
from moe_ray.model.compute.triton.reading import blank_expert
from moe_ray.model.compute.triton.tiles import TiledWeight, Tiling
from moe_ray.model.compute.triton.warm_up import warm_up
from moe_ray.model.families import TrunkRole
from moe_ray.model.matrix import FloatMatrix, Matrix
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import TrunkWeights
from moe_ray.model.weights import weights_of_trunk

CPU: Final = torch.device("cpu")
SLOTS: Final = 1024
"""Of a cache that is only looked at."""
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Of experts' calls: whatever kernels take several tiles of rows for."""


@dataclass(frozen=True, slots=True)
class Held:
    """How a model is held on a card, in the words of the configuration."""

    dtype: str = "bfloat16"
    quantize: str | None = None
    """Experts; None: floats."""
    trunk_quantize: str | None = None
    cache: torch.dtype | None = None
    """Of keys and values: int8, float8_e4m3fn; None: as the rows are."""
    block_size: int = 16
    max_model_len: int = 4096

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


class BlankTrunkWeights(TrunkWeights):
    """Weights of a checkpoint that is not there, of any values."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype, self.device = config, dtype, CPU
        self._weights = {(weight.role, weight.layer): weight for weight in weights_of_trunk(config)}

    def tensor(self, *rows: Matrix) -> torch.Tensor:
        return torch.empty(sum(each.shape[0] for each in rows), rows[0].shape[1], dtype=self.dtype)

    def _matrix(self, role: TrunkRole, layer: int | None = None) -> Matrix:
        return FloatMatrix(self._read(role, layer))

    def _read(self, role: TrunkRole, layer: int | None = None) -> torch.Tensor:
        wide = role == "router_correction" or (role == "router" and self.config.router.wide)
        return torch.empty(self._weights[role, layer].shape, dtype=torch.float32 if wide else self.dtype)


class _BlankOps(TritonOps):
    """Holds what it is given without reading it."""

    def hold(self, rows: Sequence[Matrix], weights: TrunkWeights) -> HeldMatrix:
        form = self._form(rows, weights)
        if form.grouping is None:
            return weights.tensor(*rows)
        outputs, inputs = sum(each.shape[0] for each in rows), rows[0].shape[1]
        return TiledWeight.blank(Tiling(outputs, inputs, 1, weights.dtype, form.grouping))

    def hold_shared(self, matrices: Sequence[Matrix], weights: TrunkWeights) -> FFN:
        if "shared" in self._by_torch:
            return self._torch.hold_shared(matrices, weights)
        gate, up, down = matrices
        forms = (self._form([gate, up], weights), self._form([down], weights))
        return _ToldFFN(blank_expert(forms, gate.shape, False), self._start)


class _ToldFFN(TritonFFN):
    """Tells its launches."""

    def __init__(self, weights: ExpertWeights, start: Callable[[Launch], None]) -> None:
        super().__init__(weights)
        self._start = start

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        out = torch.empty_like(rows)
        for launch in self.launches(rows, weights, out, adapters):
            self._start(launch)
        return out


class _BlankCache:
    """`KVCacheView` of a cache that is only looked at."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, block_size: int) -> None:
        self.block_size, self.spare_slot = block_size, SLOTS
        rows = (SLOTS + 1, config.num_key_value_heads)
        k, v = (torch.empty(*rows, config.head_dim, dtype=dtype) for _ in range(2))
        scales = [torch.empty(rows) if dtype == torch.int8 else None for _ in range(2)]
        self._layer = LayerCache(k, k if config.latent is not None else v, *scales)

    def layer(self, index: int) -> LayerCache:
        return self._layer


def trunk_launches(config: ModelConfig, held: Held) -> list[Launch]:
    """What a trunk launches whatever its batches are, as `warm_up` has it launched."""
    made: list[Launch] = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        ops = _BlankOps(config, CPU, made.append, held.trunk_quantize)
        weights = BlankTrunkWeights(config, held.torch_dtype)
        trunk = TorchTrunk(weights, held.max_model_len, static_shapes=True, ops=ops)
        cache = _BlankCache(config, held.cache or held.torch_dtype, held.block_size)
        warm_up(trunk, config.num_hidden_layers, cache, held.max_model_len)
    return made


def expert_launches(config: ModelConfig, held: Held) -> Iterator[Launch]:
    """What an expert launches for calls of any number of rows, without adapters."""
    inner, hidden = config.intermediate_size, config.hidden_size
    forms = (_form(held, inner, hidden), _form(held, hidden, inner))
    weights = blank_expert(forms, (inner, hidden), config.family.expert_biases, "meta")
    ffn = TritonFFN(weights, config.clamped_swiglu)
    for count in ROWS:
        rows = torch.empty(count, hidden, dtype=held.torch_dtype, device="meta")
        weights_of_rows = torch.empty(1 + count, device="meta")
        for begin in (0, 1):  # a call's may begin anywhere among those of all experts
            yield from ffn.launches(rows, weights_of_rows[begin : begin + count], torch.empty_like(rows))


def _form(held: Held, outputs: int, inputs: int) -> HeldForm:
    matrix = FloatMatrix(torch.empty(outputs, inputs, dtype=held.torch_dtype, device="meta"))
    return form_of([matrix], held.dtype, held.quantize)
