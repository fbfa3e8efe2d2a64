"""What `moe-ray perplexity` and `moe-ray compare` are told of models and of the text, and the loading of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ray.commands.options import error_console, with_settings

if TYPE_CHECKING:
    from moe_ray.config import Config
    from moe_ray.console import Report
    from moe_ray.quality.scorer import Scorer
    from moe_ray.quality.windows import Passage
    from moe_ray.text.tokenizer import Tokenizer

Text = Annotated[Path | None, typer.Option(help="UTF-8 text to score.", show_default="one that comes with moe_ray")]
Context = Annotated[int, typer.Option(help="Tokens of a window.")]
Stride = Annotated[
    int | None, typer.Option(help="Tokens from one window to the next.", show_default="--context: no overlap")
]
LimitTokens = Annotated[
    int | None, typer.Option(min=2, help="Only so many tokens of the text.", show_default="all of it")
]


@dataclass(frozen=True, slots=True)
class ModelFlags:
    """What flags say of one model; None is what the configuration says."""

    model: str
    dtype: str | None
    device: str | None
    kernels: str | None
    quantize: str | None
    quantize_trunk: str | None
    kv_cache_dtype: str | None
    config: Path | None
    hf_overrides: str | None = None
    settings: tuple[str, ...] = ()
    """Values of --set."""
    settings_b: tuple[str, ...] = ()
    """Values of --set-b, which win over --set."""

    def configured(self) -> Config:
        """The configuration, with a cache directory that can be written. Raises `ConfigError`."""
        from moe_ray.commands.cache import with_usable_cache
        from moe_ray.config import load_config

        flags = {
            "model": {
                **{"path": self.model, "dtype": self.dtype, "device": self.device, "kernels": self.kernels},
                "hf_overrides": self.hf_overrides,
            },
            "experts": {"quantize": self.quantize},
            "trunk": {"quantize": self.quantize_trunk},
            "engine": {"kv_cache_dtype": self.kv_cache_dtype},
        }
        tree = with_settings(with_settings(flags, self.settings), self.settings_b, "--set-b")
        return with_usable_cache(load_config(tree, self.config), error_console())


@dataclass(frozen=True, slots=True, eq=False)
class FoundModel:
    """A model whose files are on this machine, not loaded yet."""

    config: Config
    directory: Path
    tokenizer: Tokenizer

    @staticmethod
    def of(config: Config, progress: Report) -> FoundModel:
        """Build, find or download it. Raises `CheckpointError`."""
        from moe_ray.hub import resolve_model
        from moe_ray.text.tokenizer import Tokenizer

        directory = resolve_model(config, progress)
        return FoundModel(config, directory, Tokenizer(directory))

    def load(self, context: int, progress: Report) -> Scorer:
        """Load it for windows of `context` tokens. Raises `CheckpointError`, `ConfigError`."""
        from moe_ray.quality.scorer import Scorer

        return Scorer(self.config, self.directory, context, progress)


@dataclass(frozen=True, slots=True)
class ScoredText:
    """The text that flags name, and how much of it is scored in which windows."""

    words: str
    context: int
    stride: int
    limit_tokens: int | None

    @staticmethod
    def read(text: Path | None, context: int, stride: int | None, limit_tokens: int | None) -> ScoredText:
        """Read the text, before any model is looked for. Raises `ConfigError` for it, or for windows that cannot be."""
        from moe_ray.quality.text import read_text
        from moe_ray.quality.windows import check_windows

        stride = stride or context
        check_windows(context, stride)
        return ScoredText(read_text(text), context, stride, limit_tokens)

    def passage(self, tokenizer: Tokenizer) -> Passage:
        """The tokens that are scored."""
        from moe_ray.quality.windows import Passage

        return Passage(tokenizer.encode(self.words)[: self.limit_tokens], self.context, self.stride)
