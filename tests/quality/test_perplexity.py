"""Perplexity of a random model and of the demo model against transformers' own recipe; windows; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Reference, all_cores
from typer.testing import CliRunner

from moe_ray.commands.main import app
from moe_ray.commands.options import with_settings
from moe_ray.config import Config, load_config
from moe_ray.errors import ConfigError, InvalidRequest
from moe_ray.quality import scorer as scoring
from moe_ray.quality.perplexity import Estimate, perplexity
from moe_ray.quality.scorer import Scorer
from moe_ray.quality.text import read_text
from moe_ray.quality.windows import Passage, windows
from moe_ray.text.tokenizer import Tokenizer


def guide(reference: Reference, token_ids: list[int], context: int, stride: int) -> tuple[float, int]:
    """Perplexity and scored tokens by transformers' guide "Perplexity of fixed-length models", which this follows."""
    losses, scored, previous_end = 0.0, 0, 0
    for begin in range(0, len(token_ids), stride):
        end = min(begin + context, len(token_ids))
        target_length = end - previous_end
        labels = torch.tensor([token_ids[begin:end]])
        labels[:, :-target_length] = -100
        valid = int((labels[:, 1:] != -100).sum())
        losses += reference.loss(token_ids[begin:end], labels) * valid if valid else 0.0
        scored += valid
        previous_end = end
        if end == len(token_ids):
            break
    return math.exp(losses / scored), scored


def configured(path: Path, **model: object) -> Config:
    return load_config({"model": {"path": str(path), "dtype": "float32", "device": "cpu", **model}})


@pytest.mark.parametrize(("context", "stride", "rows"), [(64, 40, 512), (96, 96, 50), (300, 7, 512), (2, 1, 512)])
def test_a_random_model_has_the_perplexity_that_transformers_finds(
    random_model: Path,
    random_reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    context: int,
    stride: int,
    rows: int,
) -> None:
    monkeypatch.setattr(scoring, "MOST_ROWS", rows)
    token_ids = np.random.default_rng(context).integers(3, 512, 140).tolist()
    expected, scored = guide(random_reference, token_ids, context, stride)
    passage = Passage(token_ids, context, stride)
    measured = perplexity(Scorer(configured(random_model), random_model, context), passage)
    assert len(measured.losses) == scored
    assert measured.value.mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_demo_model_has_the_perplexity_that_transformers_finds(demo_model: Path, demo_reference: Reference) -> None:
    token_ids = Tokenizer(demo_model).encode(read_text(None))[:1000]
    expected, scored = guide(demo_reference, token_ids, 512, 256)
    with all_cores():
        measured = perplexity(Scorer(configured(demo_model), demo_model, 512), Passage(token_ids, 512, 256))
    assert len(measured.losses) == scored == len(token_ids) - 1
    assert measured.value.mean == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("tokens", "context", "stride"), [(100, 16, 16), (100, 16, 5), (17, 16, 16), (5, 16, 3)])
def test_each_token_is_scored_once_and_never_without_what_precedes_it(tokens: int, context: int, stride: int) -> None:
    found = list(windows(tokens, context, stride))
    scored = [token for w in found for token in range(w.first, w.end)]
    starts = set(range(0, tokens, context)) if stride == context else {0}
    assert scored == [token for token in range(tokens) if token not in starts]
    for window in found:
        assert window.start < window.first < window.end <= window.start + context


def test_windows_that_cannot_be_are_refused(random_model: Path) -> None:
    with pytest.raises(ConfigError, match="--stride: from 1 to --context \\(8\\), got 9"):
        list(windows(10, 8, 9))
    with pytest.raises(ConfigError, match="--context: a window has at least 2"):
        list(windows(10, 1, 1))
    with pytest.raises(ConfigError, match="positions for 512 tokens, got 513"):
        Scorer(configured(random_model), random_model, 513)
    with pytest.raises(InvalidRequest, match="1 tokens: there is nothing to predict"):
        perplexity(Scorer(configured(random_model), random_model, 8), Passage([4], 8, 8))


def test_the_error_is_that_of_a_mean() -> None:
    """Of many samples of a known distribution, the means spread as far as each sample's error says."""
    samples = np.random.default_rng(0).exponential(3.0, (400, 500))
    found = [Estimate.of(sample) for sample in samples]
    spread = np.std([each.mean for each in found])
    assert np.mean([each.error for each in found]) == pytest.approx(spread, rel=0.1)
    one = Estimate(2.0, 0.01).exp()
    assert (one.mean, one.error) == pytest.approx((math.exp(2), (math.exp(2.01) - math.exp(1.99)) / 2), rel=1e-3)


def test_any_key_of_the_configuration_can_be_set() -> None:
    flags = {"model": {"path": "demo", "dtype": None}}
    tree = with_settings(flags, ["model.dtype=float32", "experts.overrides.3={num_replicas: 2}", "transport=local"])
    config = load_config(tree)
    assert (config.model.dtype, config.transport) == ("float32", "local")
    assert config.experts.of(3).num_replicas == 2
    assert flags == {"model": {"path": "demo", "dtype": None}}
    for wrong in ("model.dtype", "=3", "model.path.x=3"):
        with pytest.raises(ConfigError, match="--set"):
            with_settings(flags, [wrong])


def test_the_command_prints_what_it_computed(readable_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A B C " * 40)
    command = ["perplexity", "-m", str(readable_model), "--text", str(text), "--context", "32", "--stride", "16"]
    result = CliRunner().invoke(app, [*command, "--set", "model.kernels=torch", "--dtype", "float32", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    config = configured(readable_model, kernels="torch")
    token_ids = Tokenizer(readable_model).encode("A B C " * 40)
    again = perplexity(Scorer(config, readable_model, 32), Passage(token_ids, 32, 16))
    assert said["perplexity"] == pytest.approx(again.value.mean, rel=1e-6)
    assert (said["tokens"], said["scored"], said["stride"]) == (len(token_ids), len(token_ids) - 1, 16)
    assert said["computed_by"].startswith("float32 on cpu, trunk and experts by torch")
    shown = CliRunner().invoke(app, [*command, "--limit-tokens", "60"], env={"COLUMNS": "80"})
    assert "59 of 60 tokens scored, windows of 32, stride 16" in shown.stdout
