"""From the adapters that the configuration and requests name to those that a gateway serves."""

from __future__ import annotations

from collections.abc import Callable

from moe_ray.config import Config
from moe_ray.config.adapters import AdaptersSection
from moe_ray.core import AdapterEntry, AdapterRef
from moe_ray.errors import ConfigError
from moe_ray.hub import resolve_adapter
from moe_ray.model.lora.adapter_config import FILE
from moe_ray.model.lora.adapter_file import read_adapter
from moe_ray.model.model_config import ModelConfig

Opener = Callable[[str], AdapterRef]


def adapter_opener(model: ModelConfig, most_rank: int) -> Opener:
    """A function from the source of an adapter to the adapter, checked against the model.

    It raises `AdapterError` for one that does not fit, or whose rank is above `most_rank`.
    """

    def opened(source: str) -> AdapterRef:
        return AdapterRef(read_adapter(resolve_adapter(source), model, most_rank).adapter_id, source)

    return opened


def check_adapters(config: Config, model: ModelConfig) -> None:
    """Raise `AdapterError` or `ConfigError` where an adapter of `adapters.modules` could not be served."""
    own = (config.served_name, *config.model.aliases)
    for name, source in config.adapters.modules.items():
        if name in own:
            raise ConfigError(f"adapters.modules: {name!r} is a name of the model itself")
        read_adapter(resolve_adapter(source), model, config.adapters.max_rank)


def configured_adapters(options: AdaptersSection, model: ModelConfig) -> list[AdapterEntry]:
    """The entries of `adapters.modules`, as old as their files: what requests have changed since goes before them.

    Raises `AdapterError` for one that does not fit the model.
    """
    entries = []
    for name, source in options.modules.items():
        adapter = read_adapter(resolve_adapter(source), model, options.max_rank)
        age = (adapter.directory / FILE).stat().st_mtime_ns
        entries.append(AdapterEntry(name, adapter.adapter_id, source, age))
    return entries
