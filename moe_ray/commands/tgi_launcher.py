"""The `text-generation-launcher` command: TGI's flags and variables, served by moe_ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console

from moe_ray.commands.command_line import run_command
from moe_ray.commands.options import error_console
from moe_ray.commands.tgi_arguments import SWITCHES, TgiArguments, flag_of, parse_arguments
from moe_ray.commands.tgi_mapping import KEYS, NOTES, REFUSED, Mapped, experts_per_actor, mapped

DEMO_NOTE: Final = "--model-id is not given: serving the demo model"


def main() -> None:
    """Run the command line; a known error is one line and ends with status 1."""
    run_command(lambda: launch(sys.argv[1:]))


def launch(words: list[str]) -> None:
    """Serve as the words behind the command and the environment say, until Ctrl-C."""
    if {"--help", "-h"} & set(words):
        print("\n".join(_help()))
        return
    if {"--version", "-V"} & set(words):
        from moe_ray.commands.version import version

        version()
        return
    arguments = parse_arguments(words, os.environ)
    what = mapped(arguments, os.environ)
    console = error_console()
    notes = (DEMO_NOTE, *what.notes) if arguments.model_id is None else what.notes
    for line in (*arguments.lines(), *notes):
        console.print(line, markup=False, soft_wrap=True)
    _tell_hub(arguments)

    from moe_ray.deploy.local_ray import prepare_local_ray

    prepare_local_ray()
    from moe_ray.commands.launch import LaunchOptions, run
    from moe_ray.config import load_config

    flags, said = _with_shards(what, console)
    for line in said:
        console.print(line, markup=False, soft_wrap=True)
    run(load_config(flags), LaunchOptions(what.host, what.port, None, "auto", dashboard=True), console)


def _tell_hub(arguments: TgiArguments) -> None:
    """Set what the Hub's library reads, before it is loaded; the actors inherit it."""
    if arguments.huggingface_hub_cache is not None:
        os.environ["HF_HUB_CACHE"] = arguments.huggingface_hub_cache
    if token := os.environ.get("HF_API_TOKEN"):  # TGI's older name
        os.environ.setdefault("HF_TOKEN", token)


def _with_shards(what: Mapped, console: Console) -> tuple[Mapping[str, Any], list[str]]:
    """The flags with the experts spread over `--num-shard` actors, and what that comes to, in words."""
    if what.shards is None:
        return what.flags, []
    from moe_ray.config import load_config
    from moe_ray.console import loading_bars
    from moe_ray.hub import resolve_config
    from moe_ray.model.model_config import ModelConfig

    with loading_bars(console) as progress:
        where = resolve_config(load_config(what.flags), progress)
    model = ModelConfig.read(where) if where.is_file() else ModelConfig.load(where)
    each = experts_per_actor(model.num_local_experts, what.shards)
    actors = -(-model.num_local_experts // each)
    said = (
        f"--num-shard {what.shards}: {model.num_local_experts} experts in {actors} actors of up to {each}, beside the "
        "trunk; without it each expert has an actor of its own"
    )
    return {**what.flags, "experts": {**what.flags["experts"], "experts_per_actor": each}}, [said]


def _help() -> list[str]:
    lines = [
        "Usage: text-generation-launcher [FLAGS]",
        "",
        "Serves a model as `moe-ray serve` does, told by TGI's flags. Each is an environment variable, too:",
        "--max-total-tokens is MAX_TOTAL_TOKENS. docs/from-tgi.md says what each becomes.",
        "",
    ]
    for name in TgiArguments.model_fields:
        lines.append(f"  {flag_of(name) + ('' if name in SWITCHES else ' …'):36}{meaning_of(name)}")
    return lines


def meaning_of(name: str) -> str:
    """What an argument is here, in one line."""
    if name in REFUSED:
        return f"not supported: {REFUSED[name]}"
    return f"no meaning here: {NOTES[name]}" if name in NOTES else KEYS[name]
