"""The `adapters` section: LoRA adapters that are served beside the model."""

from __future__ import annotations

from pydantic import Field, field_validator

from moe_ray.config.section import Section


class AdaptersSection(Section):
    """LoRA adapters that are served beside the model."""

    modules: dict[str, str] = Field(default_factory=dict)
    """Adapters that are served from the start: the name by which clients ask for one (as `model`, or TGI's
    `adapter_id`) to its directory, which every node has, or its Hugging Face repo id."""
    max_loaded: int = Field(default=16, ge=1, le=63)
    """Most adapters that a trunk holds at a time. A further one takes the place of the one that was not used for
    longest; while all are in use, requests for it wait."""
    max_rank: int = Field(default=256, ge=1, le=256)
    """Adapters of a larger rank are refused."""
    runtime_loading: bool = False
    """Serve `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, which add and remove adapters while the server runs.
    Clients can then make it read any directory of its machines that holds an adapter."""

    @field_validator("modules")
    @classmethod
    def _named(cls, modules: dict[str, str]) -> dict[str, str]:
        for name, source in modules.items():
            if not name.strip() or not source.strip():
                raise ValueError("names and directories of adapters are not empty")
        return modules
