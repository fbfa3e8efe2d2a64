"""`moe-ray convert …`: makes Mixtral-format checkpoints out of other models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_ray.commands.options import error_console

UpcycleDtype = Literal["bfloat16", "float16", "float32"]


def upcycle(
    source: Annotated[Path, typer.Argument(help="A GGUF file or a directory of a dense Llama-architecture model.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    experts: Annotated[int, typer.Option(min=2)] = 8,
    top_k: Annotated[int, typer.Option(min=1)] = 2,
    noise: Annotated[float, typer.Option(help="Noise per expert, as a fraction of each matrix's spread.")] = 0.02,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: Annotated[UpcycleDtype, typer.Option(help="Of the written weights.")] = "bfloat16",
) -> None:
    """Turn a dense model into a mixture of experts by sparse upcycling (arXiv:2212.05055)."""
    from moe_ray.console import loading_bars
    from moe_ray.convert.recipe import UpcycleConfig
    from moe_ray.convert.upcycle import upcycle as run_upcycle

    console = error_console()
    options = UpcycleConfig(num_experts=experts, top_k=top_k, noise=noise, seed=seed, dtype=dtype)
    with loading_bars(console) as progress:
        run_upcycle(source, out, options, progress)
    console.print(f"wrote {out}")
