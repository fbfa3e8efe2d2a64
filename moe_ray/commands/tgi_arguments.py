"""The flags of `text-generation-launcher`, by TGI's names and defaults; each is an environment variable, too."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_ray.errors import ConfigError

Quantizations = Literal[
    "awq",
    "compressed-tensors",
    "eetq",
    "exl2",
    "gptq",
    "marlin",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "fp8",
]
PORT: Final = 3000


class TgiArguments(BaseModel):
    """What the launcher was told. The field `max_total_tokens` is `--max-total-tokens` and MAX_TOTAL_TOKENS."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str | None = None
    revision: str | None = None
    validation_workers: int | None = None
    sharded: bool | None = None
    num_shard: int | None = Field(default=None, ge=1)
    quantize: Quantizations | None = None
    speculate: int | None = Field(default=None, ge=0)
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    kv_cache_dtype: Literal["auto", "int8", "fp8_e4m3fn", "fp8_e5m2"] | None = None
    trust_remote_code: bool = False
    max_concurrent_requests: int = Field(default=128, ge=1)
    max_best_of: int | None = None
    max_stop_sequences: int | None = None
    max_top_n_tokens: int | None = None
    max_input_tokens: int | None = None
    max_input_length: int | None = None
    max_total_tokens: int | None = None
    waiting_served_ratio: float | None = None
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_waiting_tokens: int | None = None
    max_batch_size: int | None = Field(default=None, ge=1)
    cuda_graphs: str | None = None
    hostname: str | None = None
    port: int = Field(default=PORT, ge=1, le=65535)
    prometheus_port: int | None = None
    shard_uds_path: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    huggingface_hub_cache: str | None = None
    weights_cache_override: str | None = None
    disable_custom_kernels: bool = False
    cuda_memory_fraction: float | None = None
    rope_scaling: Literal["linear", "dynamic"] | None = None
    rope_factor: float | None = None
    json_output: bool = False
    otlp_endpoint: str | None = None
    otlp_service_name: str | None = None
    cors_allow_origin: tuple[str, ...] = ()
    api_key: str | None = Field(default=None, repr=False)
    watermark_gamma: float | None = None
    watermark_delta: float | None = None
    ngrok: bool = False
    ngrok_authtoken: str | None = Field(default=None, repr=False)
    ngrok_edge: str | None = None
    tokenizer_config_path: str | None = None
    disable_grammar_support: bool = False
    env: bool = False
    max_client_batch_size: int | None = None
    lora_adapters: str | None = None
    usage_stats: Literal["on", "off", "no-stack"] | None = None
    payload_limit: int | None = None
    enable_prefill_logprobs: bool = False
    graceful_termination_timeout: int | None = None

    def lines(self) -> list[str]:
        """What TGI prints at its start: every argument, one a line; secrets are not shown."""
        shown = [f"    {name}: {self._shown(name)}," for name in type(self).model_fields]
        return ["Args {", *shown, "}"]

    def _shown(self, name: str) -> str:
        value = getattr(self, name)
        if value is not None and not type(self).model_fields[name].repr:
            return "Some(***)"
        return repr(value)


SHORT: Final = {"-p": "port", "-e": "env"}
REPEATED: Final = "cors_allow_origin"
SWITCHES: Final = frozenset(name for name, field in TgiArguments.model_fields.items() if field.default is False)
"""Flags without a value."""
NO_VARIABLES: Final = frozenset({"env"})
"""Flags that are no environment variable."""


def parse_arguments(words: Sequence[str], environ: Mapping[str, str]) -> TgiArguments:
    """What the words behind the command say, then the variables. Raises `ConfigError` naming the flag or variable.

    An empty variable counts as one that is not there.
    """
    given = {
        name: value
        for name in TgiArguments.model_fields
        if name not in NO_VARIABLES and (value := environ.get(name.upper(), ""))
    }
    from_flags = _flags(words)
    merged: dict[str, Any] = {**given, **from_flags}
    if isinstance(merged.get(REPEATED), str):
        merged[REPEATED] = (merged[REPEATED],)
    try:
        return TgiArguments.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("; ".join(_fault(fault, from_flags) for fault in error.errors())) from None


def flag_of(name: str) -> str:
    """A field as a flag."""
    return "--" + name.replace("_", "-")


def _flags(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        name = SHORT.get(word) or word.removeprefix("--").replace("-", "_")
        if name not in TgiArguments.model_fields or word not in (flag_of(name), *SHORT):
            raise ConfigError(_unknown(word))
        if name in SWITCHES and not equals:
            found[name] = True
            continue
        if not equals and (not rest or rest[0].startswith("--")):
            raise ConfigError(f"{word}: a value is missing")
        text = value if equals else rest.pop(0)
        found[name] = (*found.get(name, ()), text) if name == REPEATED else text
    return found


def _unknown(word: str) -> str:
    known = [flag_of(name) for name in TgiArguments.model_fields]
    nearest = difflib.get_close_matches("--" + word.lstrip("-").replace("_", "-"), known, 1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"text-generation-launcher has no {word}{hint}"


def _fault(fault: Mapping[str, Any], from_flags: Mapping[str, Any]) -> str:
    name = str(fault["loc"][0])
    where = flag_of(name) if name in from_flags else f"{name.upper()} in the environment"
    return f"{where}: {fault['msg']}, got {fault['input']!r}"
