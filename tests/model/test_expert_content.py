"""Which experts of two checkpoints are equal: by where their bytes lie, by a few rows, by all of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from variant_models import save_variant

from moe_ray.core import ExpertKey
from moe_ray.errors import ConfigError
from moe_ray.experts.sharing import share
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.expert_content import MEMORY, check_alike, contents_of
from moe_ray.model.foreign import SINGLE


def tables(base: Path, variant: Path, memory: Path | None = None) -> tuple[list[list[int]], int]:
    """The variant's numbers, and how many bytes were read in full to find them."""
    told = [(0, 0)]
    contents = contents_of(
        [Checkpoint.open(base), Checkpoint.open(variant)], memory, lambda done, total: told.append((done, total))
    )
    return [list(row) for row in share(contents)[1].table], told[-1][0]


def own_two(key: ExpertKey) -> int | None:
    """Experts 2 and 5 differ in all layers, expert 7 in layer 1; experts 0 and 1 are swapped in layer 3."""
    layer, expert = key
    if expert in (2, 5) or key == (1, 7):
        return None
    return 1 - expert if layer == 3 and expert < 2 else expert


def test_equal_experts_are_found_wherever_they_are(random_model: Path, tmp_path: Path) -> None:
    variant = save_variant(random_model, tmp_path / "variant", own_two)
    found, read = tables(random_model, variant, tmp_path)
    ours = [0, 1, 10, 3, 4, 13, 6, 7]
    assert found == [ours, [0, 1, 10, 3, 4, 13, 6, 15], ours, [1, 0, 10, 3, 4, 13, 6, 7]]
    one_expert = 3 * 64 * 112 * 4
    shared = 6 * 4 - 1
    assert read == 2 * shared * one_expert, "experts with other rows are not read in full"


def test_the_same_file_is_not_read(random_model: Path, tmp_path: Path) -> None:
    variant = tmp_path / "linked"
    shutil.copytree(random_model, variant, ignore=shutil.ignore_patterns(SINGLE))
    os.link(random_model / SINGLE, variant / SINGLE)
    assert tables(random_model, variant) == ([list(range(8))] * 4, 0)


def test_files_of_one_name_in_the_hubs_cache_are_the_same(random_model: Path, tmp_path: Path) -> None:
    made = []
    for repo in ("one", "two"):
        blob = tmp_path / repo / "blobs" / ("ab" * 32)
        snapshot = tmp_path / repo / "snapshots" / "main"
        blob.parent.mkdir(parents=True)
        shutil.copytree(random_model, snapshot, ignore=shutil.ignore_patterns(SINGLE))
        shutil.copy(random_model / SINGLE, blob)
        (snapshot / SINGLE).symlink_to(blob)
        made.append(snapshot)
    assert tables(*made) == ([list(range(8))] * 4, 0)


def test_one_byte_between_the_sampled_rows_counts(random_model: Path, tmp_path: Path) -> None:
    variant = shutil.copytree(random_model, tmp_path / "variant")
    tensors = load_file(variant / SINGLE)
    name = next(name for name in tensors if ".layers.2." in name and ".experts.4." in name and "w1" in name)
    tensors[name][1, 0] = torch.nextafter(tensors[name][1, 0], torch.tensor(9.0))
    save_file(tensors, variant / SINGLE, metadata={"format": "pt"})
    expected = [list(range(8)) for _ in range(4)]
    expected[2][4] = 12
    assert tables(random_model, variant)[0] == expected


def test_digests_are_remembered_until_a_file_changes(random_model: Path, tmp_path: Path) -> None:
    variant = shutil.copytree(random_model, tmp_path / "variant")
    first, read = tables(random_model, variant, tmp_path)
    assert read > 0
    assert tables(random_model, variant, tmp_path) == (first, 0)
    os.utime(variant / SINGLE, ns=(1, 1))
    assert tables(random_model, variant, tmp_path) == (first, read // 2)
    (tmp_path / MEMORY).write_text("[] spoilt")
    assert tables(random_model, variant, tmp_path) == (first, read)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"intermediate_size": 96}, r"variant 'tuned': its intermediate_size is 96, that of the first model is 112"),
        ({"num_local_experts": 4}, r"its num_local_experts is 4, that of the first model is 8"),
        ({"num_hidden_layers": 3}, r"its num_hidden_layers is 3"),
        ({"hidden_act": "gelu"}, r"its hidden_act is gelu"),
        ({"dtype": "bfloat16"}, r"its dtype is bfloat16.*`model.dtype`"),
    ],
)
def test_what_experts_need_must_be_alike(random_model: Path, change: dict[str, object], says: str) -> None:
    from moe_ray.model.model_config import ModelConfig

    raw = json.loads((random_model / "config.json").read_text())
    base, other = ModelConfig.from_dict(raw), ModelConfig.from_dict({**raw, **change})
    with pytest.raises(ConfigError, match=says):
        check_alike(base, other, "tuned", same_dtype=True)


def test_what_only_trunks_need_may_differ(random_model: Path) -> None:
    from moe_ray.model.model_config import ModelConfig

    raw = json.loads((random_model / "config.json").read_text())
    other = {**raw, "vocab_size": 300, "num_experts_per_tok": 1, "eos_token_id": 5, "dtype": "bfloat16"}
    check_alike(ModelConfig.from_dict(raw), ModelConfig.from_dict(other), "tuned", same_dtype=False)
