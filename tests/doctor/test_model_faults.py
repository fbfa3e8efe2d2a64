"""`moe-ray doctor --model`: checkpoints with something missing or wrong, and what the Hub says of others."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hub_answers import hub

from moe_ray.commands.doctor import subject_of
from moe_ray.doctor import checkpoints
from moe_ray.doctor.finding import Finding

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4898669\n"


def examine(model: Path | str) -> dict[str, Finding]:
    found: Sequence[Finding] = checkpoints.examine_model(subject_of(str(model), None, 8000, "auto"))
    assert all(bool(finding.mend) == (finding.level != "ok") for finding in found)
    assert all("\n" not in finding.says for finding in found)
    return {finding.check: finding for finding in found}


@pytest.fixture
def model(readable_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil; its tokenizer has a chat template."""
    return Path(shutil.copytree(readable_model, tmp_path / "model"))


def test_a_good_model(model: Path) -> None:
    found = examine(model)
    assert {check: finding.level for check, finding in found.items()} == {"model": "ok", "tokenizer": "ok", "fit": "ok"}
    assert not checkpoints.examine_model(subject_of(None, None, 8000, "auto")), "no model is asked about"


def test_lfs_pointers(model: Path) -> None:
    (model / "model.safetensors").write_text(POINTER.format("0" * 64))
    found = examine(model)
    assert list(found) == ["model"]
    assert "model.safetensors are Git LFS pointers" in found["model"].says
    assert "lfs pull" in found["model"].mend


def test_a_missing_part(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    found = examine(model)
    assert "the index names model-00002-of-00002.safetensors, which is missing" in found["model"].says


def test_a_truncated_file(model: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    found = examine(model)
    assert "not a whole safetensors file" in found["model"].says
    assert "fit" not in found


def test_tokenizers(model: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    assert examine(model)["tokenizer"].level == "warning"
    (model / "tokenizer.json").unlink()
    finding = examine(model)["tokenizer"]
    assert finding.level == "error"
    assert "no tokenizer" in finding.says


def test_a_model_that_is_too_large_or_nowhere() -> None:
    facts = checkpoints.CheckpointState("x", Path("/x"), needed=90 * 2**30, available=16 * 2**30)
    (finding,) = checkpoints.check_fit(facts)
    assert finding.says.startswith("90.0 GiB needed with a small KV cache, 16.0 GiB free")
    assert checkpoints.check_fit(replace(facts, available=95 * 2**30))[0].level == "ok"
    nowhere = examine("/no/such/model")
    assert "neither a directory" in nowhere["model"].says


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (200, "", "the Hub has it"),
        (404, "RepoNotFound", "has no owner/mixtral that this user may see"),
        (403, "GatedRepo", "is gated"),
        (500, "", "the Hub does not give it"),
    ],
)
def test_a_repository_that_is_not_here(
    status: int, code: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub(status, time.time(), code) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
        finding = examine("owner/mixtral")["model"]
    assert says in finding.says
    assert finding.level == ("ok" if status == 200 else "error")
