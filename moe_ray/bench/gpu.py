"""`moe-ray bench gpu`: a model on one card: its kernels, all in one process, a process for each expert.

The sides run one after the other, for a card has room for one of them. With `cpu_dry_run` the same script runs on the
CPU, in Triton's interpreter, on a tiny shape: what it prints is no measurement, but that it runs to its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from moe_ray.bench.child import children
from moe_ray.bench.gpu_options import GpuBenchOptions
from moe_ray.bench.gpu_shapes import shape_config, shape_model
from moe_ray.bench.gpu_sides import Sides
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.console import Report as Progress
from moe_ray.model.model_config import ModelConfig

PLOT: Final = Plot(x="concurrency", y="output_tokens_per_s", series="side", log_x=True)
INTERPRETER: Final = "TRITON_INTERPRET"
"""The environment variable by which Triton's kernels run on a CPU."""


def run_gpu(options: GpuBenchOptions, progress: Progress) -> Report:
    """Measure every format, side by side; blocks, and leaves no process behind.

    Raises `ConfigError`, `CheckpointError`, and `ChildFailed` when a process does not do its part.
    """
    options = options.resolved()
    with _interpreter(options.cpu_dry_run):
        directories = {
            weights: shape_model(
                shape_config(options.shape, weights, options.num_layers),
                f"{options.shape}-{weights}" + ("" if options.num_layers is None else f"-{options.num_layers}"),
                options.cache_dir,
                progress,
            )
            for weights in options.weights
        }
        rows, table, long_rows, card = list[Row](), list[Row](), list[Row](), dict[str, Any]()
        with children() as start:
            prober = start("moe_ray.bench.gpu_process", "the kernels' process")
            answer = prober.ask(
                "kernels",
                progress,
                device=options.device,
                kernels=options.kernels,
                rows=list(options.rows) if "kernels" in options.parts else [],
                cache_dir=str(options.cache_dir),
                directories={name: str(path) for name, path in directories.items()},
            )
            table, card = answer["rows"], answer["facts"]
        for weights, directory in directories.items():
            if "engine" in options.parts:
                side = Sides(options, directory, weights, float(card["read_gb_per_s"]))
                rows += side.measured(progress)
                long_rows += side.long_rows
    facts: dict[str, object] = {
        **machine_facts(),
        **card,
        "shape": options.shape,
        "layers": ModelConfig.load(next(iter(directories.values()))).num_hidden_layers,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "repeats": options.repeats,
        "dry_run": "in an interpreter on the CPU: no figure is a measurement" if options.cpu_dry_run else None,
    }
    more = {"One expert's layer": table} if table else {}
    if long_rows:
        more["A long prompt"] = long_rows
    return Report("gpu", rows, facts, more)


@contextmanager
def _interpreter(wanted: bool) -> Iterator[None]:
    """Let the processes that are started meanwhile run Triton's kernels on the CPU."""
    before = os.environ.get(INTERPRETER)
    if wanted:
        os.environ[INTERPRETER] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[INTERPRETER]
