"""`moe-ray chat`: the flags of a conversation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ray.commands.completion import sampling_settings
from moe_ray.commands.options import DEFAULT_URL, Url, error_console, output_console

if TYPE_CHECKING:
    from pathlib import Path

    from moe_ray.config import Config


def chat(
    question: Annotated[
        list[str] | None,
        typer.Argument(help="Ask this and end; `-` stands for standard input. Without: a conversation."),
    ] = None,
    url: Url = DEFAULT_URL,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model name.", show_default="the served one")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="the model's, or 0.7")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", show_default="512")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any sampling parameter; may be repeated.",
            autocompletion=sampling_settings,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="OPENAI_API_KEY",
            help="Where the server asks for one.",
            show_default="for a server of this machine: the first of gateway.api_keys",
        ),
    ] = None,
    history: Annotated[bool, typer.Option(help="Keep what is typed, for the next conversation.")] = True,
    plain: Annotated[bool, typer.Option("--plain", help="Show answers as they are, not as Markdown.")] = False,
) -> None:
    """Talk to a running server in this terminal, or ask it one question."""
    from moe_ray.commands.chat_loop import ChatOptions, chat_loop
    from moe_ray.commands.server_client import own_key
    from moe_ray.config import load_config

    config = load_config()
    text = "\n".join(sys.stdin.read() if part == "-" else part for part in question) if question else None
    flags = {"temperature": temperature, "max_tokens": max_tokens}
    options = ChatOptions(
        url=url,
        model=model,
        system=system,
        settings=[*(settings or []), *(f"{name}={value}" for name, value in flags.items() if value is not None)],
        api_key=api_key or own_key(config, url),
        history=_history(config) if history and sys.stdin.isatty() else None,
        plain=plain,
    )
    if not chat_loop(options, text, output_console(), error_console()):
        raise typer.Exit(1)


def _history(config: Config) -> Path | None:
    """Where typed lines are kept; None where nothing can be written."""
    from moe_ray.deploy.places import usable_cache
    from moe_ray.errors import ConfigError

    try:
        return usable_cache(config.cache_dir) / "chat_history"
    except ConfigError:
        return None
