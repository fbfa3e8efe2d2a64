"""The Serve config that the chart renders, read by Ray and by moe_ray."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from helm_rendering import CHART, Manifest, Rendered, bounds, profile, render
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from moe_ray.config import Config, load_config
from moe_ray.config.gateway import PageSection
from moe_ray.config.tracing import TracingSection
from moe_ray.deploy.replica_targets import autoscaling_config, trunk_autoscaling_config
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.placement import holdings


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine's environment says must not make up for what the chart does not."""
    for name in list(os.environ):
        if name.startswith("MOE_RAY_") and name != "MOE_RAY_SHARED":
            monkeypatch.delenv(name)


def config_of(rendered: Rendered) -> Config:
    return load_config(rendered.application["args"])


def test_ray_and_moe_ray_read_it(rendered: Rendered) -> None:
    parsed = ServeDeploySchema.model_validate(rendered.serve_config)
    (application,) = parsed.applications
    assert (application.name, application.route_prefix) == ("moe-ray", "/")
    assert application.import_path == "moe_ray.deploy.app:build"
    assert (parsed.http_options.host, parsed.http_options.port) == ("0.0.0.0", 8000)
    # "Additional" fields are let through by Ray: each must be one that it knows.
    assert set(rendered.serve_config) <= set(ServeDeploySchema.model_fields)
    assert set(rendered.application) <= set(type(application).model_fields)
    config = config_of(rendered)
    assert str(config.cache_dir) == "/cache/moe-ray"
    assert rendered.notes.count(f'"model": "{config.served_name}"') == 1


def test_every_deployment_has_an_entry_and_no_other(rendered: Rendered) -> None:
    """Serve refuses an entry for a deployment that there is not; one that comes later restarts every actor."""
    config = config_of(rendered)
    spares = config.experts.spare_keys(32, 8)
    names = [holding.name for holding in holdings(32, 8, config.experts.group_size, spares)]
    trunks = ["Trunk", *(f"Trunk-{variant.name}" for variant in config.variants)]
    assert list(rendered.deployments) == ["Gateway", *trunks, *names]


def test_experts_inside_the_trunk_have_no_entries() -> None:
    assert list(render({"transport": "local"}).deployments) == ["Gateway", "Trunk"]


def test_numbers_of_replicas_are_not_in_the_args(rendered: Rendered) -> None:
    """There a change would restart every actor."""
    args = rendered.application["args"]
    numbers = {"num_replicas", "min_replicas"}
    for section in ("trunk", "experts", "gateway"):
        assert numbers.isdisjoint(args.get(section, {}))
    for override in args.get("experts", {}).get("overrides", {}).values():
        assert (numbers | {"max_replicas"}).isdisjoint(override)


@pytest.mark.parametrize(
    "options",
    [{}, {"targetBusy": 0.5, "upAfterS": 0, "downAfterS": 9, "maxTotalReplicas": 12, "intervalS": 1, "lookBackS": 4}],
    ids=["defaults", "all set"],
)
def test_an_entry_keeps_the_policy(options: Manifest) -> None:
    """It replaces the autoscaling_config that the application builds: all but the bounds must be as there."""
    for per_actor in (1, 3):
        experts = {"expertsPerActor": per_actor, "maxReplicas": 4, "autoscale": {"enabled": True, **options}}
        rendered = render({"experts": experts})
        section = config_of(rendered).experts
        for holding in holdings(4, 8, per_actor):
            ours = dict(rendered.deployments[holding.name]["autoscaling_config"])
            built = autoscaling_config(section, holding.experts[0])
            assert (ours.pop("min_replicas"), ours.pop("initial_replicas"), ours.pop("max_replicas")) == (1, 1, 4)
            compare_policies(ours, built)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targetKvUse": 0.5, "targetWaiting": 1, "upAfterS": 0, "downAfterS": 9, "intervalS": 1, "lookBackS": 4},
    ],
    ids=["defaults", "all set"],
)
def test_the_trunks_entry_keeps_the_policy(options: Manifest) -> None:
    rendered = render({"trunk": {"maxReplicas": 3, "autoscale": {"enabled": True, **options}}})
    config = config_of(rendered)
    ours = dict(rendered.deployments["Trunk"]["autoscaling_config"])
    assert (ours.pop("min_replicas"), ours.pop("initial_replicas"), ours.pop("max_replicas")) == (1, 1, 3)
    compare_policies(ours, trunk_autoscaling_config(config.trunk, config.engine.max_num_seqs))


def test_a_variants_entry_keeps_its_policy_and_its_number() -> None:
    variants = [{"name": "tuned", "path": "/m", "numTrunks": 2}, {"name": "merged", "path": "/n"}]
    rendered = render({"variants": variants, "trunk": {"maxReplicas": 3, "autoscale": {"enabled": True}}})
    config = config_of(rendered)
    for name, number in (("Trunk-tuned", 2), ("Trunk-merged", 1)):
        ours = dict(rendered.deployments[name]["autoscaling_config"])
        assert (ours.pop("min_replicas"), ours.pop("initial_replicas"), ours.pop("max_replicas")) == (1, number, 3)
        compare_policies(ours, trunk_autoscaling_config(config.trunk, config.engine.max_num_seqs, name))
    fixed = render({"variants": variants}).deployments
    assert [fixed[f"Trunk-{name}"]["num_replicas"] for name in ("tuned", "merged")] == [2, 1]


def compare_policies(ours: Manifest, built: Manifest) -> None:
    built = dict(built)
    for name in ("min_replicas", "initial_replicas", "max_replicas"):
        del built[name]
    policy, theirs = ours.pop("policy"), built.pop("policy")
    assert ours == built
    assert policy["policy_function"] == theirs["policy_function"]
    kwargs, expected = dict(policy["policy_kwargs"]), dict(theirs["policy_kwargs"])
    options, defaults = kwargs.pop("options"), expected.pop("options")
    assert kwargs == expected
    assert defaults | options == defaults  # an option that the chart does not know has its own default


@pytest.mark.parametrize("autoscale", [False, True])
def test_an_override_changes_its_own_entry_only(autoscale: bool) -> None:
    shared = {"autoscale": {"enabled": autoscale}, "maxReplicas": 3} if autoscale else {}
    before = render({"experts": shared})
    override = {"3": {"minReplicas": 2, "maxReplicas": 5}}
    after = render({"experts": {**shared, "overrides": override}})
    assert bounds(after.deployments["Expert3"]) == ((2, 2, 5) if autoscale else (2, 2, 2))
    changed = {name for name in before.deployments if before.deployments[name] != after.deployments[name]}
    assert changed == {"Expert3"}
    assert after.application | {"deployments": []} == before.application | {"deployments": []}
    if autoscale:  # a changed policy, too, would restart every actor
        policies = [r.deployments["Expert3"]["autoscaling_config"]["policy"] for r in (before, after)]
        assert policies[0] == policies[1]


def test_numbers_of_trunks_gateways_and_spares() -> None:
    spares = [{"experts": {"3": "0-1"}, "numReplicas": 2}, {"experts": {"5": "all"}}]
    values = {"trunk": {"numReplicas": 2}, "gateway": {"numReplicas": 3}, "experts": {"spares": spares}}
    rendered = render(values)
    names = ("Gateway", "Trunk", "Spare0", "Spare1")
    assert [rendered.deployments[name]["num_replicas"] for name in names] == [3, 2, 2, 1]
    assert [dict(spare.experts) for spare in config_of(rendered).experts.spares] == [{3: "0-1"}, {5: "all"}]


def test_experts_that_share_an_actor() -> None:
    rendered = render({"experts": {"expertsPerActor": 3, "overrides": {"4": {"numReplicas": 2}}}})
    numbers = {name: entry["num_replicas"] for name, entry in rendered.deployments.items()}
    assert numbers == {"Gateway": 1, "Trunk": 1, "Experts0-2": 1, "Experts3-5": 2, "Experts6-7": 1}
    many = render({"model": {"numLocalExperts": 64}, "experts": {"expertsPerActor": 16}})
    assert list(many.deployments)[2:] == ["Experts0-15", "Experts16-31", "Experts32-47", "Experts48-63"]


def test_actors_go_to_the_groups_of_their_role() -> None:
    rendered = render({"experts": {"labels": {"zone": "a"}, "overrides": {"3": {"labels": {"card": "l4"}}}}})
    config = config_of(rendered)
    assert config.trunk.labels == {"moe-ray/role": "trunk"}
    assert config.experts.labels == {"moe-ray/role": "experts", "zone": "a"}
    assert config.experts.of(3).labels == {"moe-ray/role": "experts", "zone": "a", "card": "l4"}
    roles = {name: group.get("labels", {}).get("moe-ray/role") for name, group in rendered.groups.items()}
    assert roles == {"headgroup": None, "trunk": "trunk", "experts": "experts"}
    mixed = render({"workerGroups": {"overflow": {"role": "any"}}})
    assert config_of(mixed).experts.labels == {"moe-ray/role": "in(experts,any)"}
    single = render({"workerGroups": {"trunk": None, "experts": None, "all": {"role": "any"}}})
    assert set(single.groups) == {"headgroup", "all"}
    assert config_of(single).trunk.labels == {"moe-ray/role": "any"}


WITH_OTHER_VALUES = {"cache_dir", "cluster_token", "tls", "gateway.api_keys", "gateway.listen"}
"""Keys that the chart sets itself, its volumes and secrets; and one that Serve's proxies stand for."""


def keys(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """Every key of a section and of those in it, as `gateway.tgi.max_best_of`."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def test_every_key_of_moe_ray_is_a_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for key in sorted({*keys(Config)} - WITH_OTHER_VALUES):
        part = schema
        for name in key.split("."):
            first, *others = name.split("_")
            known = part["properties"]
            part = known.get(first + "".join(other.capitalize() for other in others))
            assert part is not None, f"{key} is not in values.schema.json"


def test_every_key_reaches_moe_ray(everything: Rendered) -> None:
    """The profile sets every key of these sections. What values do not say is left out: defaults are moe_ray's."""
    values, schema = profile("everything"), json.loads((CHART / "values.schema.json").read_text())
    for section in ("engine", "trunk", "experts", "gateway", "adapters", "tracing"):
        assert set(schema["properties"][section]["properties"]) == set(values[section]), section
    config = config_of(everything)
    assert config.log_format == "json"
    assert config.model.aliases == ("gpt-4o", "claude-*")
    assert config.gateway.page == PageSection(enabled=True, control=True)
    assert config.gateway.cors_origins == ("https://chat.example.org",)
    for section in ("page", "tgi"):
        reached = everything.application["args"]["gateway"][section]
        assert reached.keys() == type(getattr(config.gateway, section)).model_fields.keys()
    assert config.gateway.tgi.grammars is False
    assert config.adapters.modules == {"poetryInGerman": "/models/adapters/poetry"}
    assert (config.adapters.max_loaded, config.adapters.max_rank, config.adapters.runtime_loading) == (4, 64, True)
    tuned, merged = config.variants
    assert (tuned.name, tuned.path, tuned.max_model_len) == ("tuned", "/models/tuned", 8192)
    assert (tuned.num_gpus, tuned.gpu_memory_gib, tuned.kv_cache_gib) == (0.25, 5.5, 1.5)
    assert (merged.name, merged.path, merged.revision) == ("merged", "example/merged", "main")
    assert config.tracing.otlp_endpoint == "http://collector.monitoring:4317"
    assert everything.application["args"]["tracing"].keys() == TracingSection.model_fields.keys()
    assert config.model.max_model_len == 1048576
    scaled = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "sliding_window": None}
    assert config.model.hf_overrides == scaled
    assert config.engine.kv_cache_gib == 8.5
    assert config.engine.kv_cache_dtype == "int8"
    assert (config.engine.kv_swap_gib, config.engine.kv_disk_gib) == (24, 100)
    assert str(config.engine.kv_disk_dir) == "/cache/kv"
    assert config.engine.enable_prefix_caching is True
    assert config.trunk.resources == {"rack": 0.1}
    assert config.experts.on_expert_loss == "renormalise"
    assert config.experts.card_mailboxes is True
    assert config.experts.autoscale.max_total_replicas == 24
    assert (config.trunk.gpu_memory_gib, config.experts.gpu_memory_gib, config.trunk.device) == (36.5, 7.25, "cuda")
    assert config.experts.of(5).num_gpus == 1
    assert (config.experts.cpu_offload_gib, str(config.experts.recorded_load)) == (1.5, "/models/load.json")
    assert [config.experts.of(expert).device for expert in (4, 5)] == ["cuda", "cpu"]
    assert config.tls is not None
    assert config.tls.server_name == "moe-ray"
    assert config.experts.call_timeout_s == 25, "extraConfig is merged last"
    # Cards and their like are named by the profile; nothing else is said of what it leaves out.
    assert set(render().application["args"]) == {"cache_dir", "log_level", "transport", "model", "trunk", "experts"}


def test_a_typo_in_extra_config_is_moe_rays_to_find() -> None:
    with pytest.raises(ConfigError, match=r"unknown configuration key `engine\.max_seqs`"):
        config_of(render({"extraConfig": {"engine": {"max_seqs": 8}}}))
