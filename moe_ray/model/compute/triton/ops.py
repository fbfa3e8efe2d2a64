"""The operations of a trunk by Triton's kernels; by torch where there is none for a model: `limits.py` says which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from moe_ray.core import Batch
from moe_ray.model import moe
from moe_ray.model.compute.base import FFN, HeldMatrix, KVCacheView
from moe_ray.model.compute.native.held_form import HeldForm, form_of
from moe_ray.model.compute.torch.ops import StepAttention, TorchOps, without_padding
from moe_ray.model.compute.torch.plan import power_of_two
from moe_ray.model.compute.triton import products
from moe_ray.model.compute.triton.attention import TritonStep
from moe_ray.model.compute.triton.expert import TritonFFN
from moe_ray.model.compute.triton.launch import INTERPRETED, Constant, Launch
from moe_ray.model.compute.triton.limits import codes_lack, trunk_by_torch
from moe_ray.model.compute.triton.linear_kernels import added_kernel, linear_kernel
from moe_ray.model.compute.triton.norm_kernels import add_norm_kernel, head_norm_kernel
from moe_ray.model.compute.triton.reading import hold_tiled, read_expert
from moe_ray.model.compute.triton.routing_kernels import choose_kernel, combine_kernel, place_kernel, rank_kernel
from moe_ray.model.compute.triton.tiles import TiledWeight
from moe_ray.model.matrix import Matrix
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import TrunkWeights

OUTPUTS: Final = 64
"""Outputs of a tile of `linear`: what the widest tensor-core instructions take on their M side."""
TOKENS: Final = (16, 64, 128)
"""Tokens of a tile: the least of these that takes all rows, or the largest."""
INPUTS: Final = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
"""Inputs that are multiplied at a time, by dtype."""
PROGRAMS: Final = 256
"""A product's sum is cut into parts until about so many programs compute one tile of tokens."""
MOST_SPLITS: Final = 8
WIDE: Final = 1024
"""Elements of a row that a program copies or adds."""


def splits_of(outputs: int, inputs: int, step: int) -> int:
    """In how many parts a sum is taken: of the matrix's shape alone, so that it is the same for all rows."""
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * -(-outputs // OUTPUTS) <= PROGRAMS and inputs >= 4 * splits * step:
        splits *= 2
    return splits


class TritonOps:
    """`TrunkOps` by Triton, for one model."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        start: Callable[[Launch], None] = Launch.run,
        quantize: str | None = None,
    ) -> None:
        """`start`: what is done with each launch. `quantize`: what `hold` holds in fewer bits, of `held.GROUPINGS`."""
        self._config, self._device, self._start, self._quantize = config, device, start, quantize
        self.held: dict[str, None] = {}
        """What the matrices are held as, in words."""
        self._torch = TorchOps(config, device)
        self._by_torch = trunk_by_torch(config).keys()

    def plan(self, batch: Batch, cache: KVCacheView, static_shapes: bool) -> StepAttention:
        if "attention" in self._by_torch:
            return self._torch.plan(batch, cache, static_shapes)
        return TritonStep(batch, cache, self._config, self._device, static_shapes, self._start)

    def hold(self, rows: Sequence[Matrix], weights: TrunkWeights) -> HeldMatrix:
        form = self._form(rows, weights)
        return weights.tensor(*rows) if form.grouping is None else hold_tiled(form, self._device, rows)

    def hold_shared(self, matrices: Sequence[Matrix], weights: TrunkWeights) -> FFN:
        if "shared" in self._by_torch:
            return self._torch.hold_shared(matrices, weights)
        gate, up, down = matrices
        forms = (self._form([gate, up], weights), self._form([down], weights))
        return TritonFFN(read_expert(forms, (gate, up, down), (), self._device))

    def _form(self, matrices: Sequence[Matrix], weights: TrunkWeights) -> HeldForm:
        form = form_of(matrices, str(weights.dtype).removeprefix("torch."), self._quantize, lacking=codes_lack)
        self.held[str(form)] = None
        return form

    def linear(self, x: torch.Tensor, weight: HeldMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(weight, TiledWeight):
            return products.linear(weight, x, bias, self._start)
        assert isinstance(weight, torch.Tensor), "held by another backend"
        (rows, inputs), outputs, step = x.shape, len(weight), INPUTS[x.dtype]
        out = x.new_empty(rows, outputs)
        tokens = next((count for count in TOKENS if rows <= count), TOKENS[-1])
        splits, tiles = splits_of(outputs, inputs, step), -(-rows // tokens)
        # Parts side by side where one tile has all tokens; else a program takes them in turn, and adds the same way.
        apart = splits > 1 and tiles == 1
        parts = x.new_empty(splits, rows, outputs, dtype=torch.float32) if apart else None
        self._launch(
            linear_kernel,
            (-(-outputs // OUTPUTS), tiles, splits if apart else 1),
            {"x": x, "weight": weight, "bias": None if apart else bias, "out": None if apart else out, "parts": parts},
            {"rows": rows, "stride": x.stride(0)},
            {"OUTPUTS": outputs, "INPUTS": inputs, "SPLITS": splits, "APART": apart}
            | {"BLOCK_N": OUTPUTS, "BLOCK_T": tokens, "BLOCK_K": step, "EMULATED": INTERPRETED},
        )
        if apart:
            self._launch(
                added_kernel,
                (-(-rows * outputs // WIDE),),
                {"parts": parts, "bias": bias, "out": out},
                {"rows": rows},
                {"OUTPUTS": outputs, "SPLITS": splits, "BLOCK": WIDE, "EMULATED": INTERPRETED},
            )
        return out

    def add_normalise(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if "norm" in self._by_torch:
            return self._torch.add_normalise(hidden, added, weight, bias)
        width, normed = hidden.shape[1], torch.empty_like(hidden)
        sums = None if added is None else torch.empty_like(hidden)
        self._launch(
            add_norm_kernel,
            (len(hidden),),
            {"hidden": hidden, "added": added, "weight": weight, "sums": sums, "normed": normed},
            {},
            {"WIDTH": width, "EPS": self._config.rms_norm_eps, "MULTIPLIER": self._config.residual_multiplier}
            | {"BLOCK": power_of_two(width), "EMULATED": INTERPRETED},
            warps=8,
        )
        return hidden if sums is None else sums, normed

    def normalise_heads(self, qk: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> torch.Tensor:
        tokens, heads, head_dim = qk.shape
        normed = qk.new_empty(qk.shape)
        self._launch(
            head_norm_kernel,
            (tokens, heads),
            {"qk": qk, "q_norm": q_norm, "k_norm": k_norm, "normed": normed},
            {"stride": qk.stride(0)},
            {"HEADS": self._config.num_attention_heads, "ALL_HEADS": heads, "HEAD_DIM": head_dim}
            | {"EPS": self._config.rms_norm_eps, "BLOCK": power_of_two(head_dim), "EMULATED": INTERPRETED},
            warps=1,
        )
        return normed

    def route(
        self, rows: torch.Tensor, logits: torch.Tensor, correction: torch.Tensor | None, real: torch.Tensor | None
    ) -> moe.Routed:
        c, (tokens, experts) = self._config, logits.shape
        top_k, router = c.num_experts_per_tok, c.router
        if "router" in self._by_torch:
            chosen, weights = moe.choose(logits, top_k, router, correction)
            chosen = chosen if real is None else without_padding(chosen, real, experts)
        else:
            chosen = logits.new_empty(tokens, top_k, dtype=torch.int64)
            weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
            self._launch(
                choose_kernel,
                (tokens,),
                {"logits": logits, "correction": correction, "real": real, "chosen": chosen, "weights": weights},
                {},
                {"EXPERTS": experts, "TOP_K": top_k, "SIGMOID": router.sigmoid, "RENORMALISE": router.renormalise}
                | {"LEAST_SUM": moe.LEAST_SUM, "SCALE": router.scale, "BLOCK": power_of_two(experts)},
                warps=1,
            )
        return self._group(rows, chosen, weights, experts)

    def _group(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: int) -> moe.Routed:
        """`moe.group`: counts stay on the device."""
        (tokens, top_k), width = chosen.shape, hidden.shape[1]
        ranks, counts = torch.empty_like(chosen), chosen.new_empty(experts)
        self._launch(
            rank_kernel,
            (experts,),
            {"chosen": chosen, "ranks": ranks, "counts": counts},
            {"tokens": tokens},
            {"TOP_K": top_k, "BLOCK": WIDE},
        )
        rows = hidden.new_empty(tokens * top_k, width)
        row_weights, row_of = weights.new_empty(tokens * top_k), torch.empty_like(chosen)
        self._launch(
            place_kernel,
            (tokens * top_k, -(-width // WIDE)),
            {"hidden": hidden, "chosen": chosen, "weights": weights, "ranks": ranks, "counts": counts}
            | {"rows": rows, "row_weights": row_weights, "row_of": row_of},
            {},
            {"EXPERTS": experts, "TOP_K": top_k, "WIDTH": width, "BLOCK_E": power_of_two(experts), "BLOCK": WIDE},
        )
        return moe.Routed(rows, row_weights, counts, row_of)

    def combine(
        self, hidden: torch.Tensor, rows: torch.Tensor, row_of: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        sums, (tokens, top_k), width = torch.empty_like(hidden), row_of.shape, hidden.shape[1]
        self._launch(
            combine_kernel,
            (len(hidden), -(-width // WIDE)),
            {"hidden": hidden, "rows": rows, "row_of": row_of, "real": real, "sums": sums},
            {"tokens": tokens},
            {"TOP_K": top_k, "WIDTH": width, "MULTIPLIER": self._config.residual_multiplier}
            | {"BLOCK": WIDE, "EMULATED": INTERPRETED},
        )
        return sums

    def _launch(
        self,
        kernel: object,
        grid: tuple[int, ...],
        tensors: Mapping[str, torch.Tensor | None],
        numbers: Mapping[str, int],
        constants: Mapping[str, Constant],
        warps: int = 4,
    ) -> None:
        self._start(Launch(kernel, grid, tensors, numbers, constants, warps, contracted=False))
