"""What each argument of `text-generation-launcher` becomes here: a key of the configuration, a note, or a refusal."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from moe_ray.commands.adapter_option import named_sources
from moe_ray.commands.tgi_arguments import TgiArguments, flag_of
from moe_ray.errors import ConfigError

KEYS: Final[dict[str, str]] = {
    "model_id": "model.path",
    "revision": "model.revision",
    "sharded": "false: as --num-shard 1",
    "num_shard": "experts.experts_per_actor, so that there are so many expert actors",
    "quantize": "experts.quantize and trunk.quantize, or what the checkpoint has",
    "speculate": "engine.speculative and engine.num_speculative_tokens",
    "dtype": "model.dtype",
    "cuda_graphs": "model.enforce_eager where it is 0; other sizes are recorded as they come",
    "kv_cache_dtype": "engine.kv_cache_dtype: auto, int8, or fp8 for fp8_e4m3fn",
    "max_concurrent_requests": "engine.max_num_seqs and engine.max_waiting together; 429 beyond",
    "max_best_of": "gateway.tgi.max_best_of",
    "max_stop_sequences": "gateway.tgi.max_stop_sequences",
    "max_top_n_tokens": "gateway.tgi.max_top_n_tokens",
    "max_input_tokens": "gateway.tgi.max_input_tokens",
    "max_input_length": "gateway.tgi.max_input_tokens",
    "max_total_tokens": "model.max_model_len",
    "max_batch_prefill_tokens": "engine.max_num_batched_tokens",
    "max_batch_total_tokens": "engine.kv_cache_tokens: at most so many, where memory allows",
    "max_batch_size": "engine.max_num_seqs",
    "hostname": "the address to bind; 127.0.0.1 unless given",
    "port": "the port; 3000 unless given",
    "huggingface_hub_cache": "the Hub's cache",
    "cors_allow_origin": "gateway.cors_origins; may be repeated",
    "api_key": "gateway.api_keys",
    "disable_grammar_support": "gateway.tgi.grammars",
    "payload_limit": "gateway.tgi.payload_limit_bytes",
    "graceful_termination_timeout": "trunk.drain_s",
    "json_output": "log_format: json",
    "otlp_endpoint": "tracing.otlp_endpoint",
    "lora_adapters": "adapters.modules: NAME=PATH, or PATH, which is its own name; several separated by commas",
}
"""Arguments that count → what they become."""
NOTES: Final[dict[str, str]] = {
    "validation_workers": "bodies are validated by the gateway; gateway.num_replicas is the number of those",
    "waiting_served_ratio": "prompts are computed in chunks beside running sequences; none of these waits for them",
    "max_waiting_tokens": "prompts are computed in chunks beside running sequences; none of these waits for them",
    "prometheus_port": "metrics are on the port of the API",
    "shard_uds_path": "actors find each other through Ray",
    "master_addr": "actors find each other through Ray",
    "master_port": "actors find each other through Ray",
    "disable_custom_kernels": "the environment variable MOE_RAY_MODEL__KERNELS=torch does that",
    "cuda_memory_fraction": "engine.kv_cache_gib says how much memory the KV cache takes",
    "otlp_service_name": "spans name the part of the model that they are of",
    "watermark_gamma": "there are no watermarks; requests for one are refused",
    "watermark_delta": "there are no watermarks; requests for one are refused",
    "env": "moe-ray version tells the versions",
    "max_client_batch_size": "a request may have up to 4096 prompts times choices",
    "usage_stats": "nothing is ever sent to anybody",
    "enable_prefill_logprobs": "they are always enabled",
}
"""Arguments that are accepted and change nothing → why."""
REFUSED: Final[dict[str, str]] = {
    "trust_remote_code": "no code of a model's repository is ever run",
    "rope_scaling": "write rope_scaling into the model's config.json",
    "rope_factor": "write rope_scaling into the model's config.json",
    "ngrok": "no tunnel is opened; run one beside this server",
    "ngrok_authtoken": "no tunnel is opened; run one beside this server",
    "ngrok_edge": "no tunnel is opened; run one beside this server",
    "tokenizer_config_path": "put the tokenizer_config.json with its chat_template into the model's directory",
    "weights_cache_override": "give the directory of the weights as --model-id",
}
"""Arguments that would change answers or reach, and cannot be had → what to do instead."""
QUANTIZE_ON_LOAD: Final = {"bitsandbytes": "int8", "eetq": "int8", "bitsandbytes-nf4": "nf4"}
READ_FROM_CHECKPOINT: Final = ("awq", "gptq", "compressed-tensors")
QUANTIZE_INSTEAD: Final = {
    "exl2": "no EXL2 checkpoints are read; use one in GPTQ or AWQ",
    "marlin": "no Marlin checkpoints are read; use one in GPTQ or AWQ",
    "bitsandbytes-fp4": "use bitsandbytes-nf4, which loses less",
    "fp8": "a checkpoint in FP8 is read as it is, without this flag; to quantise one on load, use eetq (8 bits)",
}
MOST_IN_BATCH: Final = 64
"""Sequences that are computed together unless --max-batch-size says otherwise."""
DEFAULT_HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Mapped:
    """What the arguments come to."""

    flags: Mapping[str, Any]
    """Nested, as `load_config` takes them."""
    host: str
    port: int
    shards: int | None
    """Expert actors that are wanted; `experts_per_actor` turns them into a key once the model is known."""
    notes: tuple[str, ...]


def mapped(arguments: TgiArguments, environ: Mapping[str, str]) -> Mapped:
    """Turn arguments into configuration. Raises `ConfigError` naming what cannot be had, and what to use instead."""
    for name, instead in REFUSED.items():
        if _given(arguments, name):
            raise ConfigError(f"{flag_of(name)} is not supported: {instead}")
    notes = [f"{flag_of(name)} has no meaning here: {why}" for name, why in NOTES.items() if _given(arguments, name)]
    host, host_notes = _host(arguments, environ)
    on_load, quantize_notes = _quantize(arguments)
    shards = 1 if arguments.sharded is False else arguments.num_shard
    most = arguments.max_concurrent_requests
    batch = arguments.max_batch_size or (most if most < MOST_IN_BATCH else None)
    flags = {
        "model": {
            "path": arguments.model_id,
            "revision": arguments.revision,
            "dtype": arguments.dtype,
            "enforce_eager": True if arguments.cuda_graphs == "0" else None,
            "max_model_len": arguments.max_total_tokens,
        },
        "engine": {
            "max_num_seqs": batch,
            "max_waiting": max(most - (batch or MOST_IN_BATCH), 1),
            "max_num_batched_tokens": arguments.max_batch_prefill_tokens,
            "kv_cache_tokens": arguments.max_batch_total_tokens,
            "kv_cache_dtype": _kv_cache_dtype(arguments),
            **_speculation(arguments),
        },
        "adapters": {"modules": _adapters(arguments.lora_adapters)},
        "log_format": "json" if arguments.json_output else None,
        "tracing": {"otlp_endpoint": arguments.otlp_endpoint},
        "trunk": {"quantize": on_load, "drain_s": arguments.graceful_termination_timeout},
        "experts": {"quantize": on_load},
        "gateway": {
            # Serve's own limit answers 503: the engine's, which answers 429, must be met first.
            "max_ongoing_requests": max(512, 2 * most),
            "api_keys": None if arguments.api_key is None else (arguments.api_key,),
            "cors_origins": arguments.cors_allow_origin or None,
            "tgi": {
                "max_best_of": arguments.max_best_of,
                "max_stop_sequences": arguments.max_stop_sequences,
                "max_top_n_tokens": arguments.max_top_n_tokens,
                "max_input_tokens": _max_input_tokens(arguments),
                "payload_limit_bytes": arguments.payload_limit,
                "grammars": False if arguments.disable_grammar_support else None,
            },
        },
    }
    return Mapped(flags, host, arguments.port, shards, (*notes, *host_notes, *quantize_notes))


def experts_per_actor(num_local_experts: int, shards: int) -> int:
    """How many experts share an actor, so that there are `shards` actors of them, or as many as there are experts.

    >>> experts_per_actor(8, 2), experts_per_actor(8, 3), experts_per_actor(8, 16)
    (4, 3, 1)
    """
    return -(-num_local_experts // shards)


def _given(arguments: TgiArguments, name: str) -> bool:
    return getattr(arguments, name) not in (None, False)


def _host(arguments: TgiArguments, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Where to listen: HOSTNAME counts where it is an address, for containers set it to their name."""
    host = arguments.hostname or DEFAULT_HOST
    if arguments.hostname is None or arguments.hostname != environ.get("HOSTNAME") or _is_address(host):
        return host, []
    note = f"HOSTNAME={host} in the environment is this machine's name, not an address: listening on {DEFAULT_HOST}"
    return DEFAULT_HOST, [f"{note}; --hostname 0.0.0.0 listens everywhere"]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _quantize(arguments: TgiArguments) -> tuple[str | None, list[str]]:
    asked = arguments.quantize
    if asked is None:
        return None, []
    if asked in QUANTIZE_INSTEAD:
        raise ConfigError(f"--quantize {asked} is not supported: {QUANTIZE_INSTEAD[asked]}")
    if asked in READ_FROM_CHECKPOINT:
        return None, [f"--quantize {asked}: the format is read from the checkpoint"]
    return QUANTIZE_ON_LOAD[asked], [f"--quantize {asked}: weights are held as {QUANTIZE_ON_LOAD[asked]}"]


def _kv_cache_dtype(arguments: TgiArguments) -> str | None:
    asked = arguments.kv_cache_dtype
    if asked == "fp8_e5m2":
        raise ConfigError(f"--kv-cache-dtype {asked} is not supported: use fp8_e4m3fn, of the same size")
    return "fp8" if asked == "fp8_e4m3fn" else asked


def _speculation(arguments: TgiArguments) -> dict[str, Any]:
    if not arguments.speculate:
        return {}
    return {"speculative": "ngram", "num_speculative_tokens": arguments.speculate}


def _adapters(given: str | None) -> dict[str, str] | None:
    """TGI's list: NAME=PATH, or PATH, by which requests then ask for the adapter."""
    parts = [part.strip() for part in (given or "").split(",") if part.strip()]
    return named_sources([part if "=" in part else f"{part}={part}" for part in parts])


def _max_input_tokens(arguments: TgiArguments) -> int | None:
    most, total = arguments.max_input_tokens, arguments.max_total_tokens
    if most is not None and arguments.max_input_length is not None:
        raise ConfigError("--max-input-tokens and --max-input-length are one thing: give one of them")
    most = arguments.max_input_length if most is None else most
    if most is not None and total is not None and most >= total:
        raise ConfigError(f"--max-input-tokens must be < --max-total-tokens. Given: {most} and {total}")
    return most
