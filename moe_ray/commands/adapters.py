"""`moe-ray adapters`: what LoRA adapters a running server has, and changes of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ray.commands.options import DEFAULT_URL, Url, output_console

if TYPE_CHECKING:
    from moe_ray.commands.server_client import ServerClient

ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="OPENAI_API_KEY",
        help="Where the server asks for one.",
        show_default="for a server of this machine: the first of gateway.api_keys",
    ),
]
Name = Annotated[str, typer.Argument(help="By which clients ask for the adapter, as `model`.")]


def list_adapters(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List the adapters that a server has."""
    from rich.table import Table

    with _client(url, api_key) as client:
        found = [entry for entry in client.model_entries() if entry.get("parent")]
    console = output_console()
    if not found:
        console.print("no adapters")
        return
    table = Table("adapter", "of model", "source", box=None)
    for entry in found:
        table.add_row(*(str(entry.get(key)) for key in ("id", "parent", "root")))
    console.print(table)


def load_adapter(
    name: Name,
    source: Annotated[str, typer.Argument(help="Its directory, which every node has, or its Hugging Face repo id.")],
    replace: Annotated[bool, typer.Option(help="Take the place of the adapter that has the name.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Serve one more adapter, from now on; the server needs `adapters.runtime_loading: true`."""
    path = os.path.abspath(source) if Path(source).is_dir() else source
    body = {"lora_name": name, "lora_path": path, "load_inplace": replace}
    with _client(url, api_key) as client:
        output_console().print(client.post("/v1/load_lora_adapter", body), highlight=False)


def unload_adapter(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Serve an adapter no longer; requests that have it go on."""
    with _client(url, api_key) as client:
        output_console().print(client.post("/v1/unload_lora_adapter", {"lora_name": name}), highlight=False)


def _client(url: str, api_key: str | None) -> ServerClient:
    from moe_ray.commands.server_client import ServerClient, own_key
    from moe_ray.config import load_config

    return ServerClient(url, api_key or own_key(load_config(), url))
