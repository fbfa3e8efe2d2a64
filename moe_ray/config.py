"""The configuration: one tree of frozen models from flags, environment, YAML and defaults, in that order of precedence.

The environment is read here and nowhere else: `MOE_RAY_ENGINE__MAX_NUM_SEQS=32` sets `engine.max_num_seqs`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from moe_ray.actor_options import ExpertsSection, Section, TrunkSection, explain
from moe_ray.errors import ConfigError

ENV_PREFIX: Final = "MOE_RAY_"
DEMO_MODEL: Final = "demo"
Transport = Literal["auto", "socket", "grpc", "ray", "local"]
LogLevel = Literal["debug", "info", "warning", "error"]
_GIB: Final = 1024**3


class ModelOptions(Section):
    """Which model, and how it is computed."""

    path: str = DEMO_MODEL
    """A directory, a Hugging Face repo id, or `demo`: the demo model, built on first use."""
    revision: str | None = None
    served_name: str | None = None
    """The name that clients use; default: the last part of `path`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's, or float32 on a CPU that has no bfloat16 instructions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"
    """native: our own, for bfloat16 on CPUs with AVX512-BF16, built on first use. auto: those, else torch."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus output; default: the model's, cut to what the KV cache holds."""


class EngineSection(Section):
    """Continuous batching and the KV cache of one trunk."""

    block_size: int = Field(default=16, ge=1, le=256)
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Default: a fifth of the free memory on CPU (at most 4 GiB), most of the free memory on a GPU."""
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=512, ge=1)
    max_waiting: int = Field(default=1024, ge=1)
    enable_prefix_caching: bool = True
    micro_batches: Literal["auto"] | Annotated[int, Field(ge=1, le=8)] = "auto"
    """Parts of a step that take turns computing and waiting for experts. auto: as many as turn out to be fastest."""
    speculative: Literal["off", "ngram"] = "off"
    """ngram: guess tokens from what followed the last ones before, and verify several in one step."""
    num_speculative_tokens: int = Field(default=4, ge=1, le=16)
    """Most guesses per sequence and step."""
    prompt_lookup_max: int = Field(default=4, ge=1, le=16)
    """Longest run of last tokens that is looked up; shorter ones follow."""
    prompt_lookup_min: int = Field(default=2, ge=1, le=16, validate_default=True)

    @field_validator("prompt_lookup_min")
    @classmethod
    def _not_above_max(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("prompt_lookup_max", value)
        if value > most:
            raise ValueError(f"must be at most prompt_lookup_max ({most})")
        return value


class GatewaySection(Section):
    """The HTTP side."""

    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.1, ge=0)
    max_ongoing_requests: int = Field(default=512, ge=1)
    """Requests in flight per gateway; beyond that Serve answers 503."""
    retry_after_s: int = Field(default=1, ge=1)
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    """Requests must show one of them as a bearer token; none: whoever reaches the port is served."""

    @field_validator("api_keys")
    @classmethod
    def _sendable(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ValueError("keys must be printable ASCII without spaces, and not empty")
        return keys


class TlsSection(Section):
    """PEM files for mutual TLS on expert and trunk ports."""

    certificate: str
    key: str
    ca: str
    server_name: str | None = None
    """The name in the certificates, where peers are addressed by IP."""


class Config(BaseSettings):
    """The whole configuration of one served model."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    model: ModelOptions = ModelOptions()
    engine: EngineSection = EngineSection()
    trunk: TrunkSection = TrunkSection()
    experts: ExpertsSection = ExpertsSection()
    gateway: GatewaySection = GatewaySection()
    transport: Transport = "auto"
    cluster_token: str | None = None
    """Expert and trunk ports refuse who does not show it; default: derived from Ray's own token where there is one."""
    tls: TlsSection | None = None
    cache_dir: Path = Field(default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "moe-ray")
    """Where the demo model is kept; default: $XDG_CACHE_HOME/moe-ray."""
    log_level: LogLevel = "info"

    @field_validator("cache_dir")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser()

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
        return self.model.served_name or Path(self.model.path).name


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
        return Config.model_construct(**{name: getattr(merged, name) for name in Config.model_fields})
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    except SettingsError as error:  # an environment variable of a nested key that is no JSON
        raise ConfigError(f"environment ({ENV_PREFIX}...): {error}") from None


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
        if isinstance(value, Mapping):
            value = _without_none(value)
            if not value:
                continue
        if value is not None:
            out[key] = value
    return out
