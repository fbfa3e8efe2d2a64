"""The `variants` list: further models that are served on the experts of the first one."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from moe_ray.config.section import Section

MOST_VARIANTS: Final = 15


class VariantOptions(Section):
    """A further model that is served on the experts of `model`: what is equal of theirs is held once."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name by which clients ask for it: letters, digits, `.`, `_` and `-`. Its trunks are the deployment
    `Trunk-NAME`."""
    path: str = Field(min_length=1)
    """As `model.path`: a directory, which every node has, or a Hugging Face repo id."""
    revision: str | None = None
    """As `model.revision`."""
    max_model_len: int | None = Field(default=None, ge=2)
    """As `model.max_model_len`. Default: this model's own, cut to what its KV cache holds."""
    num_trunks: int | None = Field(default=None, ge=1)
    """Trunks of this model. Default: as `trunk.num_replicas`."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs, or the share of one, that Ray reserves for each of its trunks. Default: as `trunk.num_gpus`. Where no
    actor's is set, `moe-ray serve` plans them from the cluster's cards."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """As `trunk.gpu_memory_gib`, which is the default."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """As `engine.kv_cache_gib`, which is the default."""
