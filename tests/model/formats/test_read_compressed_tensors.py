"""compressed-tensors checkpoints are read as the package compressed-tensors itself decompresses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import quantised
import torch

from moe_ray.errors import CheckpointError
from moe_ray.model.formats import GroupedCodes, Grouping, Place, Source, TensorEntry
from moe_ray.model.formats.compressed_tensors import PACKED, pack_codes

pytest.importorskip("compressed_tensors", reason="the reference")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams


def arguments(bits: int, symmetric: bool, strategy: str, group: int | None) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}


def settings(weights: dict[str, Any], stored_as: str) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*block_sparse_moe.gate"],
    }


def theirs(values: torch.Tensor, weights: dict[str, Any], stored_as: str, dtype: torch.dtype) -> quantised.Made:
    """Scales, zero points, packing and values all by compressed-tensors."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    n, k = values.shape
    grouped = {
        "tensor": values.reshape(1, -1),
        "channel": values,
        "group": values.reshape(n, -1, weights["group_size"] or k),
    }[weights["strategy"]]
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    scale = scale.to(dtype)
    if weights["strategy"] == "channel":
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    compressor = BaseCompressor.get_value_from_registry(stored_as)
    state = {"weight": values.to(dtype), "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    packed = compressor.compress(state, scheme)
    if weights["symmetric"]:
        packed.pop("weight_zero_point", None)
    in_float32 = {**packed, "weight_scale": scale.float()}  # it multiplies in the dtype of the scales
    return packed, compressor.decompress(in_float32, scheme)["weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "stored_as"), [(4, "pack-quantized"), (8, "pack-quantized"), (8, "int-quantized")])
@pytest.mark.parametrize(("strategy", "group"), [("group", 32), ("group", 128), ("channel", None), ("tensor", None)])
def test_integers(
    strategy: str,
    group: int | None,
    bits: int,
    stored_as: str,
    symmetric: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = arguments(bits, symmetric, strategy, group)
    written = quantised.write(
        tmp_path, lambda values: theirs(values, weights, stored_as, dtype), settings(weights, stored_as)
    )
    quantised.read_equals(
        written, caplog, stored_as, lambda shape: Grouping(bits, group or shape[1], offsets=not symmetric)
    )


def source_of(tensors: dict[str, torch.Tensor]) -> Source:
    codes = {"int32": "I32", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    entries = {
        name: TensorEntry(codes[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    }
    return Source(entries.get, lambda name: tensors[name].numpy())


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("scales", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_packed_is_found_and_is_theirs(bits: int, offsets: bool, reordered: bool, scales: str) -> None:
    random = np.random.default_rng(bits)
    n, k, group = 36, 96, 32
    scale = torch.from_numpy(random.random((n, k // group), np.float32) + 0.01).to(getattr(torch, scales)).float()
    zeros = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), scale.shape)
    weight = GroupedCodes(
        Grouping(bits, group, offsets, reordered=reordered),
        random.integers(0, 2**bits, (n, k)).astype(np.uint8),
        scale.numpy(),
        -scale.numpy() * zeros.astype(np.float32) if offsets else None,
        random.permutation(k).astype(np.int32) if reordered else None,
    )
    if weight.order is not None:  # of the columns of a group, the format keeps no order
        weight.order.reshape(-1, group).sort()
    place = Place("model.layers.0.block_sparse_moe.experts.0.w1")
    tensors = pack_codes(place, weight)
    assert tensors[place.named("weight_scale")].dtype == getattr(torch, scales)
    stored = PACKED.find(place, (n, k), source_of(tensors))
    assert stored is not None
    assert stored.grouping == weight.grouping
    back = PACKED.codes(stored, [as_numpy(tensors[part.name]) for part in stored.parts])
    assert back is not None
    np.testing.assert_array_equal(back.codes, weight.codes)
    np.testing.assert_array_equal(back.scales, weight.scales)
    np.testing.assert_array_equal(back.order, weight.order) if reordered else None
    np.testing.assert_array_equal(back.values(), weight.values())
    if reordered:
        return  # which compressed-tensors reads no more
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**arguments(bits, not offsets, "group", group))
    )
    state = {name.removeprefix(f"{place.stem}."): tensor for name, tensor in tensors.items()}
    state["weight_scale"] = state["weight_scale"].float()
    read = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
    np.testing.assert_allclose(read.numpy(), weight.values(), rtol=1e-6, atol=1e-6 * 2**bits)


def test_what_it_cannot_hold() -> None:
    levels = tuple(float(i) for i in range(16))
    codes, scales = np.zeros((4, 32), np.uint8), np.ones((4, 1), np.float32)
    with pytest.raises(CheckpointError, match="x: pack-quantized holds integers, not a table of levels"):
        pack_codes(Place("x"), GroupedCodes(Grouping(4, 32, levels=levels), codes, scales))
    for offset in (0.5, 9.0):
        with pytest.raises(CheckpointError, match="x: pack-quantized holds zero points of 4 bits only"):
            pack_codes(Place("x"), GroupedCodes(Grouping(4, 32, offsets=True), codes, scales, scales * offset))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_scale": None}, ["weight_packed", "weight_scale is missing beside it"]),
        ({"weight_scale": torch.ones(256, 3)}, ["weight_scale", "shape [256, 3]"]),
        ({"weight_scale": torch.ones(256, 4, dtype=torch.int32)}, ["weight_scale", "dtype I32, supported: F16"]),
        ({"weight_packed": torch.zeros(256, 8, dtype=torch.int32)}, ["weight_packed", "shape [256, 8]"]),
        ({"weight_packed": torch.zeros(256, 16)}, ["weight_packed", "dtype F32, supported: I32"]),
        ({"weight_shape": torch.tensor([256, 130])}, ["weight_shape", "[256, 130], config.json implies [256, 128]"]),
        ({"weight_zero_point": torch.zeros(256, 4, dtype=torch.int32)}, ["weight_zero_point", "I32 of [32, 4]"]),
        ({"weight_g_idx": torch.full((128,), 4, dtype=torch.int32)}, ["weight_g_idx", "damaged: groups 4 to 4"]),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, ["weight_g_idx", "of shape [64]"]),
        ({"weight_packed": None}, ["tensor model.layers.0.block_sparse_moe.experts.0.w1.weight is missing"]),
    ],
    ids=str,
)
def test_damage(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    weights = arguments(4, True, "group", 32)
    written = quantised.write(
        tmp_path,
        lambda values: theirs(values, weights, "pack-quantized", torch.float16),
        settings(weights, "pack-quantized"),
    )
    quantised.refused(written.change(**change), *named)


@pytest.mark.parametrize("even", [True, False])
def test_order_of_activations(even: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """weight_g_idx, which compressed-tensors wrote until 2026: by its formula, applied to its values without it."""
    weights, group = arguments(4, False, "group", 32), 32
    random = torch.Generator().manual_seed(3)

    def with_index(values: torch.Tensor) -> quantised.Made:
        packed, plain = theirs(values, weights, "pack-quantized", torch.float16)
        k = values.shape[1]
        index = torch.arange(k) // group
        if not even:
            index[:4] = 1
        index = index[torch.randperm(k, generator=random)]
        ones = {**packed, "weight_scale": torch.ones(packed["weight_scale"].shape), "weight_zero_point": None}
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments(4, True, "group", group)))
        codes = BaseCompressor.get_value_from_registry("pack-quantized").decompress(ones, scheme)["weight"]
        zeros = codes - plain / packed["weight_scale"].float().repeat_interleave(group, 1)
        zeros = zeros[:, ::group].round()
        scale = packed["weight_scale"].float()
        packed["weight_g_idx"] = index.to(torch.int32)
        return packed, (codes - zeros[:, index]) * scale[:, index]

    written = quantised.write(tmp_path, with_index, settings(weights, "pack-quantized"))
    grouping = Grouping(4, group, offsets=True, reordered=True)
    quantised.read_equals(written, caplog, "pack-quantized", lambda shape: grouping if even else None)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24' is not read; read are 'pack-quantized'"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "format 'sparse-24-bitmask' is not read"),
    ],
)
def test_relatives_are_refused_by_name(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    weights = arguments(4, True, "group", 32)
    quantised.write(
        tmp_path,
        lambda values: theirs(values, weights, "pack-quantized", torch.float16),
        {**settings(weights, "pack-quantized"), **changed},
    )
    quantised.refused(tmp_path, named, "config.json")
