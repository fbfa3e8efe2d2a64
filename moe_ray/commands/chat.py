"""`moe-ray chat`: the flags of a conversation."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_ray.commands.options import DEFAULT_URL, MaxTokens, Temperature, Url, error_console


def chat(
    url: Url = DEFAULT_URL,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model name.", show_default="the served one")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 512,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Where the server asks for one.", show_default=False)
    ] = None,
) -> None:
    """Talk to a running server in this terminal."""
    from moe_ray.commands.chat_loop import chat_loop

    chat_loop(url, model, system, temperature, max_tokens, error_console(), api_key)
