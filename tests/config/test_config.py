"""Configuration: where a value comes from, and what is said about a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moe_ray.config import Config, cluster_token, load_config
from moe_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(("MOE_RAY_", "RAY_AUTH_")) or name == "XDG_CACHE_HOME":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "moe.yaml"


def fault(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(flags, file)
    return str(caught.value)


def test_flags_before_environment_before_file_before_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = ("block_size", "max_num_seqs", "max_waiting", "micro_batches")
    defaults = load_config().engine
    file.write_text("engine: {block_size: 2, max_num_seqs: 2, max_waiting: 2}\n")
    for name in everywhere[:2]:
        monkeypatch.setenv(f"MOE_RAY_ENGINE__{name.upper()}", "3")
    engine = load_config({"engine": {everywhere[0]: 4}}, file).engine
    assert [getattr(engine, name) for name in everywhere] == [4, 3, 2, defaults.micro_batches]


def test_precedence_of_top_level_keys(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("transport: ray\ncache_dir: /from/file\nlog_level: debug\n")
    assert load_config(None, file).cache_dir == Path("/from/file")
    monkeypatch.setenv("MOE_RAY_TRANSPORT", "local")
    monkeypatch.setenv("MOE_RAY_CACHE_DIR", "/from/env")
    config = load_config({"transport": "grpc"}, file)
    assert (config.transport, config.cache_dir, config.log_level) == ("grpc", Path("/from/env"), "debug")
    assert load_config({"cache_dir": "/from/flag"}, file).cache_dir == Path("/from/flag")


def test_none_in_flags_is_absent(file: Path) -> None:
    file.write_text("engine: {block_size: 8}\nmodel: {path: there}\n")
    config = load_config({"engine": {"block_size": None}, "model": {"path": None}, "transport": None}, file)
    assert (config.engine.block_size, config.model.path, config.transport) == (8, "there", "auto")


def test_cache_dir_default_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_config().cache_dir == tmp_path / ".cache/moe-ray"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert load_config().cache_dir == Path("/xdg/moe-ray")
    assert load_config({"cache_dir": "~/mine"}).cache_dir == tmp_path / "mine"


def test_an_empty_file_is_all_defaults(file: Path) -> None:
    for text in ("", "# nothing\n"):
        file.write_text(text)
        assert load_config(None, file) == load_config()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("engin: {block_size: 8}", ["unknown configuration key `engin`"]),
        ("engine: {blocksize: 8}", ["unknown configuration key `engine.blocksize`"]),
        ("engine: {block_size: 0}", ["`engine.block_size`", "greater than or equal to 1", "0"]),
        ("engine: {block_size: many}", ["`engine.block_size`", "integer", "'many'"]),
        ("engine: 3", ["`engine`", "dictionary"]),
        ("transport: carrier-pigeon", ["`transport`", "'auto'", "'grpc'", "'ray'", "'local'", "carrier-pigeon"]),
        ("model: {dtype: int4}", ["`model.dtype`", "'bfloat16'", "int4"]),
        ("log_level: loud", ["`log_level`", "'info'"]),
        ("tls: {certificate: c.pem}", ["`tls.key`", "`tls.ca`", "required"]),
        ("experts: {deadline_s: 0}", ["`experts.deadline_s`", "greater than 0"]),
        ("experts: {overrides: {3: {num_replica: 2}}}", ["`experts.overrides.3.num_replica`", "unknown"]),
        ("experts: {overrides: {3: {num_replicas: 0}}}", ["`experts.overrides.3.num_replicas`", "1"]),
        ("experts: {overrides: {three: {}}}", ["experts.overrides", "three", "integer"]),
    ],
)
def test_a_wrong_key_or_value_names_itself_and_what_is_allowed(file: Path, text: str, named: list[str]) -> None:
    file.write_text(text)
    message = fault(None, file)
    assert all(name in message for name in named), message


def test_faults_in_flags_and_environment_are_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown configuration key `modle`" in fault({"modle": {"path": "x"}})
    assert "`gateway.num_replicas`" in fault({"gateway": {"num_replicas": -1}})
    monkeypatch.setenv("MOE_RAY_ENGINE__MAX_SEQS", "3")
    assert "unknown configuration key `engine.max_seqs`" in fault()
    monkeypatch.delenv("MOE_RAY_ENGINE__MAX_SEQS")
    monkeypatch.setenv("MOE_RAY_EXPERTS__OVERRIDES", "{3: ")
    assert "experts" in fault()


def test_every_fault_is_reported_at_once(file: Path) -> None:
    file.write_text("engine: {block_size: 0, nonsense: 1}\nlog_level: loud\n")
    message = fault(None, file)
    assert all(name in message for name in ("engine.block_size", "engine.nonsense", "log_level")), message


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\t- x", "- 1\n- 2", "just text", "3", "1: 2"])
def test_what_is_no_mapping_names_the_file(file: Path, text: str) -> None:
    file.write_text(text)
    assert str(file) in fault(None, file)


def test_unreadable_files_are_named(file: Path, tmp_path: Path) -> None:
    assert str(file) in fault(None, file)
    assert "not found" in fault(None, file)
    assert str(tmp_path) in fault(None, tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in fault(None, file)


def test_yaml_cannot_run_code(file: Path) -> None:
    file.write_text("model: {path: !!python/object/apply:os.getcwd []}\n")
    assert str(file) in fault(None, file)


def test_overrides_per_expert(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("experts: {num_cpus: 0.5, num_gpus: 1, overrides: {3: {num_replicas: 2, num_gpus: 0}}}\n")
    experts = load_config(None, file).experts
    assert (experts.of(3).num_replicas, experts.of(3).num_gpus, experts.of(3).num_cpus) == (2, 0, 0.5)
    assert (experts.of(0).num_replicas, experts.of(0).num_gpus, experts.of(0).num_cpus) == (1, 1, 0.5)
    monkeypatch.setenv("MOE_RAY_EXPERTS__OVERRIDES", '{"5": {"threads": 4}}')
    assert load_config().experts.of(5).threads == 4


def test_the_tree_is_frozen() -> None:
    config = load_config()
    for target, name in ((config, "transport"), (config.engine, "block_size"), (config.experts, "deadline_s")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, 1)


def test_load_config_gives_a_plain_config() -> None:
    config = load_config({"model": {"path": "somewhere/there"}})
    assert type(config) is Config
    assert config.served_name == "there"
    assert load_config({"model": {"path": "a/b", "served_name": "mine"}}).served_name == "mine"
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_the_configured_token_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ray-secret")
    assert cluster_token(load_config({"cluster_token": "mine"}), True) == "mine"
    monkeypatch.setenv("MOE_RAY_CLUSTER_TOKEN", "from-env")
    assert cluster_token(load_config(), True) == "from-env"


def test_the_token_is_derived_from_rays_and_does_not_reveal_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config()
    assert cluster_token(config, True) is None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ray-secret")
    derived = cluster_token(config, True)
    assert derived is not None
    assert len(derived) == 64
    assert "ray-secret" not in derived
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert cluster_token(config, True) not in (None, derived)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text("ray-secret\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert cluster_token(config, True) == derived, "the same secret by another way is the same token on every node"
    assert cluster_token(config, False) is None, "a file that lies about, and a Ray without authentication"
    assert cluster_token(load_config({"cluster_token": "mine"}), False) == "mine"


def test_rays_default_token_file_is_found(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("ray-secret")
    assert cluster_token(load_config(), True) is not None


def test_replicas_lie_within_their_bounds() -> None:
    assert load_config({"experts": {"num_replicas": 3}}).experts.of(0).most_replicas == 3
    experts = load_config(
        {"experts": {"max_replicas": 4, "overrides": {2: {"num_replicas": 2, "min_replicas": 2}}}}
    ).experts
    assert (experts.of(2).min_replicas, experts.of(2).most_replicas, experts.of(0).most_replicas) == (2, 4, 4)
    below = fault({"experts": {"min_replicas": 2}})
    assert below == "`experts.min_replicas`: Value error, must be at most num_replicas (1), got 2"
    above = fault({"experts": {"max_replicas": 2, "overrides": {5: {"num_replicas": 3}}}})
    assert above == "`experts.overrides.5.max_replicas`: Value error, must be at least num_replicas (3), got 2"


def test_autoscaling_is_told_how_far_it_may_go() -> None:
    assert "`experts.max_replicas`" in fault({"experts": {"autoscale": {"enabled": True}}})
    for growth in ({"max_replicas": 2}, {"overrides": {1: {"max_replicas": 2}}}):
        assert load_config({"experts": {"autoscale": {"enabled": True}, **growth}}).experts.autoscale.enabled
    assert "`experts.autoscale.look_back_s`" in fault({"experts": {"autoscale": {"interval_s": 6}}})
    assert "`experts.autoscale.target_busy`" in fault({"experts": {"autoscale": {"target_busy": 1.2}}})
    assert "`experts.autoscale.target`" in fault({"experts": {"autoscale": {"target": 1}}})


def test_the_card_of_an_actor() -> None:
    config = load_config(
        {"trunk": {"accelerator_type": "A10G"}, "experts": {"overrides": {0: {"accelerator_type": "T4"}}}}
    )
    assert (config.trunk.accelerator_type, config.experts.of(0).accelerator_type) == ("A10G", "T4")
    assert config.experts.of(1).accelerator_type is None


def test_a_group_takes_the_override_of_its_experts(file: Path) -> None:
    file.write_text("experts: {experts_per_actor: 3, overrides: {4: {num_replicas: 2}, 6: {num_gpus: 1}}}\n")
    experts = load_config(None, file).experts
    assert [experts.of(e).num_replicas for e in range(8)] == [1, 1, 1, 2, 2, 2, 1, 1]
    assert [experts.of(e).num_gpus for e in range(8)] == [None] * 6 + [1, 1]
    same = {"experts_per_actor": 2, "overrides": {2: {"num_gpus": 1}, 3: {"num_gpus": 1.0}}}
    assert load_config({"experts": same}).experts.of(2).num_gpus == 1


def test_two_overrides_of_one_group_that_differ_are_both_named() -> None:
    overrides = {2: {"num_replicas": 2}, 3: {"num_replicas": 3}}
    assert load_config({"experts": {"overrides": overrides}}).experts.of(3).num_replicas == 3
    said = fault({"experts": {"overrides": overrides, "experts_per_actor": 2}})
    assert said == (
        "`experts.overrides.2` and `experts.overrides.3` differ, but these experts share an actor "
        "(`experts.experts_per_actor` is 2): give both the same"
    )
    said = fault({"experts": {"experts_per_actor": 0}})
    assert "`experts.experts_per_actor" in said
    assert "greater than or equal to 1, got 0" in said


def test_spares_hold_what_they_say(file: Path) -> None:
    file.write_text("experts: {spares: [{experts: {3: 8-15, 5: '0,2,4-6', 1: 7}}, {experts: {2: all}}]}\n")
    experts = load_config(None, file).experts
    first, second = experts.spare_keys(16, 8)
    assert first == {(la, 3) for la in range(8, 16)} | {(la, 5) for la in (0, 2, 4, 5, 6)} | {(7, 1)}
    assert second == {(layer, 2) for layer in range(16)}
    assert load_config().experts.spare_keys(16, 8) == ()


def test_spares_are_like_the_experts_where_they_say_nothing(file: Path) -> None:
    file.write_text(
        "experts: {num_gpus: 1, num_replicas: 2, threads: 3, labels: {pool: experts},\n"
        "  spares: [{experts: {0: all}}, {experts: {1: all}, num_replicas: 3, num_gpus: 0.5, labels: {pool: '!x'}}]}\n"
    )
    config = load_config(None, file)
    first, second = config.experts.spares
    assert (first.num_gpus, first.num_replicas, first.threads, first.labels) == (1, 1, 3, {"pool": "experts"})
    assert (second.num_gpus, second.num_replicas, second.threads, second.labels) == (0.5, 3, 3, {"pool": "!x"})
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("spare", "named"),
    [
        ({"experts": {8: "all"}}, "`experts.spares.1.experts.8`: no such expert: this model has 0 to 7"),
        ({"experts": {3: "0-16"}}, "`experts.spares.1.experts.3`: no layer 16: this model has 0 to 15, got '0-16'"),
        ({"experts": {3: 99}}, "`experts.spares.1.experts.3`: no layer 99: this model has 0 to 15, got '99'"),
    ],
)
def test_spares_of_what_the_model_lacks(spare: dict[str, Any], named: str) -> None:
    experts = load_config({"experts": {"spares": [{"experts": {0: "all"}}, spare]}}).experts
    with pytest.raises(ConfigError) as caught:
        experts.spare_keys(16, 8)
    assert str(caught.value) == named


def test_overrides_of_what_the_model_lacks() -> None:
    experts = load_config({"experts": {"overrides": {8: {"num_gpus": 1}}}}).experts
    with pytest.raises(ConfigError, match=r"`experts.overrides.8`: no such expert: this model has 0 to 7"):
        experts.spare_keys(16, 8)


@pytest.mark.parametrize(
    ("spare", "named"),
    [
        ({}, ["`experts.spares.0.experts`", "required"]),
        ({"experts": {}}, ["`experts.spares.0.experts`", "at least 1"]),
        ({"experts": {3: ""}}, ["`experts.spares.0.experts.3`", "0,2,4-6", "''"]),
        ({"experts": {3: "8-x"}}, ["`experts.spares.0.experts.3`", "`all`", "0,2,4-6", "'8-x'"]),
        ({"experts": {3: "9-8"}}, ["`experts.spares.0.experts.3`", "9-8"]),
        ({"experts": {-1: "all"}}, ["experts.spares.0.experts.-1", "greater than or equal to 0"]),
        ({"experts": {3: "all"}, "max_replicas": 2}, ["unknown configuration key `experts.spares.0.max_replicas`"]),
        ({"experts": {3: "all"}, "num_replicas": 0}, ["`experts.spares.0.num_replicas`", "1"]),
    ],
)
def test_a_wrong_spare_is_named(spare: dict[str, Any], named: list[str]) -> None:
    message = fault({"experts": {"spares": [spare]}})
    assert all(name in message for name in named), message


def test_labels_pin_actors_to_nodes() -> None:
    labels = {"ray.io/accelerator-type": "in(T4, L4)", "pool": "!trunk", "zone": "eu-1", "x": "!in(a,b)"}
    experts = load_config({"experts": {"labels": labels, "overrides": {1: {"labels": {"pool": "hot"}}}}}).experts
    assert (experts.of(0).labels, experts.of(1).labels) == (labels, {"pool": "hot"})
    for bad in ({"a b": "x"}, {"pool": "in()"}, {"pool": "a,b"}, {"pool": ""}, {"pool": "-x"}, {"/x": "y"}):
        assert "`trunk.labels`" in fault({"trunk": {"labels": bad}})


def test_labels_are_what_ray_takes() -> None:
    from ray._private.label_utils import validate_label_selector

    labels = {"ray.io/accelerator-type": "in(T4, L4)", "pool": "!trunk", "zone": "eu-1", "x": "!in(a,b)"}
    assert load_config({"trunk": {"labels": labels}}).trunk.labels == labels
    assert validate_label_selector(labels) is None


def test_replicas_of_one_expert_on_a_node() -> None:
    experts = load_config({"experts": {"overrides": {1: {"max_replicas_per_node": 1}}}}).experts
    assert (experts.of(0).max_replicas_per_node, experts.of(1).max_replicas_per_node) == (None, 1)
    assert "`experts.max_replicas_per_node`" in fault({"experts": {"max_replicas_per_node": 0}})
    assert "`trunk.max_replicas_per_node`" in fault({"trunk": {"max_replicas_per_node": 1}})


def test_trunks_scale_where_they_may_grow() -> None:
    trunk = load_config().trunk
    assert (trunk.num_replicas, trunk.min_replicas, trunk.most_replicas, trunk.autoscale.enabled) == (1, 1, 1, False)
    grown = load_config({"trunk": {"num_replicas": 2, "max_replicas": 4, "autoscale": {"enabled": True}}}).trunk
    assert (grown.min_replicas, grown.most_replicas, grown.autoscale.enabled) == (1, 4, True)
    assert "needs `trunk.max_replicas` above min_replicas" in fault({"trunk": {"autoscale": {"enabled": True}}})
    assert "at least num_replicas (3)" in fault({"trunk": {"num_replicas": 3, "max_replicas": 2}})
    assert "at most num_replicas (1)" in fault({"trunk": {"min_replicas": 2}})


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"autoscale": {"target_kv_use": 1.5}}, "`trunk.autoscale.target_kv_use`"),
        ({"autoscale": {"target_waiting": 0}}, "`trunk.autoscale.target_waiting`"),
        ({"autoscale": {"interval_s": 8}}, "`trunk.autoscale.look_back_s`"),
        ({"drain_s": -1}, "`trunk.drain_s`"),
        ({"max_replicas_by_hand": 0}, "`trunk.max_replicas_by_hand`"),
        ({"max_replicas_per_node": 1}, "unknown configuration key `trunk.max_replicas_per_node`"),
    ],
)
def test_faults_of_the_trunk_section_are_named(section: dict[str, Any], key: str) -> None:
    assert key in fault({"trunk": section})


@pytest.mark.parametrize(("path", "name"), [(".", "inner"), ("./", "inner"), ("..", "outer"), ("../inner", "inner")])
def test_a_relative_directory_is_served_by_its_name(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    config = load_config({"model": {"path": path}})
    assert config.served_name == name
    assert Path(config.model.path).is_absolute(), "processes elsewhere have another current directory"
    assert load_config({"model": {"path": path, "served_name": "mine"}}).served_name == "mine"


def test_names_that_are_no_directory_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("demo", "mistralai/Mixtral-8x7B-v0.1", str(tmp_path)):
        assert load_config({"model": {"path": path}}).model.path == path
    assert load_config({"model": {"path": "/"}}).served_name == "model"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert load_config().cache_dir == Path("/nonexistent/.cache/moe-ray"), "which cannot be written, and is replaced"
    with pytest.raises(ConfigError, match=r"`cache_dir`.*no home directory: give an absolute path"):
        load_config({"cache_dir": "~/elsewhere"})
