"""The text that quantisation is calibrated on: a file, or what comes with this package and with Python."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped]

from moe_ray.convert.recipe import text_bytes
from moe_ray.errors import ConfigError
from moe_ray.text.tokenizer import Tokenizer


def calibration_windows(model: Path, text: Path | None, tokens: int, window: int) -> list[list[int]]:
    """`tokens` tokens of a text by the model's own tokenizer, in windows. Raises `CheckpointError`, `ConfigError`.

    Each window begins as a text does (with a BOS where the tokenizer adds one). Fewer where the text is shorter.
    """
    tokenizer = Tokenizer(model)
    start = tokenizer.encode("")
    taken = window - len(start)
    ids = tokenizer.encode(built_in_text() if text is None else _read(text), add_special_tokens=False)[:tokens]
    if not ids:
        raise ConfigError(f"--calibration-text {text}: no text in it")
    return [start + ids[at : at + taken] for at in range(0, len(ids), taken)]


def built_in_text() -> str:
    """Prose, code, languages, maths and dialogue of this package, and the reference pages of Python's `help()`."""
    documents = json.loads(text_bytes())["documents"]
    texts = [
        document["text"] if "text" in document else "\n".join(part["content"] for part in document["messages"])
        for document in documents
    ]
    pages = [topics[name] for name in sorted(topics)]
    return "\n\n".join(texts + pages)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibration-text {path}: not UTF-8 ({error})") from None
    except OSError as error:
        raise ConfigError(f"--calibration-text {path}: {error.strerror}") from None
