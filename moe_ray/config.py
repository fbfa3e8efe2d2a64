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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from moe_ray.errors import ConfigError

ENV_PREFIX: Final = "MOE_RAY_"
DEMO_MODEL: Final = "demo"
Transport = Literal["auto", "socket", "grpc", "ray", "local"]
LogLevel = Literal["debug", "info", "warning", "error"]
_GIB: Final = 1024**3


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelOptions(_Section):
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


class EngineSection(_Section):
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


class ActorOptions(_Section):
    """What Ray reserves for one actor. CPU shares are small: they place actors, they do not limit them."""

    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    resources: Mapping[str, float] = {}
    accelerator_type: str | None = None
    """Ray's name of the card it must have, such as T4 or L4."""
    num_replicas: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """Compute threads of the process (CPU); default: a trunk with native kernels takes all cores, else one."""


class ExpertOptions(ActorOptions):
    """What holds for one expert; it starts with `num_replicas`."""

    min_replicas: int = Field(default=1, ge=1)
    """Fewest that autoscaling leaves."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Most that autoscaling starts; default: `num_replicas`, so that it does not grow."""

    @field_validator("min_replicas")
    @classmethod
    def _not_above_start(cls, least: int, info: ValidationInfo) -> int:
        start: int = info.data.get("num_replicas", least)
        if least > start:
            raise ValueError(f"must be at most num_replicas ({start})")
        return least

    @field_validator("max_replicas")
    @classmethod
    def _not_below_start(cls, most: int | None, info: ValidationInfo) -> int | None:
        start: int = info.data.get("num_replicas", 1)
        if most is not None and most < start:
            raise ValueError(f"must be at least num_replicas ({start})")
        return most

    @property
    def most_replicas(self) -> int:
        """`max_replicas` or its default."""
        return self.num_replicas if self.max_replicas is None else self.max_replicas


class AutoscaleSection(_Section):
    """When experts get and lose replicas by themselves."""

    enabled: bool = False
    target_busy: float = Field(default=0.6, gt=0, le=1)
    """The share of its time that a replica should compute."""
    up_after_s: float = Field(default=3.0, ge=0)
    """How long more must be asked for before it is given."""
    down_after_s: float = Field(default=30.0, ge=0)
    """How long less must be asked for before one replica goes."""
    max_total_replicas: int | None = Field(default=None, ge=1)
    """Replicas of all experts together; where they do not suffice, the hottest experts have them."""
    interval_s: float = Field(default=2.0, gt=0)
    """How often replicas report how busy they were."""
    look_back_s: float = Field(default=10.0, gt=0, validate_default=True)
    """The time over which that is averaged."""

    @field_validator("look_back_s")
    @classmethod
    def _several_reports(cls, value: float, info: ValidationInfo) -> float:
        interval = info.data.get("interval_s", 0.0)
        if value < 2 * interval:
            raise ValueError(f"must be at least twice interval_s ({interval:g})")
        return value


class ExpertsSection(ExpertOptions):
    """The expert actors and the calls to them."""

    autoscale: AutoscaleSection = AutoscaleSection()
    max_replicas_by_hand: int = Field(default=64, ge=1)
    """Most that `moe-ray scale` may ask for."""
    overrides: Mapping[int, Mapping[str, Any]] = {}
    """Expert number → keys of this section that differ for it, e.g. {3: {num_replicas: 2}}."""
    deadline_s: float = Field(default=60.0, gt=0)
    """How long a call waits for a live replica before its requests fail with 503."""
    on_expert_loss: Literal["wait", "fail", "renormalise"] = "wait"
    """What happens to a call while its expert has no live replica. wait: at most `deadline_s`. fail: 503 at once.
    renormalise: the token goes on with its other experts, and the response says so."""
    call_timeout_s: float = Field(default=30.0, gt=0)
    refresh_s: float = Field(default=5.0, gt=0)
    """How often a trunk asks who the replicas are; at once when a link breaks."""

    def of(self, expert: int) -> ExpertOptions:
        """The options of one expert. Raises `ConfigError` on an unknown key or wrong value in its override."""
        base = {name: getattr(self, name) for name in ExpertOptions.model_fields}
        try:
            return ExpertOptions(**{**base, **self.overrides.get(expert, {})})
        except ValidationError as error:
            raise ConfigError(explain(error, f"experts.overrides.{expert}.")) from None


class GatewaySection(_Section):
    """The HTTP side."""

    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.1, ge=0)
    max_ongoing_requests: int = Field(default=512, ge=1)
    """Requests in flight per gateway; beyond that Serve answers 503."""
    retry_after_s: int = Field(default=1, ge=1)


class TlsSection(_Section):
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
    trunk: ActorOptions = ActorOptions()
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
        _check_growth(merged.experts)
        return Config.model_construct(**{name: getattr(merged, name) for name in Config.model_fields})
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    except SettingsError as error:  # an environment variable of a nested key that is no JSON
        raise ConfigError(f"environment ({ENV_PREFIX}...): {error}") from None


def _check_growth(experts: ExpertsSection) -> None:
    """Raise `ConfigError` where autoscaling is on and no expert may have more or fewer replicas than it starts with."""
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


def explain(error: ValidationError, prefix: str = "") -> str:
    """One line per fault of a validation error: the key, what is wrong, what is allowed."""
    lines = []
    for fault in error.errors():
        key = prefix + ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown configuration key `{key}`")
        else:
            lines.append(f"`{key}`: {fault['msg']}, got {fault['input']!r}")
    return "; ".join(lines)


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
