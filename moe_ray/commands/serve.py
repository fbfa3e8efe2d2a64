"""`moe-ray serve`: the flags of a server."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_ray.commands.completion import models, one_of
from moe_ray.commands.options import (
    DEFAULT_PORT,
    MODEL_HELP,
    ConfigFile,
    CpuOffload,
    Device,
    DraftModel,
    Dtype,
    EnforceEager,
    HfOverrides,
    KvCacheDtype,
    LoadFormat,
    LogFormat,
    LogLevel,
    MaxModelLen,
    Quantize,
    QuantizeTrunk,
    Variant,
    error_console,
)


def serve(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help=MODEL_HELP, show_default="demo", autocompletion=models),
    ] = None,
    config: ConfigFile = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.", min=1, max=65535)] = DEFAULT_PORT,
    transport: Annotated[
        str | None,
        typer.Option(
            help="auto, socket, grpc, ray or local.",
            show_default="auto",
            autocompletion=one_of("auto", "socket", "grpc", "ray", "local"),
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    quantize_trunk: QuantizeTrunk = None,
    kv_cache_dtype: KvCacheDtype = None,
    cpu_offload_gib: CpuOffload = None,
    max_model_len: MaxModelLen = None,
    hf_overrides: HfOverrides = None,
    load_format: LoadFormat = None,
    enforce_eager: EnforceEager = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences computed together.", show_default="64")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens per step.", show_default="512")] = None,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="Memory of the KV cache.", show_default="from free memory")
    ] = None,
    kv_swap_gib: Annotated[
        float | None,
        typer.Option(help="Host memory that takes KV blocks which the cache gives up.", show_default="0: none"),
    ] = None,
    kv_disk_dir: Annotated[
        str | None,
        typer.Option(help="Absolute path of a directory that keeps KV blocks over restarts.", show_default="none"),
    ] = None,
    kv_disk_gib: Annotated[
        float | None, typer.Option(help="Most that the files in --kv-disk-dir take together.", show_default="16")
    ] = None,
    micro_batches: Annotated[
        str | None,
        typer.Option(help="Parts of a step that compute and wait for experts in turns: a number.", show_default="auto"),
    ] = None,
    speculative: Annotated[
        str | None,
        typer.Option(
            help="ngram: guess tokens from what stood before. draft: by --draft-model. auto: by what pays. Or off.",
            show_default="off; auto with --draft-model",
            autocompletion=one_of("off", "ngram", "draft", "auto"),
        ),
    ] = None,
    draft_model: DraftModel = None,
    draft_quantize: Annotated[
        str | None,
        typer.Option(help="The draft model to int8, int4 or nf4 on load.", show_default="as in its checkpoint"),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(help="Most guesses per sequence and step.", show_default="4")
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="The name that clients use. Given again: another that they may use, `*` in it is anything.",
            show_default="last part of --model",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "--lora-modules",
            metavar="NAME=PATH",
            help="Serve a LoRA adapter (PEFT) under this name: of a directory or a Hugging Face repo. May be repeated.",
        ),
    ] = None,
    variant: Variant = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            help="How the model writes tool calls: hermes, mistral, llama3_json or json.", show_default="auto"
        ),
    ] = None,
    expert_deadline: Annotated[
        float | None,
        typer.Option(help="Seconds that a request waits for an expert without a replica, then 503.", show_default="60"),
    ] = None,
    on_expert_loss: Annotated[
        str | None,
        typer.Option(
            help="wait; fail: 503 at once; renormalise: go on with the other experts, and say so.", show_default="wait"
        ),
    ] = None,
    recorded_load: Annotated[
        str | None,
        typer.Option(
            help="The JSON of GET /experts of an earlier run: hot experts get replicas on cards that remain.",
            show_default="none",
        ),
    ] = None,
    page_control: Annotated[
        bool | None,
        typer.Option(
            help="The page at / may scale experts and kill replicas.", show_default="for the demo model on loopback"
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Join a running Ray cluster: `auto`, host:port or ray://….", show_default="start Ray here"),
    ] = None,
    ingress: Annotated[
        str,
        typer.Option(
            help="direct: the gateway listens itself. python: Serve's proxy. haproxy: its other one, which binds all "
            "interfaces. auto: direct for one gateway on a Ray of its own, else python.",
            autocompletion=one_of("auto", "direct", "python", "haproxy"),
        ),
    ] = "auto",
    dashboard: Annotated[
        bool, typer.Option(help="Ray's dashboard and state API (`ray list actors`, `serve status`).")
    ] = True,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="URL of an OpenTelemetry collector that gets traces.", show_default="none")
    ] = None,
) -> None:
    """Start trunk, experts and gateway, and serve until Ctrl-C."""
    from moe_ray.config import load_config
    from moe_ray.deploy.local_ray import prepare_local_ray

    if address is None:
        prepare_local_ray()
    from moe_ray.commands.adapter_option import named_sources, named_variants
    from moe_ray.commands.launch import LaunchOptions, run

    flags = {
        "model": {
            "path": model,
            "dtype": dtype,
            "device": device,
            "max_model_len": max_model_len,
            "hf_overrides": hf_overrides,
            "load_format": load_format,
            "enforce_eager": enforce_eager,
            "served_name": served_model_name[0] if served_model_name else None,
            "aliases": served_model_name[1:] if served_model_name and served_model_name[1:] else None,
        },
        "engine": {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "kv_cache_gib": kv_cache_gib,
            "kv_cache_dtype": kv_cache_dtype,
            "kv_swap_gib": kv_swap_gib,
            "kv_disk_dir": kv_disk_dir,
            "kv_disk_gib": kv_disk_gib,
            "micro_batches": micro_batches,
            "speculative": speculative or (draft_model and "auto"),
            "draft_model": draft_model,
            "draft_quantize": draft_quantize,
            "num_speculative_tokens": num_speculative_tokens,
        },
        "experts": {
            "deadline_s": expert_deadline,
            "on_expert_loss": on_expert_loss,
            "quantize": quantize,
            "cpu_offload_gib": cpu_offload_gib,
            "recorded_load": recorded_load,
        },
        "trunk": {"quantize": quantize_trunk},
        "gateway": {"tool_call_parser": tool_call_parser, "page": {"control": page_control}},
        "adapters": {"modules": named_sources(adapter)},
        "variants": named_variants(variant),
        "transport": transport,
        "log_level": log_level,
        "log_format": log_format,
        "tracing": {"otlp_endpoint": otlp_endpoint},
    }
    run(load_config(flags, config), LaunchOptions(host, port, address, ingress, dashboard), error_console())
