"""Command-line options that several verbs declare, the consoles that they print to, and the parsing of lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moe_ray.commands.completion import models, one_of
from moe_ray.errors import ConfigError

DEFAULT_PORT = 8000
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"
MODEL_HELP = "A directory, a Hugging Face repo id, or `demo`."

Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, autocompletion=models)]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with the tree of moe_ray.config.Config; flags win over it.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="auto, float32, bfloat16 or float16.",
        show_default="auto",
        autocompletion=one_of("auto", "float32", "bfloat16", "float16"),
    ),
]
Variant = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        metavar="NAME=PATH",
        help="A further model, under this name, on the same experts: what is equal of theirs is held once. May be "
        "repeated.",
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        help="A small dense model that guesses tokens: a directory, a repo id, or `demo`.",
        show_default="none",
        autocompletion=models,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu or cuda.", show_default="auto", autocompletion=one_of("auto", "cpu", "cuda")),
]
Kernels = Annotated[
    str | None, typer.Option(help="auto, native, torch, or an instruction set such as avx2.", show_default="auto")
]
_quantizations = one_of("int8", "int4", "nf4")
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Experts to int8, int4 or nf4 on load.",
        show_default="as in the checkpoint",
        autocompletion=_quantizations,
    ),
]
QuantizeTrunk = Annotated[
    str | None,
    typer.Option(
        help="The trunk to int8, int4 or nf4 on load.",
        show_default="as in the checkpoint",
        autocompletion=_quantizations,
    ),
]
CpuOffload = Annotated[
    float | None,
    typer.Option(
        "--cpu-offload-gib",
        help="GiB of each expert actor's weights that stay in the host's memory and are copied to its card for a call.",
        show_default="0",
    ),
]
KvCacheDtype = Annotated[
    str | None, typer.Option(help="auto, int8 or fp8: half of bfloat16's memory for the KV cache.", show_default="auto")
]
EnforceEager = Annotated[
    bool | None,
    typer.Option("--enforce-eager", help="On a card, no CUDA graphs: slower, with less memory.", show_default="graphs"),
]
LoadFormat = Annotated[
    str | None,
    typer.Option(
        help="auto, or dummy: random weights, of which a config.json is enough.",
        show_default="auto",
        autocompletion=one_of("auto", "dummy"),
    ),
]
HfOverrides = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='Other values of the model\'s config.json, as in {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}.',
        show_default="none",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration; may be repeated.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt plus output.", show_default="the model's")]
LogLevel = Annotated[
    str | None,
    typer.Option(
        help="debug, info, warning or error.",
        show_default="info",
        autocompletion=one_of("debug", "info", "warning", "error"),
    ),
]
LogFormat = Annotated[str | None, typer.Option(help="text, or json: one object a line.", show_default="text")]
Url = Annotated[str, typer.Option(help="Base URL of a running server.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RayAddress = Annotated[str, typer.Option(help="Ray cluster: host:port as `moe-ray serve` prints it, or `auto`.")]


def error_console() -> Console:
    """A console on standard error: progress, messages and errors. Results go to standard output."""
    return Console(stderr=True, highlight=False)


def output_console() -> Console:
    """A console on standard output, for results."""
    return Console(highlight=False)


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """The positive numbers of a comma-separated list, each once. Raises `ConfigError` naming `flag`."""
    try:
        found = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"{flag}: expected numbers from 1, as in 1,8,32, got {text!r}")
    return found


def names(text: str) -> tuple[str, ...]:
    """The words of a comma-separated list, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def json_object(text: str, flag: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises `ConfigError` naming `flag`."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag}: expected a JSON object, got {text!r}")
    return value


def with_settings(flags: Mapping[str, Any], settings: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """`flags`, a nested mapping, with `KEY=VALUE` of the configuration set in it; values are YAML, as in its file.

    Raises `ConfigError` naming `flag`.

    >>> with_settings({"model": {"dtype": "float32"}}, ["model.kernels=torch"])
    {'model': {'dtype': 'float32', 'kernels': 'torch'}}
    """
    import yaml

    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in flags.items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise ConfigError(f"{flag}: expected KEY=VALUE, as in model.kernels=torch, got {setting!r}")
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{flag}: {setting!r}: {part} is no section")
        try:
            section[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{flag}: {setting!r}: the value is no YAML") from None
    return tree
