"""The `gateway` section: the HTTP side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import Field, field_validator, model_validator

from moe_ray.config.section import Section
from moe_ray.config.tgi import TgiSection

_LISTEN: Final = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s:\[\]]+):(?P<port>\d{1,5})")


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen."""

    host: str
    """Without brackets."""
    port: int

    @classmethod
    def parse(cls, text: str) -> Listen:
        """From `HOST:PORT`, an IPv6 address in brackets. Raises `ValueError`."""
        found = _LISTEN.fullmatch(text)
        if found is None or not 1 <= int(found["port"]) <= 65535:
            raise ValueError("must be HOST:PORT, an IPv6 address in brackets, e.g. 127.0.0.1:8000")
        return cls(found["host"].strip("[]"), int(found["port"]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class PageSection(Section):
    """The page at `/`: a chat, and the trunks and experts behind it."""

    enabled: bool = True
    """Browsers get the page at `/`, and its data at `/house`."""
    control: bool | None = None
    """The page may set the replicas of experts and kill replicas. Default: only where `moe-ray serve` serves the demo
    model on a loopback address, on a Ray of its own."""


class GatewaySection(Section):
    """The HTTP side."""

    num_replicas: int = Field(default=1, ge=1)
    """Number of gateways."""
    num_cpus: float = Field(default=0.1, ge=0)
    """CPU cores that Ray reserves for each gateway."""
    listen: str | None = None
    """`HOST:PORT` where the gateway takes HTTP itself: Serve's proxies, if there are any, are not in the way of its
    tokens. For one gateway only. `moe-ray serve` sets it, unless `--ingress` says otherwise."""
    max_ongoing_requests: int = Field(default=512, ge=1)
    """Most requests in flight per gateway; beyond that 503."""
    retry_after_s: int = Field(default=1, ge=1)
    """Told in the Retry-After header of 429 and 503."""
    headers_within_s: float = Field(default=1.0, ge=0)
    """A stream whose first token takes longer sends its headers then; what fails later is an event in the stream."""
    keep_alive_s: float = Field(default=5.0, gt=0)
    """A stream that has been silent for so long sends a comment."""
    tool_call_parser: Literal["auto", "hermes", "mistral", "llama3_json", "json"] = "auto"
    """How the model writes calls of tools; `auto`: as its chat template teaches, else as JSON that moe_ray asks for."""
    responses_memory_mib: int = Field(default=64, ge=0)
    """MiB for the responses that /v1/responses stores: clients ask for them again, and go on from them. The
    conversation that was longest not used makes room. 0: nothing is stored. Several gateways share one memory."""
    max_stored_responses: int = Field(default=4096, ge=1)
    """Most responses in that memory."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask, e.g. `https://chat.example.org`, or `*`; none: browsers keep other pages out."""
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    """Requests must show one of them, as a bearer token or in `x-api-key`; none: every request is served."""
    tgi: TgiSection = TgiSection()
    """What requests to TGI's routes may ask for."""

    page: PageSection = PageSection()
    """The page at `/`."""

    @model_validator(mode="after")
    def _one_listens(self) -> GatewaySection:
        if self.listen is not None and self.num_replicas > 1:
            raise ValueError("`listen` is for one gateway, and num_replicas is more")
        return self

    @field_validator("listen")
    @classmethod
    def _address(cls, listen: str | None) -> str | None:
        return listen if listen is None else str(Listen.parse(listen))

    @field_validator("api_keys")
    @classmethod
    def _sendable(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ValueError("keys must be printable ASCII without spaces, and not empty")
        return keys
