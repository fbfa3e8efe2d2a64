"""Serve config files, `ray up` files and the compose file: valid for those who will read them, and of one mind."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import BIN, CLUSTER, ROOT, module, shell

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
    assert application.import_path == "moe_ray.serve.app:build"
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
    assert (small.model.dtype, small.experts.num_gpus, small.experts.experts_per_actor) == ("float16", 1, 1)
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


def composed(*names: str) -> list[Any]:
    """The compose files with their defaults filled in, as Compose's own specification reads them."""
    from compose_spec import PyCompose

    found = []
    for name in names:
        text = (CLUSTER / "compose" / f"{name}.yaml").read_text()
        text = module(CLUSTER / "serve" / "render.py").render(text, {})
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
    (job,) = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["moe-ray:8080"]}]
    (base,) = composed("compose")
    assert "--metrics-export-port=8080" in json.dumps(base["services"]["moe-ray"]["command"])
    home = base["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (CLUSTER / "grafana" / Path(home).name).exists()
