"""The `moe-ray` command: parses flags, calls the rooms, prints; errors are one line, never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from moe_ray import __version__
from moe_ray.commands.bench import bench_app, numbers
from moe_ray.errors import ConfigError, MoeRayError

app = typer.Typer(
    name="moe-ray",
    help="Serve Mixtral-format mixture-of-experts models, pulled apart: one trunk, every expert its own Ray actor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(help="Make Mixtral-format checkpoints out of other models.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")
app.add_typer(bench_app, name="bench")
console = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Option("--model", "-m", help="A directory, a Hugging Face repo id, or `demo`.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with the tree of moe_ray.config.Config; flags win over it.")
]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt plus output.", show_default="the model's")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")]
Url = Annotated[str, typer.Option(help="Base URL of a running server.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]

UpcycleDtype = Literal["bfloat16", "float16", "float32"]

DEFAULT_URL = "http://127.0.0.1:8000"


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A directory, a Hugging Face repo id, or `demo`.", show_default="demo"),
    ] = None,
    config: ConfigFile = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.", min=1, max=65535)] = 8000,
    transport: Annotated[
        str | None, typer.Option(help="auto, socket, grpc, ray or local.", show_default="auto")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences computed together.", show_default="64")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens per step.", show_default="512")] = None,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="Memory of the KV cache.", show_default="from free memory")
    ] = None,
    micro_batches: Annotated[
        str | None,
        typer.Option(help="Parts of a step that compute and wait for experts in turns: a number.", show_default="auto"),
    ] = None,
    speculative: Annotated[
        str | None, typer.Option(help="off, or ngram: guess tokens from what stood before.", show_default="off")
    ] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(help="Most guesses per sequence and step.", show_default="4")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The name that clients use.", show_default="last part of --model")
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
    address: Annotated[
        str | None,
        typer.Option(help="Join a running Ray cluster: `auto`, host:port or ray://….", show_default="start Ray here"),
    ] = None,
    ingress: Annotated[
        str, typer.Option(help="python: Serve's own proxy. haproxy: faster, but it binds all interfaces.")
    ] = "python",
    dashboard: Annotated[
        bool, typer.Option(help="Ray's dashboard and state API (`ray list actors`, `serve status`).")
    ] = True,
    log_level: LogLevel = None,
) -> None:
    """Start trunk, experts and gateway, and serve until Ctrl-C."""
    from moe_ray.config import load_config
    from moe_ray.deploy.local_ray import prepare_local_ray

    if address is None:
        prepare_local_ray()
    from moe_ray.commands.launch import LaunchOptions, run

    flags = {
        "model": {
            "path": model,
            "dtype": dtype,
            "device": device,
            "max_model_len": max_model_len,
            "served_name": served_model_name,
        },
        "engine": {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "kv_cache_gib": kv_cache_gib,
            "micro_batches": micro_batches,
            "speculative": speculative,
            "num_speculative_tokens": num_speculative_tokens,
        },
        "experts": {"deadline_s": expert_deadline, "on_expert_loss": on_expert_loss},
        "transport": transport,
        "log_level": log_level,
    }
    run(load_config(flags, config), LaunchOptions(host, port, address, ingress, dashboard), console)


@app.command()
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

    chat_loop(url, model, system, temperature, max_tokens, console, api_key)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to complete, or `-` for standard input.")],
    model: Model = "demo",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option()] = None,
    dtype: Dtype = None,
    device: Device = None,
    max_model_len: MaxModelLen = None,
) -> None:
    """Complete one prompt in this process, without Ray, streaming to standard output."""
    from moe_ray.console import loading_bars
    from moe_ray.core import SamplingParams
    from moe_ray.llm import LLM

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with loading_bars(console) as progress:
        llm = LLM(
            model,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            progress=progress,
        )
    source: Any = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]) if chat else text
    for delta in llm.stream(source, sampling):
        print(delta, end="", flush=True)
    print()


@app.command()
def plan(
    model: Model = "demo",
    config: ConfigFile = None,
    dtype: Dtype = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Size of each card in GiB: says what fits.")] = None,
    load: Annotated[
        Path | None,
        typer.Option(help='Recorded load, from which to propose replicas: the JSON of GET /experts, or {"rows": ...}.'),
    ] = None,
    extra_replicas: Annotated[
        int | None,
        typer.Option(min=0, help="With --load: further replicas.", show_default="until max/mean is 1.1, at most 8"),
    ] = None,
    layers_per_spare: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --load: further replicas hold so many hot layers of any experts.",
            show_default="all of one expert",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Gbit/s of the trunk's link to experts on other hosts: says what that leaves.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(min=0, help="Milliseconds one way to experts on other hosts.")
    ] = None,
    streams: Annotated[
        str | None, typer.Option(help="With those: sequences at once, a list of numbers.", show_default="1,8,32")
    ] = None,
    step_ms: Annotated[
        float | None, typer.Option(min=0, help="With those: milliseconds that a step computes, as measured.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what each actor would hold and read, and the KV cache, before anything starts; with --load, what to add."""
    from moe_ray.commands.plan_report import balanced, plan_json, planned, print_balance, print_distance, print_plan
    from moe_ray.config import load_config
    from moe_ray.console import loading_bars
    from moe_ray.hub import resolve_model

    if load is None and (extra_replicas is not None or layers_per_spare is not None):
        raise ConfigError("--extra-replicas and --layers-per-spare go with --load")

    distance = _distance(bandwidth, latency, streams, step_ms)
    settings = load_config({"model": {"path": model, "dtype": dtype}}, config)
    with loading_bars(console) as progress:
        directory = resolve_model(settings, progress)
    made = planned(settings, directory, without_weights=True)
    advice = None if load is None else balanced(made, load, extra_replicas, layers_per_spare)
    if json_output:
        print(plan_json(made, gpu_memory, advice, distance))
        return
    print_plan(Console(highlight=False), made, gpu_memory)
    if advice is not None:
        print_balance(Console(highlight=False), made, advice)
    if distance is not None:
        print_distance(Console(highlight=False), made, distance)


def _distance(gbit: float | None, latency_ms: float | None, streams: str | None, step_ms: float | None) -> Any:
    from moe_ray.commands.plan_report import Distance
    from moe_ray.experts.planning.footprint import Network

    if gbit is None and latency_ms is None:
        if streams is not None or step_ms is not None:
            raise ConfigError("--streams and --step-ms go with --bandwidth or --latency")
        return None
    if gbit is not None and gbit <= 0:
        raise ConfigError(f"--bandwidth: must be above 0, got {gbit:g}")
    return Distance(Network(latency_ms or 0.0, gbit), numbers(streams or "1,8,32", "--streams"), step_ms)


@app.command()
def status(
    address: Annotated[
        str, typer.Option(help="Ray cluster: host:port as `moe-ray serve` prints it, or `auto`.")
    ] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show every actor of the running application: where it is, its state, memory and load."""
    from moe_ray.deploy.status import collect, print_status

    snapshot = collect(address)
    if json_output:
        import json

        print(json.dumps(snapshot, indent=1))
    else:
        print_status(Console(highlight=False), snapshot)


@app.command()
def scale(
    units: Annotated[list[str], typer.Argument(help="Numbers of experts, or `trunk`.", metavar="EXPERT|trunk...")],
    replicas: Annotated[int | None, typer.Option(min=1, help="Run exactly so many of each.")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Give them back to the configuration's policy.")] = False,
    address: Annotated[
        str, typer.Option(help="Ray cluster: host:port as `moe-ray serve` prints it, or `auto`.")
    ] = "auto",
) -> None:
    """Set the replicas of these experts, or of the trunk, while the application serves; returns when they run."""
    if auto == (replicas is not None):
        raise ConfigError("give either --replicas N or --auto")
    from moe_ray.deploy.scale import parse_units
    from moe_ray.deploy.scale import scale as run_scale

    run_scale(parse_units(units), replicas, console, address)


@convert_app.command()
def upcycle(
    source: Annotated[Path, typer.Argument(help="A GGUF file or a directory of a dense Llama-architecture model.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    experts: Annotated[int, typer.Option(min=2)] = 8,
    top_k: Annotated[int, typer.Option(min=1)] = 2,
    noise: Annotated[float, typer.Option(help="Noise per expert, as a fraction of each matrix's spread.")] = 0.02,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: Annotated[UpcycleDtype, typer.Option(help="Of the written weights.")] = "bfloat16",
) -> None:
    """Turn a dense model into a mixture of experts by sparse upcycling (arXiv:2212.05055)."""
    from moe_ray.console import loading_bars
    from moe_ray.convert.recipe import UpcycleConfig
    from moe_ray.convert.upcycle import upcycle as run_upcycle

    options = UpcycleConfig(num_experts=experts, top_k=top_k, noise=noise, seed=seed, dtype=dtype)
    with loading_bars(console) as progress:
        run_upcycle(source, out, options, progress)
    console.print(f"wrote {out}")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command line; a known error is printed as one line and ends with status 1."""
    try:
        app()
    except MoeRayError as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
