"""The `moe-ray` command: assembles the verbs; an error is one line, never a traceback."""

from __future__ import annotations

import typer

from moe_ray.commands import adapters, bench, bench_gpu, bench_lab
from moe_ray.commands.chat import chat
from moe_ray.commands.command_line import run_command
from moe_ray.commands.compare import compare
from moe_ray.commands.convert import quantize, upcycle
from moe_ray.commands.doctor import doctor
from moe_ray.commands.generate import generate
from moe_ray.commands.perplexity import perplexity
from moe_ray.commands.plan import plan
from moe_ray.commands.ps import ps
from moe_ray.commands.scale import scale
from moe_ray.commands.serve import serve
from moe_ray.commands.status import status
from moe_ray.commands.support_bundle import support_bundle
from moe_ray.commands.version import version

VERBS = (serve, chat, generate, plan, doctor, perplexity, compare, status, ps, scale, support_bundle)
CONVERSIONS = (upcycle, quantize)
BENCHES = (
    bench.serve,
    bench.gateway,
    bench.roofline,
    bench.kernels,
    bench.attention,
    bench.transport,
    bench.engine,
    bench.first_token,
    bench_gpu.gpu,
    bench_lab.chaos,
    bench_lab.scale,
    bench_lab.cluster,
    bench_lab.trunks,
    bench_lab.skew,
    bench_lab.plan,
)

app = typer.Typer(
    name="moe-ray",
    help="Serve mixture-of-experts models, pulled apart: one trunk, every expert its own Ray actor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(help="Make Mixtral-format checkpoints out of other models.", no_args_is_help=True)
adapters_app = typer.Typer(help="The LoRA adapters of a running server.", no_args_is_help=True)
bench_app = typer.Typer(
    help="Measure this machine and what runs on it: a table, or one JSON object.", no_args_is_help=True
)
for _group, _verbs in ((app, VERBS), (convert_app, CONVERSIONS), (bench_app, BENCHES)):
    for _verb in _verbs:
        _group.command()(_verb)
adapters_app.command("list")(adapters.list_adapters)
adapters_app.command("load")(adapters.load_adapter)
adapters_app.command("unload")(adapters.unload_adapter)
app.add_typer(adapters_app, name="adapters")
app.add_typer(convert_app, name="convert")
app.add_typer(bench_app, name="bench")
app.command()(version)


def main() -> None:
    """Run the command line; a known error is printed as one line and ends with status 1."""
    run_command(app)
