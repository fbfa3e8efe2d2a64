"""`moe-ray bench first-token`: a row for each length, and what cannot be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_ray.bench.first_token import FirstTokenOptions, run_first_token
from moe_ray.errors import ConfigError


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_a_row_for_each_length(random_model: Path) -> None:
    report = run_first_token(FirstTokenOptions(str(random_model), prompt_tokens=(40, 90), repeats=2), quiet)
    assert [row["prompt_tokens"] for row in report.rows] == [40, 90]
    for row in report.rows:
        assert all(float(row[key] or 0) > 0 for key in ("ttft_ms", "prompt_tokens_per_s", "decode_ms_per_token"))
    assert report.facts["repeats"] == 2


def test_a_length_that_cannot_be(random_model: Path) -> None:
    with pytest.raises(ConfigError, match="--prompt-tokens: must be numbers of at least 1"):
        run_first_token(FirstTokenOptions(str(random_model), prompt_tokens=(0,)), quiet)
    with pytest.raises(ConfigError, match="exceeds the model's max_position_embeddings"):
        run_first_token(FirstTokenOptions(str(random_model), prompt_tokens=(1 << 20,)), quiet)
