"""The metadata of a GGUF file, by key and type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_ray.errors import CheckpointError
from moe_ray.model.gguf_file import Value


@dataclass(frozen=True, slots=True)
class GgufMetadata:
    """Typed reads of single values; each raises `CheckpointError` naming file and key where there is none such."""

    source: str
    """The file, for messages."""
    values: Mapping[str, Value]

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; of a list with a number for each layer, the one that all are."""
        value = self._of(key, default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "an integer, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; what is stored as float32 is 1e-05 again, and not 9.999999747378752e-06."""
        value = self._of(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, "a number")
        return float(f"{value:.7g}")

    def flag(self, key: str, default: bool) -> bool:
        value = self._of(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "a truth value")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._of(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._of(key, None)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(key, "a list of strings")
        return [str(one) for one in value]

    def numbers(self, key: str) -> list[float]:
        """A list of numbers; [] where the key is absent."""
        value = self.values.get(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, "a list of numbers")
        return [float(one) for one in value]

    def _of(self, key: str, default: Value | None) -> Value:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.source}: no metadata `{key}`")
        return value

    def _wrong(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: metadata `{key}` must be {wanted}, found {self.values.get(key)!r:.100}")
