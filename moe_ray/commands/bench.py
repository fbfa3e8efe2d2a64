"""`moe-ray bench …`: benches of this machine and of a server. What a bench needs is loaded when it runs."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from moe_ray.commands.bench_options import (
    BenchModel,
    Concurrency,
    DecodedTokens,
    InstructionSets,
    JsonOutput,
    OutputTokens,
    PlotFile,
    PromptTokens,
    Repeats,
    RepeatsOfEach,
    Seed,
    Threads,
    run_bench,
)
from moe_ray.commands.options import json_object, names, numbers


def serve(
    url: Annotated[
        str | None, typer.Option(help="A running OpenAI-compatible server.", show_default="start ours")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="With --url: its name there. Else what to serve.", show_default="M1"),
    ] = None,
    concurrency: Concurrency = "1,8,32",
    requests: Annotated[
        int | None, typer.Option(min=1, help="Per run.", show_default="the concurrency, at least 4")
    ] = None,
    repeats: Repeats = 3,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 64,
    send: Annotated[Literal["ids", "text"], typer.Option(help="How prompts go out.")] = "ids",
    tokenizer: Annotated[
        str | None, typer.Option(help="With --url: the model whose tokenizer makes the prompts, as for --model.")
    ] = None,
    extra: Annotated[str, typer.Option(help="JSON object merged into every request.")] = "{}",
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.")] = None,
    seed: Seed = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without a byte that end a request.")] = 600.0,
    pid: Annotated[int | None, typer.Option(help="With --url: the server's process, to tell its memory.")] = None,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Load a server with streaming completions: first token, inter-token latency, tokens/s, errors."""
    from moe_ray.bench.serve import PLOT, ServeBenchOptions, run_serve

    options = ServeBenchOptions(
        url=url,
        model=model,
        concurrency=numbers(concurrency, "--concurrency"),
        requests=requests,
        repeats=repeats,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        send=send,
        tokenizer=tokenizer,
        extra=json_object(extra, "--extra"),
        api_key=api_key,
        seed=seed,
        timeout_s=timeout,
        pid=pid,
    )
    run_bench(run_serve, options, PLOT, json_output, plot)


def gateway(
    model: BenchModel = None,
    ingress: Annotated[str, typer.Option(help="Of the server that is started: direct, python or haproxy.")] = "direct",
    concurrency: Concurrency = "32",
    repeats: Repeats = 3,
    prompt_tokens: PromptTokens = 16,
    output_tokens: OutputTokens = 64,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Measure what HTTP costs: tokens/s of a server beside those of its trunk, asked in turn without a gateway."""
    from moe_ray.deploy.local_ray import prepare_local_ray

    prepare_local_ray()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it would tell of every process that is started beside it
    from moe_ray.bench.gateway import PLOT, GatewayBenchOptions, run_gateway

    options = GatewayBenchOptions(
        model, ingress, numbers(concurrency, "--concurrency"), repeats, prompt_tokens, output_tokens
    )
    run_bench(run_gateway, options, PLOT, json_output, plot)


def roofline(
    model: BenchModel = None,
    concurrency: Concurrency = "1,8,32",
    repeats: Repeats = 3,
    prompt_tokens: PromptTokens = 128,
    output_tokens: DecodedTokens = 64,
    seed: Seed = 0,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Measure memory bandwidth and matrix speed, what they allow for the model, and how much of it we reach."""
    from moe_ray.bench.roofline import PLOT, RooflineOptions, curves, run_roofline

    options = RooflineOptions(model, numbers(concurrency, "--concurrency"), repeats, prompt_tokens, output_tokens, seed)
    run_bench(run_roofline, options, PLOT, json_output, plot, curves)


def transport(
    carriers: Annotated[str, typer.Option(help="Which of raw (a bare socket), socket, grpc, ray.")] = (
        "raw,socket,grpc,ray"
    ),
    fan_out: Annotated[str, typer.Option(help="Replicas that a round sends to: a list of numbers.")] = "1,2,8",
    message_bytes: Annotated[
        str, typer.Option("--bytes", help="Rows sent to each and sent back: a list of numbers.")
    ] = "8192,65536",
    rounds: Annotated[int, typer.Option(min=1, help="Per carrier, fan-out and size; the carriers take turns.")] = 1000,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Time scatter and gather on every carrier, against a bare socket between the same processes."""
    from moe_ray.bench.transport import PLOT, TransportBenchOptions, curves, run_transport

    options = TransportBenchOptions(
        carriers=names(carriers),
        fan_out=numbers(fan_out, "--fan-out"),
        message_bytes=numbers(message_bytes, "--bytes"),
        rounds=rounds,
    )
    run_bench(run_transport, options, PLOT, json_output, plot, curves)


def kernels(
    names_: InstructionSets = None,
    formats: Annotated[
        str, typer.Option(help="What weights are held as: a list.")
    ] = "bfloat16,int8,int8-wide,int4,nf4",
    rows: Annotated[str, typer.Option(help="Rows that are multiplied at once: a list of numbers.")] = "1,4,16,128",
    outputs: Annotated[int, typer.Option(min=1, help="Of the matrix.")] = 7168,
    inputs: Annotated[int, typer.Option(min=1, help="Of the matrix, a multiple of 128.")] = 1024,
    any_order: Annotated[
        bool, typer.Option("--any-order", help="Time torch's products, too: their sums keep to no order.")
    ] = False,
    threads: Threads = None,
    repeats: RepeatsOfEach = 5,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Time the native kernels' products for each weight format, and the share of the memory's bandwidth they reach."""
    from moe_ray.bench.kernels import PLOT, KernelOptions, run_kernels

    options = KernelOptions(
        kernels=names(names_) if names_ else (),
        formats=names(formats),
        rows=numbers(rows, "--rows"),
        outputs=outputs,
        inputs=inputs,
        threads=threads,
        repeats=repeats,
        any_order=any_order,
    )
    run_bench(run_kernels, options, PLOT, json_output, plot)


def attention(
    names_: InstructionSets = None,
    caches: Annotated[str, typer.Option(help="What keys and values are held as: a list.")] = "bfloat16,int8",
    contexts: Annotated[str, typer.Option(help="Tokens that one attends to: a list of numbers.")] = "512,4096,16384",
    sequences: Annotated[int, typer.Option(min=1, help="Of so many tokens each, one token of each a step.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Of queries.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Of keys and values.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Numbers of a head.")] = 128,
    threads: Threads = None,
    repeats: RepeatsOfEach = 5,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Time the native kernels' attention for each KV cache, by context."""
    from moe_ray.bench.attention import PLOT, AttentionOptions, run_attention

    options = AttentionOptions(
        kernels=names(names_) if names_ else (),
        caches=names(caches),
        contexts=numbers(contexts, "--contexts"),
        sequences=sequences,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        threads=threads,
        repeats=repeats,
    )
    run_bench(run_attention, options, PLOT, json_output, plot)


def first_token(
    model: BenchModel = None,
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of prompts: a list of numbers.")] = "4096,16384,32759",
    quantize: Annotated[
        str | None,
        typer.Option(help="What experts and trunk are held as: int8, int4 or nf4.", show_default="as stored"),
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="As engine.kv_cache_dtype.")] = "auto",
    repeats: RepeatsOfEach = 3,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Time the first token of one long prompt, by its length, and decoding behind it, in one process."""
    from moe_ray.bench.first_token import PLOT, FirstTokenOptions, run_first_token

    options = FirstTokenOptions(
        model=model,
        prompt_tokens=numbers(prompt_tokens, "--prompt-tokens"),
        quantize=quantize,
        kv_cache_dtype=kv_cache_dtype,
        repeats=repeats,
    )
    run_bench(run_first_token, options, PLOT, json_output, plot)


def engine(
    model: BenchModel = None,
    carriers: Annotated[
        str, typer.Option(help="Which of local, socket, grpc, ray; local is always measured, to compare with.")
    ] = "local,socket,grpc,ray",
    concurrency: Concurrency = "1,8,32",
    repeats: Repeats = 3,
    prompt_tokens: PromptTokens = 128,
    output_tokens: DecodedTokens = 64,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, help="Of the engines that are spread.", show_default="as configured")
    ] = None,
    trunk_threads: Annotated[
        int | None, typer.Option(min=1, help="Of a trunk with experts elsewhere.", show_default="as configured")
    ] = None,
    expert_threads: Annotated[
        int | None, typer.Option(min=1, help="Of each expert process.", show_default="as configured")
    ] = None,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Generate offline with every expert in its own process, carrier by carrier, against one process on these cores."""
    from moe_ray.bench.offline import PLOT, EngineBenchOptions, run_engine

    options = EngineBenchOptions(
        model=model,
        carriers=names(carriers),
        concurrency=numbers(concurrency, "--concurrency"),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        micro_batches=micro_batches,
        trunk_threads=trunk_threads,
        expert_threads=expert_threads,
    )
    run_bench(run_engine, options, PLOT, json_output, plot)
