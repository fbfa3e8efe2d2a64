"""`moe-ray bench attention`: attention of the native kernels for one token a sequence, by context and KV cache."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Final

import ml_dtypes
import numpy as np
import torch

from moe_ray.bench.kernels import milliseconds_of, open_kernels
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.engine.kv_cache import KVCache
from moe_ray.errors import ConfigError
from moe_ray.model.kv_bytes import NARROW, kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.host import DTYPE_CODES
from moe_ray.native.kernels import Kernels, Layer, ModelShape, StepInputs
from moe_ray.telemetry import cores

Progress = Callable[[str, int, int], None]

PLOT: Final = Plot("context", "ms", "what", log_x=True, log_y=True)
HIDDEN: Final = 32
"""Of the layer around attention: its products are hardly seen."""
BLOCK: Final = 16


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What is measured. The heads are those of Mixtral-8x7B."""

    kernels: tuple[str, ...] = ()
    """Names of `KERNELS`. Default: this machine's best."""
    caches: tuple[str, ...] = ("bfloat16", "int8")
    contexts: tuple[int, ...] = (512, 4096, 16384)
    sequences: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    threads: int | None = None
    """Default: the cores of this process."""
    repeats: int = 5


class _Case:
    """One layer that computes a token of each sequence, behind `context` - 1 that are in the cache."""

    def __init__(self, kernels: Kernels, held: str, context: int, options: AttentionOptions) -> None:
        self.kernels, self.held, self.context = kernels, held, context
        o, tokens = options, options.sequences
        self.config = ModelConfig.from_dict(
            {
                **{"model_type": "mixtral", "vocab_size": HIDDEN, "hidden_size": HIDDEN, "intermediate_size": HIDDEN},
                **{"num_hidden_layers": 1, "num_attention_heads": o.heads, "num_key_value_heads": o.kv_heads},
                **{"head_dim": o.head_dim, "num_local_experts": 1, "num_experts_per_tok": 1},
            }
        )
        blocks = -(-context // BLOCK)
        dtype = torch.float8_e4m3fn if held == "fp8" else getattr(torch, held)
        cache = KVCache(self.config, tokens * blocks, BLOCK, dtype, torch.device("cpu"))
        kv = cache.layer(0)
        for part, scales in ((kv.k, kv.k_scales), (kv.v, kv.v_scales)):
            if held == "fp8":
                part.copy_(torch.randn(part.shape))
            elif scales is None:
                part.normal_()
            else:
                part.random_(-127, 128)
                scales.fill_(0.01)
        last = context - 1
        slots = [block * BLOCK + last % BLOCK for block in range(blocks - 1, tokens * blocks, blocks)]
        arrays = (
            np.full(tokens, last, np.int32),
            np.array(slots, np.int32),
            np.arange(tokens, dtype=np.int32),
            np.arange(tokens * blocks, dtype=np.int32),
            np.arange(0, tokens * blocks, blocks),
            np.ones((context, o.head_dim), np.float32),
        )
        rows = "bfloat16" if held in NARROW else held
        widths = ((o.heads + 2 * o.kv_heads) * o.head_dim, HIDDEN), (HIDDEN, o.heads * o.head_dim), (1, HIDDEN)
        blocks_of = [kernels.pack_floats("bfloat16", np.full(w, 0.01, ml_dtypes.bfloat16)) for w in widths]
        norm = np.ones(HIDDEN, np.float32)
        held_at = [None if each is None else each.data_ptr() for each in (kv.k, kv.v, kv.k_scales, kv.v_scales)]
        layer = Layer(*(norm.ctypes.data,) * 2, *(block.address for block in blocks_of), *held_at, float8=held == "fp8")
        step = StepInputs(tokens, BLOCK, *(array.ctypes.data for array in arrays))
        shape = ModelShape(HIDDEN, o.heads, o.kv_heads, o.head_dim, 1, 1, 1e-5, o.head_dim**-0.5, 0)
        outputs = (
            np.ones((tokens, HIDDEN), np.float32),
            np.empty((tokens, HIDDEN), np.float32),  # or narrower
            np.empty(tokens, np.float32),
            np.empty(1, np.int64),
            np.empty(tokens, np.int32),
        )
        self._alive = (cache, arrays, blocks_of, norm, outputs)
        self._arguments = (
            *(kernels.pool, DTYPE_CODES[rows], ctypes.byref(shape), ctypes.byref(layer), ctypes.byref(step)),
            *(array.ctypes.data for array in outputs),
        )

    def milliseconds(self) -> float:
        """Of one step, on average."""
        return milliseconds_of(lambda: self.kernels.layer_front(*self._arguments))


def attention_ms(kernels: Kernels, held: str, context: int, options: AttentionOptions) -> float:
    """Milliseconds of one token of each of `options.sequences`, the median of `options.repeats` runs after one."""
    case = _Case(kernels, held, context, options)
    return statistics.median([case.milliseconds() for _ in range(options.repeats + 1)][1:])


def run_attention(options: AttentionOptions, on_progress: Progress) -> Report:
    """Time each cache on each instruction set, in turn. Raises `ConfigError` for what this machine cannot run."""
    for name in options.caches:
        if name not in (*DTYPE_CODES, *NARROW):
            raise ConfigError(f"--caches: {name!r} is none of {', '.join((*DTYPE_CODES, *NARROW))}")
    threads = options.threads or cores()
    opened = open_kernels(options.kernels, threads)
    if not opened[0].supports_attention(options.heads, options.kv_heads, options.head_dim):
        raise ConfigError(
            f"--heads, --kv-heads, --head-dim: no attention for {options.heads} query heads and {options.kv_heads} KV "
            f"heads of {options.head_dim}"
        )
    rows: list[Row] = []
    for number, context in enumerate(options.contexts):
        on_progress("contexts", number, len(options.contexts))
        cases = [_Case(kernels, held, context, options) for kernels, held in product(opened, options.caches)]
        for case in cases:
            case.milliseconds()  # warms up
        times = [[case.milliseconds() for case in cases] for _ in range(options.repeats)]
        for case, found in zip(cases, zip(*times, strict=True), strict=True):
            rows.append(_row(case, options, statistics.median(found)))
    on_progress("contexts", len(options.contexts), len(options.contexts))
    facts = {
        "sequences": options.sequences,
        "heads": options.heads,
        "kv_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "threads": threads,
        "repeats": options.repeats,
        **machine_facts(),
    }
    return Report("attention", rows, facts)


def _row(case: _Case, options: AttentionOptions, milliseconds: float) -> Row:
    read = options.sequences * case.context * kv_bytes_per_token(case.config, case.held)
    return {
        "what": f"{case.kernels.name} {case.held}",
        "context": case.context,
        "ms": round(milliseconds, 4),
        "gb_per_s": round(read / milliseconds / 1e6, 1),
    }
