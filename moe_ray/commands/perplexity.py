"""`moe-ray perplexity`: how well a model predicts a text, in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_ray.commands.options import (
    ConfigFile,
    Device,
    Dtype,
    JsonOutput,
    Kernels,
    KvCacheDtype,
    Model,
    Quantize,
    QuantizeTrunk,
    Settings,
    error_console,
    output_console,
    with_settings,
)

Text = Annotated[Path | None, typer.Option(help="UTF-8 text to score.", show_default="one that comes with moe_ray")]
Context = Annotated[int, typer.Option(help="Tokens of a window.")]
Stride = Annotated[
    int | None, typer.Option(help="Tokens from one window to the next.", show_default="--context: no overlap")
]
LimitTokens = Annotated[
    int | None, typer.Option(min=2, help="Only so many tokens of the text.", show_default="all of it")
]


def perplexity(
    model: Model = "demo",
    text: Text = None,
    context: Context = 512,
    stride: Stride = None,
    limit_tokens: LimitTokens = None,
    dtype: Dtype = None,
    device: Device = None,
    kernels: Kernels = None,
    quantize: Quantize = None,
    quantize_trunk: QuantizeTrunk = None,
    kv_cache_dtype: KvCacheDtype = None,
    config: ConfigFile = None,
    settings: Settings = None,
    json_output: JsonOutput = False,
) -> None:
    """Measure the perplexity of a model on a text, with the server's own trunk and experts, in this process.

    Windows as in transformers' guide "Perplexity of fixed-length models": each token is scored once. The tokenizer's
    BOS, where it adds one, stands at the beginning of the text only.
    """
    from moe_ray.commands.cache import with_usable_cache
    from moe_ray.commands.quality_report import perplexity_json, print_perplexity
    from moe_ray.config import load_config
    from moe_ray.console import loading_bars
    from moe_ray.hub import resolve_model
    from moe_ray.quality.perplexity import perplexity as measure
    from moe_ray.quality.scorer import Scorer
    from moe_ray.quality.text import read_text
    from moe_ray.quality.windows import check_windows
    from moe_ray.text.tokenizer import Tokenizer

    stride = stride or context
    check_windows(context, stride)
    words = read_text(text)
    flags = {
        "model": {"path": model, "dtype": dtype, "device": device, "kernels": kernels},
        "experts": {"quantize": quantize},
        "trunk": {"quantize": quantize_trunk},
        "engine": {"kv_cache_dtype": kv_cache_dtype},
    }
    chosen = with_usable_cache(load_config(with_settings(flags, settings or ()), config), error_console())
    with loading_bars(error_console()) as progress:
        directory = resolve_model(chosen, progress)
        token_ids = Tokenizer(directory).encode(words)[:limit_tokens]
        scorer = Scorer(chosen, directory, context, progress)
        measured = measure(scorer, token_ids, context, stride, lambda done, total: progress("windows", done, total))
    said = (chosen.served_name, scorer.compute.backend, len(token_ids), context, stride)
    if json_output:
        print(perplexity_json(measured, *said))
    else:
        print_perplexity(output_console(), measured, *said)
