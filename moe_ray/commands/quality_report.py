"""What `moe-ray perplexity` and `moe-ray compare` print."""

from __future__ import annotations

import json

from rich.console import Console

from moe_ray.model.compute.resolve import Backend
from moe_ray.quality.perplexity import Perplexity


def print_perplexity(
    console: Console, measured: Perplexity, name: str, backend: Backend, tokens: int, context: int, stride: int
) -> None:
    """Print perplexity and its standard error in two lines."""
    value, loss = measured.value, measured.loss
    console.print(f"[bold]{name}[/]  {backend}", soft_wrap=True)
    console.print(
        f"perplexity [bold]{value.mean:.4f}[/] ± {value.error:.4f}  "
        f"(loss {loss.mean:.5f} ± {loss.error:.5f} nats a token)",
        soft_wrap=True,
    )
    console.print(
        f"{len(measured.losses):,} of {tokens:,} tokens scored, windows of {context}, stride {stride}; "
        f"{measured.tokens_per_s:,.0f} tokens/s",
        style="dim",
        soft_wrap=True,
    )


def perplexity_json(measured: Perplexity, name: str, backend: Backend, tokens: int, context: int, stride: int) -> str:
    """The same as one JSON object."""
    return json.dumps(
        {
            "model": name,
            "computed_by": str(backend),
            "tokens": tokens,
            "scored": len(measured.losses),
            "context": context,
            "stride": stride,
            **_likelihood(measured),
            "tokens_per_s": measured.tokens_per_s,
        },
        indent=1,
    )


def _likelihood(measured: Perplexity) -> dict[str, float]:
    value, loss = measured.value, measured.loss
    return {
        "perplexity": value.mean,
        "perplexity_error": value.error,
        "loss": loss.mean,
        "loss_error": loss.error,
    }
