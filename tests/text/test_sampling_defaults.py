"""The sampling that generation_config.json recommends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_ray.errors import CheckpointError
from moe_ray.text.sampling_defaults import sampling_defaults


def test_what_is_recommended(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    said = {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": None, "do_sample": True, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_k": 40, "top_p": 0.9}


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "0.6"), ("temperature", 9), ("top_k", 1.5), ("top_p", [1]), ("top_p", True)]
)
def test_what_no_request_could_use_is_refused_by_file_and_key(name: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: `{name}` must be"):
        sampling_defaults(tmp_path)
