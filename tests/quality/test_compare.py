"""Two random models compared, against the same sums over what transformers says of them; the spool; the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backends import BEST
from reference import Reference
from transformers import MixtralForCausalLM
from typer.testing import CliRunner

from moe_ray.commands.main import app
from moe_ray.config import load_config
from moe_ray.errors import ConfigError
from moe_ray.quality.compare import compare
from moe_ray.quality.comparison import Comparison
from moe_ray.quality.scorer import Scorer
from moe_ray.quality.spool import Spool, SpoolDtype
from moe_ray.quality.windows import Passage

CONTEXT, STRIDE = 48, 32
TOKENS = np.random.default_rng(7).integers(3, 512, 150).tolist()


@pytest.fixture(scope="module")
def other_model(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with a little noise on every weight."""
    torch.manual_seed(1)
    model = MixtralForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
    directory = tmp_path_factory.mktemp("other") / "model"
    model.save_pretrained(directory)
    return directory


def compared(a: Path, b: Path, spool: SpoolDtype = "float32") -> Comparison:
    def load(path: Path) -> Scorer:
        config = load_config({"model": {"path": str(path), "dtype": "float32", "device": "cpu"}})
        return Scorer(config, path, CONTEXT)

    return compare(lambda: load(a), lambda: load(b), Passage(TOKENS, CONTEXT, STRIDE), spool)


def reference_rows(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each scored token but the first: log-probabilities [T, V], and routing weights by expert [T, layers, E]."""
    reference = Reference(path)
    logprobs, spreads = [], []
    for start in range(0, len(TOKENS), STRIDE):
        window = TOKENS[start : start + CONTEXT]
        rows = slice(0 if start == 0 else CONTEXT - STRIDE - 1, len(window) - 1)
        logprobs.append(reference.logprobs(window)[rows])
        spreads.append(reference.routing_weights(window)[rows])
        if start + CONTEXT >= len(TOKENS):
            break
    return torch.cat(logprobs), torch.cat(spreads)


def test_two_models_differ_as_transformers_says(random_model: Path, other_model: Path) -> None:
    found = compared(random_model, other_model)
    (log_a, spread_a), (log_b, spread_b) = reference_rows(random_model), reference_rows(other_model)
    kl = F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=1e-5)
    assert found.mean_kl.mean == pytest.approx(float(kl.mean()), rel=1e-4)

    best_a, best_b = log_a.argmax(-1), log_b.argmax(-1)
    np.testing.assert_array_equal(found.same_top, best_a == best_b)
    where = [i + 1 for i in (best_a != best_b).nonzero().flatten().tolist()]  # the first token is not scored
    assert [each.position for each in found.differences] == where[: len(found.differences)]
    first = found.differences[0]
    assert first.token_b == best_b[first.position - 1]
    assert first.probability_a == pytest.approx(float(log_a[first.position - 1].max().exp()), rel=1e-4)

    targets = torch.tensor(TOKENS[1:])
    losses_a, losses_b = (F.nll_loss(log, targets, reduction="none") for log in (log_a, log_b))
    assert found.a.value.mean == pytest.approx(float(losses_a.mean().exp()), rel=1e-5)
    assert found.ratio.mean == pytest.approx(float((losses_b - losses_a).mean().exp()), rel=1e-5)

    assert found.routing is not None
    for layer, agreement in enumerate(found.routing):
        a, b = spread_a[:, layer], spread_b[:, layer]
        same = ((a > 0) & (b > 0)).sum() / (a > 0).sum()
        assert agreement.same_experts == pytest.approx(float(same), abs=0.5 / len(TOKENS))
        assert agreement.weight_difference == pytest.approx(float((a - b).abs().sum(-1).mean() / 2), abs=1e-3)
    assert 0.5 < min(each.same_experts for each in found.routing) < 1


def test_a_model_does_not_differ_from_itself(random_model: Path) -> None:
    found = compared(random_model, random_model)
    assert found.kl.max() == 0
    assert found.same_top.all()
    assert found.differences == ()
    assert (found.ratio.mean, found.ratio.error) == (1.0, 0.0)
    assert found.routing is not None
    assert all((each.same_experts, each.weight_difference) == (1.0, 0.0) for each in found.routing)


def test_half_precision_on_disk_changes_little(random_model: Path, other_model: Path) -> None:
    exact, half = compared(random_model, other_model), compared(random_model, other_model, "float16")
    assert half.mean_kl.mean == pytest.approx(exact.mean_kl.mean, rel=2e-3)
    np.testing.assert_array_equal(half.a.losses, exact.a.losses)


def test_a_spool_that_the_disk_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"predictions of 50,000 tokens are .* GB in float32, and .* GB free: lower"):
        Spool(10**10, 50_000)


def test_models_of_other_vocabularies_are_not_compared(
    random_model: Path, readable_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(readable_model, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    result = CliRunner().invoke(app, ["compare", str(readable_model), str(tmp_path / "other")])
    assert isinstance(result.exception, ConfigError)
    assert "other tokenizers: their predictions cannot be compared" in str(result.exception)


def test_the_command_gives_b_options_of_its_own(readable_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A B C " * 40)
    options = ["--text", str(text), "--context", "32", "--dtype", "float32", "--set", "model.device=cpu"]
    command = ["compare", str(readable_model), *options]
    result = CliRunner().invoke(app, [*command, "--dtype-b", "float16", "--set-b", "model.kernels=torch", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["a"]["computed_by"].startswith("float32 on cpu")
    assert said["b"]["computed_by"].startswith("float16 on cpu, trunk and experts by torch")
    assert 0 < said["kl_mean"] < 0.02
    assert said["perplexity_ratio"] == pytest.approx(said["b"]["perplexity"] / said["a"]["perplexity"], rel=1e-6)
    assert [row["layer"] for row in said["routing"]] == [0, 1, 2, 3]
    shown = CliRunner().invoke(app, [*command, "--dtype-b", "float32"], env={"COLUMNS": "120"})
    assert "1.00000 ± 0.00000" in shown.stdout
    assert "the same for 100.00 %" in shown.stdout
    assert f"A  {readable_model.name}  float32 on cpu" in shown.stdout


@pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")
def test_b_alone_is_quantised_and_as_the_configuration_would(kernel_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A B C " * 30)
    command = ["compare", str(kernel_model), "--text", str(text), "--context", "32", "--dtype", "bfloat16", "--json"]

    def said(*options: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 0, result.output
        return cast(dict[str, Any], json.loads(result.stdout))

    def losses(found: dict[str, Any]) -> tuple[float, float]:
        return found["a"]["loss"], found["b"]["loss"]

    plain, of_b = said(), said("--quantize-b", "int4", "--quantize-trunk-b", "int8")
    assert (plain["kl_max"], of_b["kl_mean"] > 1e-4) == (0, True)
    assert of_b["a"]["loss"] == plain["a"]["loss"]
    assert losses(said("--set-b", "experts.quantize=int4", "--set-b", "trunk.quantize=int8")) == losses(of_b)
    of_both = said("--quantize", "int4", "--quantize-trunk", "int8")
    assert losses(of_both) == (of_b["b"]["loss"], of_b["b"]["loss"])
    stored = "--set-b", "experts.quantize=null", "--set-b", "trunk.quantize=null"
    assert losses(said("--quantize", "int4", "--quantize-trunk", "int8", *stored)) == losses(of_b)[::-1]
