"""The trunk's operations by Triton's kernels beside the reference: for the interpreter and for a card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from step_batch import step_batch

from moe_ray.engine.kv_cache import KVCache, cache_dtype
from moe_ray.model import moe
from moe_ray.model.compute.base import LayerCache
from moe_ray.model.compute.torch.kv_rows import keep
from moe_ray.model.compute.torch.ops import Attending, TorchOps, TrunkOps
from moe_ray.model.compute.torch.recorded_step import of_tokens
from moe_ray.model.compute.triton.ops import TritonOps
from moe_ray.model.layers import apply_rope, rms_norm
from moe_ray.model.model_config import ModelConfig

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING: Final = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""What a value may be off by, of the largest: one step of its dtype and a half."""
BLOCK: Final = 16
Chunk = tuple[int, int]


def config(heads: int = 4, kv_heads: int = 2, head_dim: int = 16, **more: object) -> ModelConfig:
    raw = {
        "model_type": "mixtral",
        "vocab_size": 100,
        "hidden_size": 72,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 2048,
        **more,
    }
    return ModelConfig.from_dict(raw)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.to(device=device, dtype=dtype)


def ops(of: ModelConfig, device: str) -> tuple[TritonOps, TorchOps]:
    return TritonOps(of, torch.device(device)), TorchOps(of, torch.device(device))


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """Within `times` the rounding of a dtype, of the largest value."""
    largest = max(float(wanted.abs().max()), 1e-3)
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=times * ROUNDING[dtype] * largest)


# ---- products


def linear_is_right(rows: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool, device: str) -> None:
    triton, _ = ops(config(), device)
    x, weight = drawn(rows, inputs, dtype=dtype, device=device), drawn(outputs, inputs, dtype=dtype, device=device)
    added = drawn(outputs, dtype=dtype, device=device) if bias else None
    got = triton.linear(x, weight, added)
    assert got.dtype == dtype
    wanted = x.double() @ weight.double().T + (added.double() if added is not None else 0.0)
    close(got, wanted, dtype)


def linear_is_the_same_in_company(inputs: int, outputs: int, dtype: torch.dtype, device: str) -> None:
    """Each row by itself, in the middle of others, and where a program takes the parts of a sum in turn."""
    triton, _ = ops(config(), device)
    x, weight = drawn(150, inputs, dtype=dtype, device=device), drawn(outputs, inputs, dtype=dtype, device=device)
    bias = drawn(outputs, dtype=dtype, device=device)
    whole = triton.linear(x, weight, bias)
    for start, end in ((0, 1), (149, 150), (3, 20), (20, 87), (0, 128)):
        assert torch.equal(triton.linear(x[start:end], weight, bias), whole[start:end]), (start, end)
    assert torch.equal(triton.linear(x.flip(0), weight, bias).flip(0), whole)


# ---- norms


def norms_are_right(width: int, dtype: torch.dtype, device: str) -> None:
    of = config(model_type="granitemoe", hidden_size=width, residual_multiplier=0.22)
    triton, reference = ops(of, device)
    hidden, added = (drawn(5, width, seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    weight = drawn(width, dtype=dtype, device=device)
    for more in (None, added):
        got, wanted = (
            triton.add_normalise(hidden, more, weight, None),
            reference.add_normalise(hidden, more, weight, None),
        )
        assert torch.equal(got[0], wanted[0]), "sums are rounded where the reference rounds"
        close(got[1], wanted[1], dtype)
    alone, _ = triton.add_normalise(hidden[3:4], added[3:4], weight, None), None
    assert torch.equal(alone[1], triton.add_normalise(hidden, added, weight, None)[1][3:4])


def head_norms_are_right(dtype: torch.dtype, device: str) -> None:
    of = config(6, 2, 24)
    triton, _ = ops(of, device)
    qkv = drawn(5, 10, 24, dtype=dtype, device=device)
    q_norm, k_norm = (drawn(24, seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    got, qk, eps = triton.normalise_heads(qkv[:, :8], q_norm, k_norm), qkv[:, :8], of.rms_norm_eps
    close(got, torch.cat((rms_norm(qk[:, :6], q_norm, eps), rms_norm(qk[:, 6:], k_norm, eps)), 1), dtype)


# ---- attention


@dataclass(frozen=True)
class AttentionCase:
    """A model's attention, and how keys and values are held."""

    name: str
    of: ModelConfig
    dtype: str = "float32"
    cache: str = "auto"
    layer: int = 0

    def __str__(self) -> str:
        return self.name


ATTENTION: Final = (
    AttentionCase("plain", config()),
    AttentionCase("a head of its own for each query", config(3, 3, 24)),
    AttentionCase("five queries a key", config(5, 1, 16)),
    AttentionCase("a window", config(sliding_window=37)),
    AttentionCase("a long window", config(4, 1, 16, sliding_window=300)),
    AttentionCase("sinks and a window", config(8, 1, 16, model_type="gpt_oss", sliding_window=37)),
    AttentionCase("sinks", config(8, 1, 16, model_type="gpt_oss", sliding_window=37), layer=1),
    AttentionCase("a multiplier", config(model_type="granitemoe", attention_multiplier=0.1)),
    AttentionCase("bfloat16", config(), "bfloat16"),
    AttentionCase("float16", config(), "float16"),
    AttentionCase("int8", config(), cache="int8"),
    AttentionCase("int8 beside bfloat16", config(), "bfloat16", "int8"),
    AttentionCase("fp8", config(), cache="fp8"),
    AttentionCase("fp8 beside bfloat16", config(), "bfloat16", "fp8"),
)
BATCHES: Final[tuple[list[Chunk], ...]] = (
    [(0, 1)],
    [(9, 10), (40, 41), (16, 17)],
    [(0, 33)],
    [(40, 60), (0, 5), (59, 60)],
)
LONG_BATCHES: Final[tuple[list[Chunk], ...]] = (
    [(255, 256), (256, 257), (560, 561)],
    [(40, 60), (0, 5), (99, 100), (300, 341)],
)
"""Contexts of several partitions."""
SEQUENCES: Final = 4
LONGEST: Final = 640


class Attention:
    """One layer of a case, with what came before in its cache."""

    def __init__(self, case: AttentionCase, device: str) -> None:
        self.case, self.dtype, self.device = case, DTYPES[case.dtype], torch.device(device)
        of, blocks = case.of, LONGEST // BLOCK
        held = cache_dtype(case.cache, self.dtype)
        self._caches = [KVCache(of, SEQUENCES * blocks, BLOCK, held, self.device) for _ in range(2)]
        self.triton, self.reference = ops(of, device)
        sinks = drawn(of.num_attention_heads, dtype=self.dtype, device=device) if "sinks" in case.name else None
        self.how = Attending(of.attention_multiplier, of.window_of(case.layer), sinks)
        before = step_batch([(0, LONGEST)] * SEQUENCES, BLOCK, blocks)
        qk, v, cos_sin = self._values(before.token_ids, before.positions)
        self._history = apply_rope(qk, cos_sin)[:, of.num_attention_heads :], v
        self._slots = torch.tensor(before.slot_mapping, device=self.device)

    def _values(self, tokens: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries with keys, values, and rotations of tokens; the same for the same token at the same position."""
        of, base = self.case.of, torch.Generator().manual_seed(5)
        heads, kv_heads, size = of.num_attention_heads, of.num_key_value_heads, of.head_dim
        table = torch.randn(100, heads + 2 * kv_heads, size, generator=base)
        drift = torch.randn(LONGEST, heads + 2 * kv_heads, size, generator=base) * 0.5
        angles = torch.randn(LONGEST, size // 2, generator=base).repeat(1, 2)
        qkv = (table[tokens] + drift[positions]).to(self.dtype).to(self.device)
        cos_sin = torch.stack((angles.cos(), angles.sin()), 1)[positions].to(self.dtype).to(self.device)
        return qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :], cos_sin

    def _layer(self, which: int, chunks: list[Chunk], first: int) -> LayerCache:
        """A cache with what comes before these chunks, and garbage from there on."""
        layer = self._caches[which].layer(self.case.layer)
        k, v = self._history
        keep(layer, self._slots, k * 3, v * 3)
        for number, (start, _) in enumerate(chunks, first):
            mine = slice(number * LONGEST, number * LONGEST + start)
            keep(layer, self._slots[mine], k[mine], v[mine])
        return layer

    def by(self, which: TrunkOps, chunks: list[Chunk], first: int = 0) -> tuple[torch.Tensor, LayerCache]:
        """What the tokens of sequences from number `first` on attend to, and the cache after it."""
        batch = step_batch(chunks, BLOCK, LONGEST // BLOCK, first)
        cache = self._caches[which is self.triton]
        layer = self._layer(int(which is self.triton), chunks, first)
        step = which.plan(batch, cache, static_shapes=False)
        qk, v, cos_sin = self._values(batch.token_ids, batch.positions)
        return step.attend(qk, v, cos_sin, layer, self.how), layer

    def check(self, chunks: list[Chunk]) -> None:
        """As the reference, and the cache is the reference's to a bit, or to a code."""
        got, mine = self.by(self.triton, chunks)
        wanted, theirs = self.by(self.reference, chunks)
        for one, other in ((mine.k, theirs.k), (mine.v, theirs.v)):
            if self.device.type == "cpu" or one.dtype != torch.int8:
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            else:  # torch on a card multiplies by what it does not divide by
                assert int((one.int() - other.int()).abs().max()) <= 1
        if mine.k_scales is not None:
            torch.testing.assert_close(mine.k_scales, theirs.k_scales, rtol=1e-6, atol=0)
            torch.testing.assert_close(mine.v_scales, theirs.v_scales, rtol=1e-6, atol=0)
        # Weights are rounded to the dtype before or after they are divided by their sum.
        close(got, wanted, self.dtype, 2.0)

    def check_company(self) -> None:
        """A token's bits alone, in a batch, and as a chunk's last, behind contexts of one partition and several."""
        for end in (20, 290, 561):
            alone, _ = self.by(self.triton, [(end - 1, end)])
            beside, _ = self.by(self.triton, [(end - 1, end), (9, 10), (600, 601)])
            mixed, _ = self.by(self.triton, [(end - 1, end), (2, 50)])
            chunk, _ = self.by(self.triton, [(end - 19, end)])
            cut, _ = self.by(self.triton, [(end - 7, end)])
            for other in (beside[0], mixed[0], chunk[-1], cut[-1]):
                assert torch.equal(other, alone[0])
            drafts, _ = self.by(self.triton, [(end - 7, end), (600, 601)])
            assert torch.equal(chunk[-7:], cut)
            assert torch.equal(drafts[:7], cut)


# ---- routing


def routing_is_right(experts: int, top_k: int, tokens: int, family: str, device: str, all_to_one: bool = False) -> None:
    of = config(
        model_type=family,
        num_local_experts=experts,
        num_experts=experts,
        num_experts_per_tok=top_k,
    )
    triton, reference = ops(of, device)
    rows, logits = drawn(tokens, 72, device=device), drawn(tokens, experts, seed=3, device=device)
    if all_to_one:
        logits[:, 3] += 50.0
    same_routing(triton.route(rows, logits, None, None), reference.route(rows, logits, None, None))


def padding_is_not_routed(experts: int, top_k: int, tokens: int, padded: int, device: str) -> None:
    """Of the padded rows those of tokens come as they do alone; the others behind them, for no expert."""
    of = config(num_local_experts=experts, num_experts_per_tok=top_k)
    triton, reference = ops(of, device)
    rows, logits = drawn(padded, 72, device=device), drawn(padded, experts, seed=3, device=device)
    hidden, made = drawn(padded, 72, seed=4, device=device), drawn(padded * top_k, 72, seed=5, device=device)
    real = torch.tensor([tokens], device=device)
    for which in (triton, reference):
        alone = which.route(rows[:tokens], logits[:tokens], None, None)
        whole = which.route(rows, logits, None, real)
        assert sum(whole.counts) == tokens * top_k
        same_routing(moe.Routed(*of_tokens(whole.tensors(), tokens)), alone)
        assert bool((whole.row_of[tokens:] >= tokens * top_k).all())
        wanted = which.combine(hidden[:tokens], made[: tokens * top_k], alone.row_of, None)
        for row_of in (whole.row_of, alone.row_of):
            got = which.combine(hidden, made, row_of, real)
            assert torch.equal(got[:tokens], wanted)
            assert torch.equal(got[tokens:], hidden[tokens:]), "padding stays as it is"


def same_routing(got: moe.Routed, wanted: moe.Routed) -> None:
    """To a bit, but for weights."""
    assert got.counts == wanted.counts
    assert torch.equal(got.row_of, wanted.row_of)
    assert torch.equal(got.rows, wanted.rows)
    torch.testing.assert_close(got.weights, wanted.weights, rtol=1e-5, atol=1e-7)
