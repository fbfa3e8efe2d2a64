"""The rooms of the house: imports point down only, and what need not be loaded is not.

Every `import` of every file counts, lazy ones inside functions too: they are a way to load later, not to hide a
dependency. Only those under `if TYPE_CHECKING` are free, for they do not exist when the program runs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moe_ray

ROOT = Path(moe_ray.__file__).parent
BASE = {"errors", "sampling", "core", "telemetry", "console", "histogram", "timings"}
MODEL = {*BASE, "native", "model"}

MAY_IMPORT: dict[str, set[str]] = {  # room or file → what of ours it may import, besides itself
    "errors": set(),
    "telemetry": set(),
    "console": set(),
    "histogram": set(),
    "timings": set(),
    "engine_stats": set(),
    "sampling": {"errors"},
    "adapter_nouns": set(),
    "weight_layout": set(),
    "core": {"errors", "sampling", "timings", "engine_stats", "adapter_nouns", "weight_layout"},
    "pb": set(),
    "config": {"errors", "sampling", "core"},
    "native": {"errors"},
    "text": {*BASE, "model"},  # the checkpoint's files beside the weights: its end tokens
    "transport": {*BASE, "pb", "native"},
    "model": {*BASE, "native"},
    "convert": {*BASE, "text", "model"},
    "hub": {*BASE, "config", "convert", "text", "model"},  # of text: whether a draft model has the model's vocabulary
    "experts": {*MODEL, "transport"},
    "engine": {*MODEL, "config"},
    "observe": {*BASE, "pb", "engine"},  # of the engine: which stages a step has
    "trunk": {*MODEL, "__init__", "pb", "config", "engine", "experts", "transport", "observe"},
    "gateway": {*BASE, "pb", "transport", "engine", "trunk", "observe"},
    # of model: what a checkpoint says of itself
    "api": {*BASE, "__init__", "model", "engine", "text", "gateway", "observe"},
    "llm_inputs": {*BASE, "api"},
    "llm": {*MODEL, "llm_inputs", "config", "hub", "text", "experts", "engine", "api"},
    "quality": {*MODEL, "config", "experts", "engine"},
    "deploy": {
        *MODEL,
        "__init__",
        *("config", "hub", "text", "transport", "experts", "engine", "observe", "trunk", "gateway", "api"),
    },
    "doctor": {*MODEL, "config", "hub", "text", "deploy"},
    "bench": {
        *MODEL,
        "__init__",
        *("pb", "config", "hub", "convert", "text", "transport", "experts", "engine", "llm", "gateway", "api"),
        "deploy",
    },
    "commands": {
        *MODEL,
        "__init__",
        *(
            "config",
            "hub",
            "convert",
            "text",
            "experts",
            "engine",
            "llm",
            "api",
            "deploy",
            "doctor",
            "bench",
            "quality",
        ),
    },
}
NEVER = {  # room → packages that must not appear in it
    "core": {"ray", "grpc", "transformers", "numpy"},
    "sampling": {"ray", "grpc", "torch", "transformers", "numpy"},
    "errors": {"ray", "grpc", "torch", "transformers", "numpy"},
    "config": {"ray", "grpc", "torch", "transformers"},
    "native": {"ray", "grpc", "fastapi", "transformers"},
    "model": {"ray", "grpc", "fastapi"},
    "engine": {"ray", "grpc", "fastapi"},
    "experts": {"ray", "grpc", "fastapi"},
    "text": {"ray", "grpc", "fastapi", "torch"},
    "api": {"ray", "grpc", "torch"},
    "gateway": {"ray", "torch", "fastapi"},
    "observe": {"ray", "grpc", "torch", "fastapi", "starlette"},
    "trunk": {"fastapi"},
    "llm": {"ray", "grpc", "fastapi"},
    "quality": {"ray", "grpc", "fastapi"},
    "transport": {"fastapi", "transformers"},
    "doctor": {"fastapi", "grpc", "torch"},
    "bench": {"fastapi"},
    "commands": {"fastapi", "grpc", "torch"},
}
VERBS = (  # files of the command line that are loaded to parse any command
    *(
        "main",
        "command_line",
        "tgi_launcher",
        "tgi_arguments",
        "tgi_mapping",
        "options",
        "bench_options",
        "serve",
        "chat",
        "generate",
        "plan",
        "perplexity",
        "compare",
        "quality_options",
        "status",
        "scale",
        "doctor",
        "ps",
        "support_bundle",
        "completion",
        "chat_settings",
    ),
    *("convert", "version"),
    *("bench", "bench_lab"),
)
FILE_NEVER = {  # files that work without a package their room may have
    "api/failure.py": {"fastapi", "starlette"},
    "api/generation.py": {"fastapi", "starlette"},
    "api/job.py": {"fastapi", "starlette"},
    "api/job_watch.py": {"fastapi", "starlette"},
    "api/output.py": {"fastapi", "starlette"},
    "api/sse.py": {"fastapi", "starlette", "numpy"},
    "api/anthropic/parse.py": {"fastapi", "starlette"},
    "api/anthropic/render.py": {"fastapi", "starlette"},
    "api/anthropic/schemas.py": {"fastapi", "starlette"},
    "api/anthropic/turns.py": {"fastapi", "starlette"},
    "api/ollama/history.py": {"fastapi", "starlette"},
    "api/ollama/parse.py": {"fastapi", "starlette"},
    "api/ollama/render.py": {"fastapi", "starlette"},
    "api/ollama/schemas.py": {"fastapi", "starlette"},
    "api/openai/parse.py": {"fastapi", "starlette"},
    "api/openai/render.py": {"fastapi", "starlette"},
    "api/openai/schemas.py": {"fastapi", "starlette"},
    "api/openapi.py": {"fastapi", "starlette"},
    **{
        f"api/tgi/{name}.py": {"fastapi", "starlette"}
        for name in ("constraint", "errors", "limits", "parse", "render", "schemas", "timing")
    },
    **{
        f"api/responses/{name}.py": {"fastapi", "starlette"}
        for name in ("background", "body", "conversation", "memory", "parse", "queries", "render", "schemas")
    },
    "engine/blocks.py": {"torch"},
    "engine/routed_experts.py": {"torch"},
    "engine/scheduler.py": {"torch"},
    "engine/step_times.py": {"torch"},
    "engine/busy_report.py": {"torch"},
    "engine/traced_step.py": {"torch"},
    "observe/request_counts.py": {"prometheus_client", "opentelemetry"},
    "experts/planning/autoscale.py": {"torch", "numpy"},
    "experts/planning/balance.py": {"torch"},
    "experts/planning/placement.py": {"torch", "numpy"},
    **{
        f"experts/planning/{name}.py": {"torch", "numpy"}
        for name in (
            "advice",
            "card_placement",
            "card_table",
            "expert_calls",
            "machines",
            "model_cost",
            "rates",
            "routing",
        )
    },
    **{f"experts/planning/{name}.py": {"torch", "numpy"} for name in ("search", "spreads", "step_time")},
    "experts/server/weight_loader.py": {"torch"},
    "experts/server/load_counters.py": {"torch", "numpy"},
    "model/compute/card_driver.py": {"torch", "numpy"},
    "model/checkpoint_facts.py": {"torch", "transformers", "numpy"},
    "model/end_tokens.py": {"torch", "transformers", "numpy"},
    "model/json_files.py": {"torch", "transformers", "numpy"},
    "quality/windows.py": {"torch", "numpy"},
    "quality/text.py": {"torch", "numpy"},
    "transport/grpc.py": {"ray"},
    "transport/local.py": {"ray", "grpc"},
    "transport/socket.py": {"ray", "grpc"},
    "transport/native_socket.py": {"ray", "grpc"},
    "transport/base.py": {"ray", "grpc"},
    "transport/wire.py": {"ray", "grpc"},
    "transport/listener.py": {"ray", "grpc", "torch"},
    "transport/weight_transfer.py": {"ray", "grpc", "torch"},
    "transport/pending.py": {"ray", "grpc", "torch"},
    "transport/ray.py": {"grpc"},
    "bench/lab/switch.py": {"torch", "numpy"},
    "bench/lab/hosts.py": {"torch", "ray", "grpc"},
    "bench/http_load.py": {"torch", "ray", "grpc"},
    "bench/report.py": {"torch", "ray", "grpc", "httpx"},
    "bench/serve.py": {"torch", "ray", "grpc"},
    **{f"commands/{verb}.py": {"torch", "ray", "grpc", "httpx"} for verb in VERBS},
    "deploy/load_overview.py": {"ray", "grpc", "torch"},
    "deploy/trunk_autoscale.py": {"ray", "grpc", "torch", "numpy"},
    "gateway/trunk_choice.py": {"ray", "grpc", "torch"},
}


def imports(tree: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Dotted names that a file of `package` imports, those under `if TYPE_CHECKING` left out."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found += imports(ast.Module(node.orelse, []), package)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found += [f"{module}.{alias.name}" for alias in node.names]
        else:
            found += imports(node, package)
    return found


def room_of(dotted: str) -> str:
    """First part of a moe_ray module's name below the package; `__init__` for what the package itself defines."""
    name = dotted.split(".")[1] if "." in dotted else "__init__"
    return name if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists() else "__init__"


FILES = [path for path in sorted(ROOT.rglob("*.py")) if "__pycache__" not in path.parts]


def imported(path: Path) -> list[str]:
    package = ("moe_ray", *path.relative_to(ROOT).parts[:-1])
    return imports(ast.parse(path.read_text(encoding="utf-8")), package)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    file = str(path.relative_to(ROOT))
    room = Path(file).parts[0].removesuffix(".py")
    names = imported(path)
    outside = {name.split(".")[0] for name in names}
    never = NEVER.get(room, set()) | FILE_NEVER.get(file, set())
    assert not outside & never, f"{file} imports {sorted(outside & never)}"
    if room in MAY_IMPORT:
        ours = {room_of(name) for name in names if name.split(".")[0] == "moe_ray"} - {room}
        assert not ours - MAY_IMPORT[room], f"{file} imports {sorted(ours - MAY_IMPORT[room])}"


def test_every_rule_is_about_something_that_exists() -> None:
    for name in {*MAY_IMPORT, *NEVER}:
        assert (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists(), f"no {name} any more"
    for file in FILE_NEVER:
        assert (ROOT / file).exists(), f"no {file} any more"


def test_no_room_depends_on_itself_through_others() -> None:
    def below(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, f"a circle: {' → '.join((*path, room))}"
        for other in MAY_IMPORT.get(room, set()) & MAY_IMPORT.keys():
            below(other, (*path, room))

    for room in MAY_IMPORT:
        below(room, ())


def test_the_parser_sees_lazy_and_relative_imports() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import hidden
else:
    import shown
from . import sibling
from ..core import Request
def f():
    import ray.serve
    try:
        from moe_ray.deploy import app
    except ImportError:
        pass
"""
    found = imports(ast.parse(source), ("moe_ray", "engine"))
    assert found == [
        "typing.TYPE_CHECKING",
        "shown",
        "moe_ray.engine.sibling",
        "moe_ray.core.Request",
        "ray.serve",
        "moe_ray.deploy.app",
    ]


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "moe_ray moe_ray.core moe_ray.config moe_ray.api.openai.parse moe_ray.api.openai.render "
            "moe_ray.text.tokenizer moe_ray.engine.scheduler moe_ray.transport moe_ray.transport.base "
            "moe_ray.experts.planning.footprint moe_ray.api.observation moe_ray.observe.tracing",
            "torch ray grpc opentelemetry",
        ),
        (
            "moe_ray.llm moe_ray.experts.local moe_ray.engine.build",
            "ray grpc fastapi starlette transformers.models.mixtral",
        ),
        (
            "moe_ray.deploy.expert_replica moe_ray.deploy.gateway_replica moe_ray.commands.launch "
            "moe_ray.transport.ray moe_ray.convert.demo",
            "torch",
        ),
        (
            "moe_ray.deploy.status moe_ray.deploy.scale_by_hand moe_ray.deploy.servers moe_ray.commands.ps_report",
            "torch transformers moe_ray.api moe_ray.deploy.app",
        ),
        ("moe_ray.commands.main", "torch ray grpc transformers httpx matplotlib"),
    ],
)
def test_what_is_not_loaded(modules: str, absent: str) -> None:
    code = (
        f"import sys, importlib\nfor name in {modules.split()!r}: importlib.import_module(name)\n"
        f"loaded = [name for name in {absent.split()!r} if name in sys.modules]\nassert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
