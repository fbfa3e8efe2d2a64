"""What `moe-ray perplexity` and `moe-ray compare` print."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ray.quality.comparison import Comparison
from moe_ray.quality.perplexity import Perplexity
from moe_ray.quality.windows import Passage

TokenText = Callable[[int], str]
"""The text of one token."""


def print_perplexity(console: Console, measured: Perplexity, name: str, passage: Passage) -> None:
    """Print perplexity and its standard error in three lines."""
    value, loss = measured.value, measured.loss
    _print_model(console, name, measured)
    console.print(
        f"perplexity [bold]{value.mean:.4f}[/] ± {value.error:.4f}  "
        f"(loss {loss.mean:.5f} ± {loss.error:.5f} nats a token)",
        soft_wrap=True,
    )
    _print_windows(console, len(measured.losses), passage, f"{measured.tokens_per_s:,.0f}")


def perplexity_json(measured: Perplexity, name: str, passage: Passage) -> str:
    """The same as one JSON object."""
    return json.dumps({**_model(name, measured), **_windows(len(measured.losses), passage)}, indent=1)


def _print_model(console: Console, name: str, measured: Perplexity) -> None:
    console.print(f"[bold]{escape(name)}[/]  {measured.backend}", soft_wrap=True)


def _model(name: str, measured: Perplexity) -> dict[str, str | float]:
    value, loss = measured.value, measured.loss
    return {
        "model": name,
        "computed_by": str(measured.backend),
        "perplexity": value.mean,
        "perplexity_error": value.error,
        "loss": loss.mean,
        "loss_error": loss.error,
        "tokens_per_s": measured.tokens_per_s,
    }


def _print_windows(console: Console, scored: int, passage: Passage, speed: str) -> None:
    """Print what was scored; `speed` is in tokens a second."""
    console.print(
        f"{scored:,} of {len(passage.token_ids):,} tokens scored, windows of {passage.context}, "
        f"stride {passage.stride}; {speed} tokens/s",
        style="dim",
        soft_wrap=True,
    )


def _windows(scored: int, passage: Passage) -> dict[str, int]:
    return {
        "tokens": len(passage.token_ids),
        "scored": scored,
        "context": passage.context,
        "stride": passage.stride,
    }


def print_comparison(
    console: Console, measured: Comparison, names: tuple[str, str], passage: Passage, token_text: TokenText
) -> None:
    """Print both perplexities and what lies between the two models."""
    for which, name, side in zip("AB", names, (measured.a, measured.b), strict=True):
        console.print(which, end="  ")
        _print_model(console, name, side)
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
        worst = min(layers, key=lambda layer: layer.same_experts)
        table.add_row(
            "routing",
            f"same experts for {100 * float(np.mean([x.same_experts for x in layers])):.2f} % of (token, k), "
            f"least {100 * worst.same_experts:.2f} % in layer {worst.layer}; "
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
    speed = f"A {measured.a.tokens_per_s:,.0f}, B {measured.b.tokens_per_s:,.0f}"
    _print_windows(console, len(measured.kl), passage, speed)


def comparison_json(measured: Comparison, names: tuple[str, str], passage: Passage, token_text: TokenText) -> str:
    """The same as one JSON object, with the routing of every layer."""
    ratio, kl, top = measured.ratio, measured.mean_kl, measured.top_agreement
    routing = measured.routing
    return json.dumps(
        {
            "a": _model(names[0], measured.a),
            "b": _model(names[1], measured.b),
            **_windows(len(measured.kl), passage),
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
                {"layer": of.layer, "same_experts": of.same_experts, "weight_difference": of.weight_difference}
                for of in routing
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
