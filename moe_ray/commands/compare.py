"""`moe-ray compare`: how far two models, or one model computed in two ways, differ on a text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ray.commands.completion import models
from moe_ray.commands.options import (
    ConfigFile,
    Device,
    Dtype,
    HfOverrides,
    JsonOutput,
    Kernels,
    KvCacheDtype,
    Quantize,
    QuantizeTrunk,
    Settings,
    error_console,
    output_console,
)
from moe_ray.commands.quality_options import Context, FoundModel, LimitTokens, ModelFlags, ScoredText, Stride, Text
from moe_ray.errors import ConfigError

if TYPE_CHECKING:
    from moe_ray.console import Report

AS_A = "as of A"
_MODEL = "A directory, a Hugging Face repo id, or `demo`"


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=f"{_MODEL}: the reference.", autocompletion=models)],
    b: Annotated[
        str | None, typer.Argument(metavar="B", help=f"{_MODEL}.", show_default="A", autocompletion=models)
    ] = None,
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
    hf_overrides: HfOverrides = None,
    config: ConfigFile = None,
    settings: Settings = None,
    dtype_b: Annotated[str | None, typer.Option(help="--dtype of B.", show_default=AS_A)] = None,
    kernels_b: Annotated[str | None, typer.Option(help="--kernels of B.", show_default=AS_A)] = None,
    quantize_b: Annotated[str | None, typer.Option(help="--quantize of B.", show_default=AS_A)] = None,
    quantize_trunk_b: Annotated[str | None, typer.Option(help="--quantize-trunk of B.", show_default=AS_A)] = None,
    kv_cache_dtype_b: Annotated[str | None, typer.Option(help="--kv-cache-dtype of B.", show_default=AS_A)] = None,
    hf_overrides_b: Annotated[
        str | None, typer.Option(metavar="JSON", help="--hf-overrides of B.", show_default=AS_A)
    ] = None,
    config_b: Annotated[Path | None, typer.Option(help="--config of B.", show_default=AS_A)] = None,
    settings_b: Annotated[
        list[str] | None, typer.Option("--set-b", metavar="KEY=VALUE", help="--set of B, beside those of A.")
    ] = None,
    spool: Annotated[
        str, typer.Option(help="float32 or float16: how A's predictions are kept on disk while B is computed.")
    ] = "float32",
    json_output: JsonOutput = False,
) -> None:
    """Compare what two models predict of a text: KL, most likely tokens, perplexity, routing by layer.

    Options are those of A; B has the same but for its own (--quantize-b, --set-b, …). One model is in memory at a time.

    moe-ray compare demo --quantize-b int4
    """
    from moe_ray.commands.quality_report import comparison_json, print_comparison
    from moe_ray.console import loading_bars
    from moe_ray.quality.compare import compare as measure
    from moe_ray.quality.spool import spool_dtype

    scored = ScoredText.read(text, context, stride, limit_tokens)
    kept_as = spool_dtype(spool)
    flags_a = ModelFlags(
        *(a, dtype, device, kernels, quantize, quantize_trunk, kv_cache_dtype, config),
        hf_overrides=hf_overrides,
        settings=tuple(settings or ()),
    )
    flags_b = replace(
        flags_a,
        model=b or a,
        dtype=dtype_b or dtype,
        kernels=kernels_b or kernels,
        quantize=quantize_b or quantize,
        quantize_trunk=quantize_trunk_b or quantize_trunk,
        kv_cache_dtype=kv_cache_dtype_b or kv_cache_dtype,
        config=config_b or config,
        hf_overrides=hf_overrides_b or hf_overrides,
        settings_b=tuple(settings_b or ()),
    )
    chosen = flags_a.configured(), flags_b.configured()
    with loading_bars(error_console()) as progress:
        found_a, found_b = (FoundModel.of(each, progress) for each in chosen)
        passage = scored.passage(found_a.tokenizer)
        same_size = found_a.tokenizer.vocab_size == found_b.tokenizer.vocab_size
        if not same_size or scored.passage(found_b.tokenizer) != passage:
            raise ConfigError(f"{a} and {b} have other tokenizers: their predictions cannot be compared")
        measured = measure(
            lambda: found_a.load(context, _named(progress, "A")),
            lambda: found_b.load(context, _named(progress, "B")),
            passage,
            kept_as,
            lambda which, done, total: progress(f"{which} windows", done, total),
        )
    names = chosen[0].served_name, chosen[1].served_name
    token_text = found_a.tokenizer.token_to_str
    if json_output:
        print(comparison_json(measured, names, passage, token_text))
    else:
        print_comparison(output_console(), measured, names, passage, token_text)


def _named(progress: Report, which: str) -> Report:
    """`progress` of what is loaded for one of the two."""
    return lambda what, done, total: progress(f"{which} {what}", done, total)
