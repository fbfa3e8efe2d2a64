"""`moe-ray perplexity`: how well a model predicts a text, in this process, without Ray."""

from __future__ import annotations

from moe_ray.commands.options import (
    ConfigFile,
    Device,
    Dtype,
    HfOverrides,
    JsonOutput,
    Kernels,
    KvCacheDtype,
    Model,
    Quantize,
    QuantizeTrunk,
    Settings,
    error_console,
    output_console,
)
from moe_ray.commands.quality_options import Context, FoundModel, LimitTokens, ModelFlags, ScoredText, Stride, Text


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
    hf_overrides: HfOverrides = None,
    config: ConfigFile = None,
    settings: Settings = None,
    json_output: JsonOutput = False,
) -> None:
    """Measure the perplexity of a model on a text, with the server's own trunk and experts, in this process.

    Windows as in transformers' guide "Perplexity of fixed-length models": each token is scored once. The tokenizer's
    BOS, where it adds one, stands at the beginning of the text only.
    """
    from moe_ray.commands.quality_report import perplexity_json, print_perplexity
    from moe_ray.console import loading_bars
    from moe_ray.quality.perplexity import perplexity as measure

    scored = ScoredText.read(text, context, stride, limit_tokens)
    flags = ModelFlags(
        *(model, dtype, device, kernels, quantize, quantize_trunk, kv_cache_dtype, config),
        hf_overrides=hf_overrides,
        settings=tuple(settings or ()),
    )
    chosen = flags.configured()
    with loading_bars(error_console()) as progress:
        found = FoundModel.of(chosen, progress)
        passage = scored.passage(found.tokenizer)
        scorer = found.load(context, progress)
        measured = measure(scorer, passage, lambda done, total: progress("windows", done, total))
    if json_output:
        print(perplexity_json(measured, chosen.served_name, passage))
    else:
        print_perplexity(output_console(), measured, chosen.served_name, passage)
