"""Writes a checkpoint's weights as safetensors shards with an index, in the names that Mixtral's converters write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch

from moe_ray.convert.shard_file import ShardFile
from moe_ray.model.families import Layout, Weight
from moe_ray.model.families.mixtral import MIXTRAL
from moe_ray.model.foreign import INDEX
from moe_ray.model.formats import FLOATS, Place

LAYOUT: Final[Layout] = MIXTRAL.layouts[0]


def place_of(weight: Weight) -> Place:
    """Where a weight is written. No tensor of this layout stacks experts, so it does not matter how many there are."""
    return LAYOUT.place(weight, 0)


class ShardWriter:
    """Writes tensors in order to safetensors shards, each when it comes; the index on a clean exit."""

    def __init__(self, directory: Path, weight_format: str, shard_bytes: int) -> None:
        """`weight_format`: a row of `FLOATS`. `shard_bytes`: of tensors in one file, where one is not larger."""
        self.parameters = self.total_bytes = self.count = 0
        self._format = FLOATS[weight_format]
        self._directory = directory
        self._limit = shard_bytes
        self._shard: ShardFile | None = None
        self._shard_of: dict[str, int] = {}

    def add(self, weight: Weight, values: torch.Tensor) -> None:
        """Pack one weight and write its tensors. Raises `CheckpointError` where that cannot be done."""
        self.add_tensors(weight, self._format.pack(place_of(weight), values))

    def add_tensors(self, weight: Weight, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the tensors of one weight, in whatever format. Raises `CheckpointError` as `add` does."""
        for name, tensor in tensors.items():
            shard = self._shard_for(name, tensor)
            shard.write(name, tensor)
            self._shard_of[name] = self.count - 1
            self.total_bytes += tensor.nbytes
        self.parameters += weight.numel

    def _shard_for(self, name: str, tensor: torch.Tensor) -> ShardFile:
        """The shard that takes a tensor: the one that is being written, or a new one."""
        shard = self._shard
        if shard is not None:
            fits = shard.data_bytes + tensor.nbytes <= self._limit or not shard.data_bytes
            if fits and shard.takes(name, tensor):
                return shard
            shard.close()
        self._shard = ShardFile(self._directory / f"{self.count}.partial")
        self.count += 1
        return self._shard

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if self._shard is not None:
                self._shard.abandon()
            return
        if self._shard is not None:
            self._shard.close()
        names = [f"model-{shard + 1:05d}-of-{self.count:05d}.safetensors" for shard in range(self.count)]
        for shard, name in enumerate(names):
            (self._directory / f"{shard}.partial").rename(self._directory / name)
        write_json(
            self._directory / INDEX,
            {
                "metadata": {"total_parameters": self.parameters, "total_size": self.total_bytes},
                "weight_map": {tensor: names[shard] for tensor, shard in self._shard_of.items()},
            },
        )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
