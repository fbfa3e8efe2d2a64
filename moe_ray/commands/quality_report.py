"""What `moe-ray perplexity` and `moe-ray compare` print."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ray.model.compute.resolve import Backend
from moe_ray.quality.comparison import Comparison
from moe_ray.quality.perplexity import Perplexity

TokenText = Callable[[int], str]
"""The text of one token."""


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


def print_comparison(
    console: Console,
    measured: Comparison,
    names: tuple[str, str],
    computed_by: tuple[str, ...],
    tokens: int,
    context: int,
    stride: int,
    token_text: TokenText,
) -> None:
    """Print both perplexities and what lies between the two models."""
    for which, name, how in zip("AB", names, computed_by, strict=True):
        console.print(f"{which}  [bold]{escape(name)}[/]  {how}", soft_wrap=True)
    a, b, ratio, kl, top = measured.a.value, measured.b.value, measured.ratio, measured.mean_kl, measured.top_agreement
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("perplexity", f"A {a.mean:.4f} ± {a.error:.4f}   B {b.mean:.4f} ± {b.error:.4f}")
    table.add_row("B / A", f"[bold]{ratio.mean:.5f}[/] ± {ratio.error:.5f}")
    table.add_row(
        "KL(A || B)",
        f"[bold]{kl.mean:.6f}[/] ± {kl.error:.6f} nats a token, "
        f"p99 {np.quantile(measured.kl, 0.99):.5f}, max {measured.kl.max():.4f}",
    )
    table.add_row("most likely token", f"the same for [bold]{100 * top.mean:.2f} %[/] ± {100 * top.error:.2f}")
    if measured.routing is None:
        table.add_row("routing", "other layers or experts: not compared")
    else:
        layers = measured.routing
        worst = min(range(len(layers)), key=lambda layer: layers[layer].same_experts)
        table.add_row(
            "routing",
            f"same experts for {100 * float(np.mean([x.same_experts for x in layers])):.2f} % of (token, k), "
            f"least {100 * layers[worst].same_experts:.2f} % in layer {worst}; "
            f"weights apart by {float(np.mean([x.weight_difference for x in layers])):.4f}",
        )
    console.print(table, soft_wrap=True)
    if measured.differences:
        console.print("first differences of the most likely token", style="dim")
    for found in measured.differences:
        console.print(
            f"  token {found.position}: A {token_text(found.token_a)!r} {found.probability_a:.3f}, "
            f"B {token_text(found.token_b)!r} {found.probability_b:.3f}",
            markup=False,
            soft_wrap=True,
        )
    console.print(
        f"{len(measured.kl):,} of {tokens:,} tokens scored, windows of {context}, stride {stride}; "
        f"A {measured.a.tokens_per_s:,.0f}, B {measured.b.tokens_per_s:,.0f} tokens/s",
        style="dim",
        soft_wrap=True,
    )


def comparison_json(
    measured: Comparison,
    names: tuple[str, str],
    computed_by: tuple[str, ...],
    tokens: int,
    context: int,
    stride: int,
    token_text: TokenText,
) -> str:
    """The same as one JSON object, with the routing of every layer."""
    ratio, kl, top = measured.ratio, measured.mean_kl, measured.top_agreement
    sides = zip(names, computed_by, (measured.a, measured.b), strict=True)
    a, b = (
        {"model": name, "computed_by": how, **_likelihood(side), "tokens_per_s": side.tokens_per_s}
        for name, how, side in sides
    )
    routing = measured.routing
    return json.dumps(
        {
            "a": a,
            "b": b,
            "tokens": tokens,
            "scored": len(measured.kl),
            "context": context,
            "stride": stride,
            "perplexity_ratio": ratio.mean,
            "perplexity_ratio_error": ratio.error,
            "kl_mean": kl.mean,
            "kl_error": kl.error,
            "kl_p99": float(np.quantile(measured.kl, 0.99)),
            "kl_max": float(measured.kl.max()),
            "same_top_token": top.mean,
            "same_top_token_error": top.error,
            "routing": None
            if routing is None
            else [
                {"layer": i, "same_experts": layer.same_experts, "weight_difference": layer.weight_difference}
                for i, layer in enumerate(routing)
            ],
            "first_differences": [
                {
                    "position": found.position,
                    "token_a": found.token_a,
                    "text_a": token_text(found.token_a),
                    "probability_a": found.probability_a,
                    "token_b": found.token_b,
                    "text_b": token_text(found.token_b),
                    "probability_b": found.probability_b,
                }
                for found in measured.differences
            ],
        },
        indent=1,
    )
