"""`moe-ray convert …`: makes Mixtral-format checkpoints out of other models, or of the same one in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_ray.commands.completion import models
from moe_ray.commands.options import MODEL_HELP, error_console

GroupSize = Literal["32", "64", "128"]
Method = Literal["rtn", "gptq", "awq"]
TrunkBits = Literal["none", "int8", "int4"]
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


def quantize(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, autocompletion=models)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to create.")],
    bits: Annotated[
        float, typer.Option(help="Of the experts' weights: 4 or 8. From 0.25 to 1.6: ternary, of so many bits on disk.")
    ] = 4,
    group_size: Annotated[
        GroupSize | None, typer.Option(help="Weights that share a scale.", show_default="32; of ternary weights a row")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point for each group as well.")] = False,
    method: Annotated[Method, typer.Option(help="gptq and awq look at what the experts see of a text.")] = "gptq",
    trunk: Annotated[TrunkBits, typer.Option(help="The attention's weights, too.")] = "none",
    calibration_text: Annotated[
        Path | None, typer.Option(help="UTF-8 text for gptq and awq.", show_default="one that comes with moe_ray")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Only so many tokens of the text.")] = 16384,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="gptq: the inputs that matter most first; slower to compute with.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it is there.")] = False,
) -> None:
    """Quantise a model's experts, and write a checkpoint that other programs read as well (compressed-tensors).

    Gates, norms, embedding and head stay as they are. GPTQ: arXiv:2210.17323; AWQ: arXiv:2306.00978. Ternary weights
    (as in QMoE, arXiv:2310.16795) are research: moe_ray alone reads them, and they cost much quality.
    """
    from moe_ray.commands.cache import with_usable_cache
    from moe_ray.config import load_config
    from moe_ray.console import loading_bars
    from moe_ray.convert.quantize.config import QuantizeConfig
    from moe_ray.convert.quantize.quantize import quantize as run_quantize
    from moe_ray.hub import resolve_model

    console = error_console()
    options = QuantizeConfig(
        bits=bits,
        group_size=None if group_size is None else int(group_size),
        asymmetric=asymmetric,
        method=method,
        trunk=trunk,
        calibration_text=calibration_text,
        calibration_tokens=calibration_tokens,
        act_order=act_order,
    )
    chosen = with_usable_cache(load_config({"model": {"path": model}}), console)
    with loading_bars(console) as progress:
        report = run_quantize(resolve_model(chosen, progress), out, options, progress, overwrite=overwrite)
    console.print(f"wrote {out}: {report.total_bytes / 1e6:,.0f} MB, {report.source_bytes / 1e6:,.0f} MB before")
    if report.calibration_tokens:
        counts = [count for layer in report.layers for count in layer.tokens]
        console.print(
            f"calibrated on {report.calibration_tokens} tokens; each expert saw {min(counts)} to {max(counts)} of them "
            f"in each layer (all counts: quantize.json)"
        )
