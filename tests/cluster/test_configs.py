"""Serve config files, `ray up` files and the compose file: valid for those who will read them, and of one mind."""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import BIN, CLUSTER, ROOT, clean_environment, module, shell, tool

from moe_ray.config import Config, load_config

SERVE = sorted((CLUSTER / "serve").glob("*.yaml"))
RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def rendered(path: Path, environment: Mapping[str, str] | None = None) -> Any:
    return yaml.safe_load(module(CLUSTER / "serve" / "render.py").render(path.read_text(), environment or {}))


def config_of(path: Path) -> Config:
    """What moe_ray makes of the one application in a Serve config file, which Serve's schema accepts."""
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.parse_obj(rendered(path))
    (application,) = schema.applications
    assert application.import_path == "moe_ray.deploy.app:build"
    assert application.name == "moe-ray"
    return load_config(application.args)


@pytest.mark.parametrize("path", SERVE, ids=lambda path: path.stem)
def test_serve_files_are_valid_for_serve_and_for_moe_ray(path: Path) -> None:
    config_of(path)


def test_what_the_serve_files_promise() -> None:
    configs = {path.stem: config_of(path) for path in SERVE}
    assert configs.keys() == {"demo", "mixtral-8x7b-16gb", "mixtral-8x7b-hot", "mixtral-8x7b-groups"}
    assert configs["demo"].model.path == "demo"
    assert not configs["demo"].experts.num_gpus
    small = configs["mixtral-8x7b-16gb"]
    assert (small.model.dtype, small.experts.num_gpus, small.experts.group_size) == ("float16", 1, 1)
    hot = configs["mixtral-8x7b-hot"]
    started = sum(hot.experts.of(expert).num_replicas for expert in range(8))
    assert hot.experts.autoscale.max_total_replicas is not None
    assert started == 10 <= hot.experts.autoscale.max_total_replicas
    groups = configs["mixtral-8x7b-groups"]
    assert groups.trunk.num_gpus + groups.experts.of(0).num_gpus == 1, "trunk and experts 0 to 3 share a card"
    assert groups.experts.of(4).num_gpus == groups.experts.of(7).num_gpus == 1


def test_an_open_address_is_never_the_default_of_the_demo() -> None:
    assert rendered(CLUSTER / "serve" / "demo.yaml")["http_options"]["host"] == "127.0.0.1"
    opened = rendered(CLUSTER / "serve" / "demo.yaml", {"HTTP_HOST": "0.0.0.0", "HTTP_PORT": "9"})
    assert opened["http_options"] == {"host": "0.0.0.0", "port": 9}


def test_render_says_where_the_gateway_is(tmp_path: Path) -> None:
    renderer = CLUSTER / "serve" / "render.py"
    assert shell(BIN / "python", renderer, "--url", SERVE[1]).stdout == "http://127.0.0.1:8000"
    (tmp_path / "empty.yaml").write_text("applications: []\n")
    assert shell(BIN / "python", renderer, "--url", tmp_path / "empty.yaml").stdout == "http://127.0.0.1:8000"


def test_render_takes_an_empty_default_for_a_value() -> None:
    render = module(CLUSTER / "serve" / "render.py").render
    assert render("a: '${A:-}'", {}) == "a: ''"
    for environment in ({}, {"A": ""}):
        with pytest.raises(KeyError, match="A"):
            render("a: ${A}", environment)


def prepared(path: Path) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(copy.deepcopy(yaml.safe_load(path.read_text())))
    validate_config(config)
    return config


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_accepts_the_file_and_every_node_gets_what_it_needs(path: Path) -> None:
    config = prepared(path)
    assert f"moe_ray-{VERSION}-py3-none-any.whl" in " ".join(config["setup_commands"])
    assert "~/.ray/auth_token" in config["file_mounts"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        start = commands[-1]
        assert "export RAY_AUTH_MODE=token RAY_worker_niceness=0;" in start
        assert "--dashboard-host=0.0.0.0" not in start
    for mounted in config["file_mounts"].values():
        if not mounted.startswith(("~", "dist")):
            assert (ROOT / mounted).is_dir(), "seen from the root of the repository"


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_every_command_of_ray_up_is_bash(path: Path) -> None:
    """As it stands, and in the quotes and parentheses in which Ray sends it over ssh."""
    from ray.autoscaler._private.command_runner import _with_interactive

    commands = [
        command
        for key, value in prepared(path).items()
        if key.endswith("_commands") and isinstance(value, list)
        for command in value
    ]
    assert len(commands) > 10
    for command in commands:
        sent = _with_interactive(command)
        for text in (command, " ".join(sent)):
            checked = shell("bash", "-n", "-c", text)
            assert (checked.returncode, checked.stderr) == (0, ""), text


def setup_command(path: Path, part: str) -> str:
    """The one setup command that has `part`."""
    (found,) = [command for command in prepared(path)["setup_commands"] if part in command]
    return str(found)


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_shells_of_the_nodes_find_ray_and_show_the_token(path: Path, tmp_path: Path) -> None:
    environment = clean_environment(tmp_path)
    command = setup_command(path, ".bashrc")
    for _ in range(2):  # `ray up` runs it again on every change of the file
        ran = shell("bash", "-c", command, env=environment)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert (tmp_path / ".bashrc").read_text().count("\n") == 1
    says = shell("bash", "-c", '. ~/.bashrc; echo "$PATH $RAY_AUTH_MODE $RAY_worker_niceness"', env=environment).stdout
    assert says.startswith(f"{tmp_path}/venv/bin:")
    assert says.endswith(" token 0\n")


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_nothing_is_installed_into_the_system_s_python(path: Path, tmp_path: Path) -> None:
    """Debian 12 and Ubuntu 24.04 refuse that: uv goes into an environment of its own, once, and makes the other."""
    tool(
        tmp_path / "bin" / "python3",
        'echo "python3 $*" >>~/log; mkdir -p "$3/bin"\n'
        'printf \'#!/bin/bash\\necho pip >>~/log; cp ~/uv.sh ~/uv/bin/uv\' >"$3/bin/pip"; chmod +x "$3/bin/pip"',
    )
    tool(tmp_path / "uv.sh", 'echo "uv $1" >>~/log; mkdir -p ~/venv/bin; ln -s /bin/true ~/venv/bin/python')
    environment = clean_environment(tmp_path)
    environment["PATH"] = f"{tmp_path}/bin:{environment['PATH']}"
    for _ in range(2):
        for part in ("-m venv ~/uv", "uv venv"):
            ran = shell("bash", "-c", setup_command(path, part), env=environment)
            assert ran.returncode == 0, ran.stderr
    log = (tmp_path / "log").read_text().splitlines()
    assert log == [f"python3 -m venv {tmp_path}/uv", "pip", "uv venv"]


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_the_token_of_the_hub_can_be_let_in(path: Path, tmp_path: Path) -> None:
    """By taking the `#` away."""
    text = re.sub(r"^  # (~/\.cache/huggingface/token: )", r"  \1", path.read_text(), flags=re.M)
    (tmp_path / path.name).write_text(text)
    assert prepared(tmp_path / path.name)["file_mounts"]["~/.cache/huggingface/token"] == "~/.cache/huggingface/token"
    assert "~/.cache/huggingface/token" not in prepared(path)["file_mounts"]


@pytest.mark.parametrize(
    ("vendor", "says", "code", "error"),
    [
        ("0x8086", None, 0, ""),
        ("0x10de", "580.95.05\n580.95.05", 0, ""),
        ("0x10de", "595.58.03", 0, ""),
        ("0x10de", "570.172.08", 1, "driver is 570.172.08 here, torch needs 580 or newer"),
        ("0x10de", None, 1, "does not answer after 0 s"),
    ],
)
def test_a_node_waits_for_a_driver_that_is_new_enough(
    vendor: str, says: str | None, code: int, error: str, tmp_path: Path
) -> None:
    (tmp_path / "pci" / "0000:00:04.0").mkdir(parents=True)
    (tmp_path / "pci" / "0000:00:04.0" / "vendor").write_text(f"{vendor}\n")
    tool(tmp_path / "bin" / "nvidia-smi", "exit 9" if says is None else f"echo '{says}'")
    environment = {**os.environ, "MOE_RAY_PCI_DEVICES": str(tmp_path / "pci")}
    environment["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    ran = shell(CLUSTER / "ray-up" / "wait-for-driver.sh", "580", "0", env=environment)
    assert ran.returncode == code
    assert error in ran.stderr
    assert bool(ran.stderr) == bool(error)


def test_clouds_have_a_driver_for_the_cuda_of_torch() -> None:
    """Of what `ray up` waits for by default, and no older image is asked for."""
    (oldest,) = re.findall(r"^oldest=\$\{1:-(\d+)\}", (CLUSTER / "ray-up" / "wait-for-driver.sh").read_text(), re.M)
    for name in ("aws", "gcp"):
        path = CLUSTER / "ray-up" / f"{name}.yaml"
        assert setup_command(path, "wait-for-driver.sh") == "bash ~/cluster/ray-up/wait-for-driver.sh"
        assert all(int(driver) >= int(oldest) for driver in re.findall(r"nvidia-(\d{3})\b", path.read_text()))
    for path in (CLUSTER / "README.md", CLUSTER / "Dockerfile", *RAY_UP):
        assert re.search(rf"driver,? {oldest}\b", path.read_text()), path


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_clouds_have_room_for_mixtral_on_small_cards(name: str) -> None:
    kinds = prepared(CLUSTER / "ray-up" / f"{name}.yaml")["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}, "no actor beside Ray's own processes"
    wanted = config_of(CLUSTER / "serve" / "mixtral-8x7b-16gb.yaml")
    roles = {kind: node["labels"]["moe-ray/role"] for kind, node in kinds.items()}

    def gpus(role: str, limit: str) -> int:
        found = (node[limit] * node["resources"].get("GPU", 0) for kind, node in kinds.items() if roles[kind] == role)
        return sum(found)

    assert dict(wanted.trunk.labels) == {"moe-ray/role": "trunk"}
    assert dict(wanted.experts.labels) == {"moe-ray/role": "experts"}
    assert gpus("trunk", "min_workers") >= wanted.trunk.num_gpus
    assert gpus("experts", "min_workers") >= 8 * wanted.experts.num_gpus
    hot = config_of(CLUSTER / "serve" / "mixtral-8x7b-hot.yaml")
    assert gpus("experts", "max_workers") >= (hot.experts.autoscale.max_total_replicas or 0)
    assert gpus("trunk", "max_workers") >= hot.trunk.num_replicas


def test_a_misspelt_key_of_a_ray_up_file_is_found(tmp_path: Path) -> None:
    """So that the tests above mean something."""
    from jsonschema import ValidationError

    (tmp_path / "wrong.yaml").write_text(RAY_UP[0].read_text().replace("max_workers: 14", "max_worker: 14"))
    with pytest.raises(ValidationError, match="max_worker"):
        prepared(tmp_path / "wrong.yaml")


def composed(*names: str, environment: Mapping[str, str] | None = None) -> list[Any]:
    """The compose files with their variables filled in, as Compose's own specification reads them."""
    from compose_spec import PyCompose

    found = []
    for name in names:
        text = (CLUSTER / "compose" / f"{name}.yaml").read_text()
        text = module(CLUSTER / "serve" / "render.py").render(text, environment or {})
        compose = PyCompose.from_yaml(text)
        if name == "compose":
            compose.validate()
        found.append(yaml.safe_load(text))
    return found


def test_compose_files_follow_the_specification_and_the_image() -> None:
    base, gpu = composed("compose", "gpu")
    server = base["services"]["moe-ray"]
    assert server["image"] == f"moe-ray:{VERSION}"
    assert gpu["services"]["moe-ray"]["image"] == f"moe-ray:{VERSION}-cuda"
    assert gpu["services"]["moe-ray"]["build"]["args"] == {"VARIANT": "cuda"}
    assert (CLUSTER / "compose" / server["build"]["context"]).resolve() == ROOT
    assert server["read_only"] is True
    for service in base["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "on this machine only"
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), "a version, not `latest`"
    profiles = {name: service.get("profiles", []) for name, service in base["services"].items()}
    assert profiles == {"moe-ray": [], "prometheus": ["monitoring"], "grafana": ["monitoring"]}


def test_compose_passes_the_token_of_the_hub_on() -> None:
    """Empty counts as none for the Hub's client."""
    assert composed("compose")[0]["services"]["moe-ray"]["environment"]["HF_TOKEN"] == ""
    (given,) = composed("compose", environment={"HF_TOKEN": "hf_x"})
    assert given["services"]["moe-ray"]["environment"]["HF_TOKEN"] == "hf_x"


def test_what_compose_mounts_is_there() -> None:
    for document in composed("compose", "gpu"):
        for service in document["services"].values():
            for mount in service.get("volumes", []):
                source = mount.split(":")[0]
                if source.startswith("."):
                    assert (CLUSTER / "compose" / source).exists(), mount
                else:
                    assert source in document["volumes"], mount


def test_the_gpu_configuration_fits_on_one_card() -> None:
    config = load_config(file=CLUSTER / "compose" / "gpu-config.yaml")
    assert config.trunk.num_gpus + 8 * config.experts.num_gpus == pytest.approx(1)


def test_compose_scrapes_and_shows_what_the_container_exports() -> None:
    scrape = yaml.safe_load((CLUSTER / "compose" / "prometheus.yaml").read_text())
    ray, gateway = (job["static_configs"][0]["targets"] for job in scrape["scrape_configs"])
    assert (ray, gateway) == (["moe-ray:8080"], ["moe-ray:8000"])
    (base,) = composed("compose")
    assert "--metrics-export-port=8080" in json.dumps(base["services"]["moe-ray"]["command"])
    home = base["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (CLUSTER / "grafana" / Path(home).name).exists()
