"""What `bench gpu` measures, and how the processes of it are configured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from moe_ray.bench.gpu_shapes import WEIGHTS
from moe_ray.bench.offline import LOCAL
from moe_ray.config import load_config
from moe_ray.errors import ConfigError
from moe_ray.transport.base import MAILBOX_ADDRESS

CARRIERS: Final = (LOCAL, "socket", "grpc", MAILBOX_ADDRESS)
PARTS: Final = ("kernels", "engine")


@dataclass(frozen=True, slots=True)
class GpuBenchOptions:
    """What is measured."""

    shape: str = "mixtral-8x7b"
    weights: tuple[str, ...] = ("int4",)
    parts: tuple[str, ...] = PARTS
    carriers: tuple[str, ...] = (LOCAL, "socket")
    """`local`: all in one process; the others: trunk and experts in a process each. `ipc`: over sockets, with the
    rows in the card's memory."""
    concurrency: tuple[int, ...] = (1, 8, 32, 128)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 128)
    """Of the kernel table."""
    prompt_tokens: int = 128
    output_tokens: int = 64
    long_prompt: int | None = None
    """Tokens of one prompt that is timed beside, in one process; None: none is."""
    num_layers: int | None = None
    """Fewer layers than the shape has."""
    kernels: str = "auto"
    enforce_eager: bool = False
    repeats: int = 1
    cpu_dry_run: bool = False
    cache_dir: Path = field(default_factory=lambda: load_config().cache_dir)

    def resolved(self) -> GpuBenchOptions:
        """The same, or what a dry run makes of it. Raises `ConfigError` naming the option and what is allowed."""
        for name, given, allowed in (
            ("--parts", self.parts, PARTS),
            ("--carriers", self.carriers, CARRIERS),
            ("--weights", self.weights, tuple(WEIGHTS)),
        ):
            if not given or set(given) - set(allowed):
                raise ConfigError(f"{name}: {', '.join(given) or 'none'}; allowed: {', '.join(allowed)}")
        for name, numbers in (("--concurrency", self.concurrency), ("--rows", self.rows)):
            if not numbers or min(numbers) < 1:
                raise ConfigError(f"{name}: must be numbers of at least 1")
        if self.output_tokens < 2:
            raise ConfigError("--output-tokens: must be at least 2, for there is no decoding before the second")
        if not self.cpu_dry_run:
            return self
        return GpuBenchOptions(
            shape="tiny",
            weights=self.weights,
            parts=self.parts,
            carriers=self.carriers,
            concurrency=(1, 2),
            rows=(1, 3),
            prompt_tokens=5,
            output_tokens=3,
            long_prompt=None if self.long_prompt is None else 40,
            kernels="triton",
            cpu_dry_run=True,
            cache_dir=self.cache_dir,
        )

    @property
    def device(self) -> str:
        return "cpu" if self.cpu_dry_run else "cuda"

    def engine_config(self, directory: Path, weights: str) -> dict[str, Any]:
        """What every process is configured by, as JSON: room for all sequences of a wave, and for the long prompt."""
        longest = max(self.prompt_tokens + self.output_tokens, (self.long_prompt or 0) + self.output_tokens)
        wave = max(self.concurrency)
        tokens = max(wave * (self.prompt_tokens + self.output_tokens + 16), longest + 256)
        config = load_config(
            {
                "model": {
                    "path": str(directory),
                    "device": self.device,
                    "kernels": self.kernels,
                    "enforce_eager": self.enforce_eager,
                    "max_model_len": longest,
                },
                "engine": {
                    "max_num_seqs": max(wave, 1),
                    "max_waiting": wave + 8,
                    "kv_cache_tokens": tokens,
                    "enable_prefix_caching": False,
                    "micro_batches": 1,
                },
                "cache_dir": str(self.cache_dir),
            }
        )
        return config.model_dump(mode="json")
