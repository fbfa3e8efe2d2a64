"""The configuration: one tree of frozen models from flags, environment, YAML and defaults, in that order of precedence.

The environment is read here and nowhere else: `MOE_RAY_ENGINE__MAX_NUM_SEQS=32` sets `engine.max_num_seqs`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from moe_ray.config.adapters import AdaptersSection
from moe_ray.config.engine import EngineSection
from moe_ray.config.experts import ExpertsSection
from moe_ray.config.gateway import GatewaySection
from moe_ray.config.model import DEMO_MODEL, ModelSection
from moe_ray.config.section import explain
from moe_ray.config.tls import TlsSection
from moe_ray.config.tracing import TracingSection
from moe_ray.config.trunk import TrunkSection
from moe_ray.config.variants import MOST_VARIANTS, VariantOptions
from moe_ray.errors import ConfigError

ENV_PREFIX: Final = "MOE_RAY_"
Transport = Literal["auto", "socket", "grpc", "ray", "local"]
_CACHE: Final = "~/.cache"
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]


class Config(BaseSettings):
    """The whole configuration of one served model."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    trunk: TrunkSection = TrunkSection()
    experts: ExpertsSection = ExpertsSection()
    gateway: GatewaySection = GatewaySection()
    adapters: AdaptersSection = AdaptersSection()
    tracing: TracingSection = Field(default_factory=TracingSection)
    variants: tuple[VariantOptions, ...] = Field(default=(), max_length=MOST_VARIANTS)
    """Further models on the same experts, such as fine-tunes that left most of them as they were, at most 15; not with
    `transport: local`. The other sections hold for all models; `adapters` and `model.aliases` for the first alone."""
    transport: Transport = "auto"
    """Carrier of the calls to experts. auto: the first of socket, grpc and ray that reaches the replica. local: experts
    in the trunk's own process."""
    cluster_token: str | None = None
    """Secret that expert and trunk ports demand. Default: derived from Ray's own token where Ray uses one."""
    tls: TlsSection | None = None
    """Certificates of expert and trunk ports. Default: no TLS."""
    cache_dir: Path = Field(default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME") or _CACHE) / "moe-ray")
    """Directory of the demo model and the native libraries. Default: $XDG_CACHE_HOME/moe-ray."""
    log_level: LogLevel = "info"
    """Least severe log records that are written."""
    log_format: LogFormat = "text"
    """json: one object a line, with the id of the HTTP request where a record is about one."""

    @field_validator("cache_dir")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        try:
            return value.expanduser()
        except RuntimeError:  # `~` of a user without a home
            if value.is_relative_to(_CACHE):  # the default, which nobody chose
                return Path("/nonexistent") / value.relative_to("~")
            raise ValueError("this user has no home directory: give an absolute path") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings

    @property
    def served_name(self) -> str:
        return self.model.served_name or Path(self.model.path).name or "model"

    def computing_on(self, device: str | None) -> Config:
        """The same with `model.device` as one actor's `device` says; None: as it is."""
        if device is None:
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"device": device})})

    @property
    def for_variants(self) -> tuple[Config, ...]:
        """The configuration by which each variant's trunks and gateway serve it, as if it were the only model."""
        return tuple(self._for(variant) for variant in self.variants)

    def _for(self, variant: VariantOptions) -> Config:
        model: dict[str, Any] = {
            "path": variant.path,
            "revision": variant.revision,
            "served_name": variant.name,
            "aliases": (),
            "max_model_len": variant.max_model_len,
            "hf_overrides": {},
        }
        trunks = {
            "num_replicas": variant.num_trunks,
            "num_gpus": variant.num_gpus,
            "gpu_memory_gib": variant.gpu_memory_gib,
        }
        told = {key: value for key, value in trunks.items() if value is not None}
        cache = {} if variant.kv_cache_gib is None else {"kv_cache_gib": variant.kv_cache_gib}
        return self.model_copy(
            update={
                "model": self.model.model_copy(update=model),
                "trunk": self.trunk.model_copy(update=told),
                "engine": self.engine.model_copy(update=cache),
                "adapters": AdaptersSection(),
                "variants": (),
            }
        )


def load_config(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> Config:
    """Merge flags (a nested mapping; None values are absent), environment, `file` (YAML) and defaults.

    Raises `ConfigError` naming the key and what is allowed.
    """

    class _FromFile(Config):
        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], init_settings: Any, env_settings: Any, **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

    from_file = _read_yaml(file) if file is not None else {}
    try:
        merged = _FromFile(**_without_none(flags or {}))
        for expert in merged.experts.overrides:
            merged.experts.of(expert)  # now, rather than when that expert is started
        _check_growth(merged)
        _check_variants(merged)
        values = {name: getattr(merged, name) for name in Config.model_fields}
        located_parts = {
            "model": located(merged.model),
            "adapters": _located_adapters(merged.adapters),
            "variants": tuple(map(_located_variant, merged.variants)),
        }
        return Config.model_construct(**{**values, **located_parts})
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    except SettingsError as error:  # an environment variable of a nested key that is no JSON
        raise ConfigError(f"environment ({ENV_PREFIX}...): {error}") from None


def located(model: ModelSection) -> ModelSection:
    """`model` with a relative path of a directory on this machine made absolute: processes elsewhere read it, too.

    So `.` and `..` are served by the name of the directory that they stand for.
    """
    path = Path(model.path)
    stays = path.is_absolute() and ".." not in path.parts
    if model.path == DEMO_MODEL or stays or not path.is_dir():
        return model
    return model.model_copy(update={"path": os.path.abspath(path)})


def _located_adapters(adapters: AdaptersSection) -> AdaptersSection:
    """`adapters` with relative paths of directories on this machine made absolute, as `located` does."""
    modules = {name: os.path.abspath(s) if Path(s).is_dir() else s for name, s in adapters.modules.items()}
    return adapters.model_copy(update={"modules": modules})


def _located_variant(variant: VariantOptions) -> VariantOptions:
    path = located(ModelSection(path=variant.path)).path
    return variant.model_copy(update={"path": path})


def _check_variants(config: Config) -> None:
    """Raise `ConfigError` where variants cannot share the experts, or two models have one name."""
    if config.variants and config.transport == "local":
        raise ConfigError(
            "`variants`: experts in the trunk's own process (`transport: local`) are not shared with another model; "
            "allowed transports: auto, socket, grpc, ray"
        )
    taken = [config.served_name, *config.model.aliases, *config.adapters.modules]
    for variant in config.variants:
        if variant.name in taken:
            raise ConfigError(f"`variants`: {variant.name!r} is the name of another model or adapter")
        taken.append(variant.name)


def _check_growth(config: Config) -> None:
    """Raise `ConfigError` where autoscaling is on and nothing may have more or fewer replicas than it starts with."""
    experts, trunk = config.experts, config.trunk
    if trunk.autoscale.enabled and trunk.min_replicas == trunk.most_replicas:
        raise ConfigError("`trunk.autoscale.enabled`: needs `trunk.max_replicas` above min_replicas")
    every = [experts, *map(experts.of, experts.overrides)]
    if experts.autoscale.enabled and all(e.min_replicas == e.most_replicas for e in every):
        raise ConfigError(
            "`experts.autoscale.enabled`: needs `experts.max_replicas` (or an override) above min_replicas"
        )


def cluster_token(config: Config, ray_uses_tokens: bool) -> str | None:
    """The token that guards expert and trunk ports.

    The configured one; or, where `ray_uses_tokens`, one derived from Ray's own (the same on every node); or None. A
    token file that lies about on a node of a Ray without authentication does not count: other nodes may lack it.
    """
    if config.cluster_token or not ray_uses_tokens:
        return config.cluster_token
    secret = os.environ.get("RAY_AUTH_TOKEN", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not secret and path.is_file():
        secret = path.read_text(encoding="utf-8").strip()
    if not secret:
        return None
    return hmac.new(secret.encode(), b"moe_ray expert and trunk ports", hashlib.sha256).hexdigest()


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: configuration file not found") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not readable as YAML ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{file}: must hold keys of the configuration, not {type(content).__name__}")
    return content


def _without_none(mapping: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and key != "hf_overrides":  # whose nulls are values
            value = _without_none(value)
            if not value:
                continue
        if value is not None:
            out[key] = value
    return out
