"""`moe-ray compare`: how far two models, or one model computed in two ways, differ on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ray.commands.options import (
    ConfigFile,
    Device,
    Dtype,
    JsonOutput,
    Kernels,
    Settings,
    error_console,
    output_console,
    with_settings,
)
from moe_ray.commands.perplexity import Context, LimitTokens, Stride, Text
from moe_ray.errors import ConfigError

if TYPE_CHECKING:
    from moe_ray.config import Config
    from moe_ray.console import Report
    from moe_ray.quality.scorer import Scorer

AS_A = "as of A"
_MODEL = "A directory, a Hugging Face repo id, or `demo`"


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=f"{_MODEL}: the reference.")],
    b: Annotated[str | None, typer.Argument(metavar="B", help=f"{_MODEL}.", show_default="A")] = None,
    text: Text = None,
    context: Context = 512,
    stride: Stride = None,
    limit_tokens: LimitTokens = None,
    dtype: Dtype = None,
    device: Device = None,
    kernels: Kernels = None,
    config: ConfigFile = None,
    settings: Settings = None,
    dtype_b: Annotated[str | None, typer.Option(help="--dtype of B.", show_default=AS_A)] = None,
    kernels_b: Annotated[str | None, typer.Option(help="--kernels of B.", show_default=AS_A)] = None,
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

    Options are those of A; B has the same but for its own (--dtype-b, --set-b, …). One model is in memory at a time.

    moe-ray compare demo --dtype float32 --dtype-b bfloat16
    """
    from moe_ray.commands.cache import with_usable_cache
    from moe_ray.commands.quality_report import comparison_json, print_comparison
    from moe_ray.config import load_config
    from moe_ray.console import loading_bars
    from moe_ray.hub import resolve_model
    from moe_ray.quality.compare import compare as measure
    from moe_ray.quality.scorer import Scorer
    from moe_ray.quality.spool import spool_dtype
    from moe_ray.quality.text import read_text
    from moe_ray.quality.windows import check_windows
    from moe_ray.text.tokenizer import Tokenizer

    stride = stride or context
    check_windows(context, stride)
    kept_as = spool_dtype(spool)
    words = read_text(text)
    flags_a = {"path": a, "dtype": dtype, "device": device, "kernels": kernels}
    flags_b = {"path": b or a, "dtype": dtype_b or dtype, "device": device, "kernels": kernels_b or kernels}
    both = list(settings or ())
    tree_a = with_settings({"model": flags_a}, both)
    tree_b = with_settings(with_settings({"model": flags_b}, both), settings_b or (), "--set-b")
    chosen_a = with_usable_cache(load_config(tree_a, config), error_console())
    chosen_b = with_usable_cache(load_config(tree_b, config_b or config), error_console())
    computed_by: list[str] = []
    with loading_bars(error_console()) as progress:
        directories = [resolve_model(chosen, progress) for chosen in (chosen_a, chosen_b)]
        tokenizer, other = map(Tokenizer, directories)
        token_ids = tokenizer.encode(words)[:limit_tokens]
        if other.vocab_size != tokenizer.vocab_size or other.encode(words)[:limit_tokens] != token_ids:
            raise ConfigError(f"{a} and {b} have other tokenizers: their predictions cannot be compared")

        def load(which: str, chosen: Config, directory: Path) -> Scorer:
            scorer = Scorer(chosen, directory, context, _named(progress, which))
            computed_by.append(str(scorer.compute.backend))
            return scorer

        measured = measure(
            lambda: load("A", chosen_a, directories[0]),
            lambda: load("B", chosen_b, directories[1]),
            token_ids,
            context,
            stride,
            kept_as,
            lambda which, done, total: progress(f"{which} windows", done, total),
        )
    said = ((chosen_a.served_name, chosen_b.served_name), tuple(computed_by), len(token_ids), context, stride)
    if json_output:
        print(comparison_json(measured, *said, tokenizer.token_to_str))
    else:
        print_comparison(output_console(), measured, *said, tokenizer.token_to_str)


def _named(progress: Report, which: str) -> Report:
    """`progress` of what is loaded for one of the two."""
    return lambda what, done, total: progress(f"{which} {what}", done, total)
