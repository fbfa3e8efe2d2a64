"""Shards that are written tensor by tensor are what safetensors reads, aligned and without gaps."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_ray.convert.shard_file import HEADER_BYTES, ShardFile
from moe_ray.convert.shards import ShardWriter
from moe_ray.errors import CheckpointError
from moe_ray.model.families import Weight
from moe_ray.model.safetensors_file import read_header

WEIGHT = Weight("norm", (4,))
TENSORS = {
    "bf16": torch.randn(3, 5).bfloat16(),  # ends at an odd multiple of 2 bytes
    "f32": torch.randn(7, 2).T,  # not contiguous
    "packed": torch.randint(-5, 5, (4, 8), dtype=torch.int32),
    "shape": torch.tensor([4, 64]),
    "f16": torch.randn(8).half(),
    "bytes": torch.arange(256).to(torch.uint8),
    "scalar": torch.tensor(2.5),
}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "bfloat16", 10**9) as shards:
        shards.add_tensors(WEIGHT, TENSORS)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2, "a second one begins where float32 would not be aligned"
    for file in files:
        found = load_file(file)
        assert found.keys() == {name for name, shard in index.items() if shard == file.name}
        for name, tensor in found.items():
            assert tensor.dtype == TENSORS[name].dtype
            assert torch.equal(tensor, TENSORS[name])
        for name, entry in read_header(file).items():
            assert entry.start % TENSORS[name].itemsize == 0
    assert index.keys() == TENSORS.keys()


def test_no_tensor_is_held(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "bfloat16", 10**9) as shards:
        tensor = torch.ones(1000)
        gone = weakref.ref(tensor)
        shards.add_tensors(WEIGHT, {"ones": tensor})
        del tensor
        gc.collect()
        assert gone() is None


def test_a_header_that_is_full_begins_a_new_shard(tmp_path: Path) -> None:
    names = [f"{'x' * 200}{i}" for i in range(500)]
    with ShardWriter(tmp_path, "bfloat16", 10**9) as shards:
        for i, name in enumerate(names):
            shards.add_tensors(WEIGHT, {name: torch.tensor([i])})
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found == {name: torch.tensor([i]) for i, name in enumerate(names)}
    assert all(min(entry.start for entry in read_header(file).values()) == HEADER_BYTES for file in files)


def test_a_full_disk_is_said() -> None:
    shard = ShardFile(Path("/dev/full"))
    with pytest.raises(CheckpointError, match=r"cannot write /dev/full: .*No space left"):
        shard.write("a", torch.zeros(10**6))
