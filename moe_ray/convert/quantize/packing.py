"""Codes as compressed-tensors' "pack-quantized" tensors."""

from __future__ import annotations

import numpy as np
import torch

from moe_ray.model.formats import GroupedCodes, Place
from moe_ray.model.formats.grouped import MIDDLE


def pack_codes(place: Place, weight: GroupedCodes) -> dict[str, torch.Tensor]:
    """The "pack-quantized" tensors of a weight of 4 or 8 bits with scales that bfloat16 holds."""
    how = weight.grouping
    n, k = weight.shape
    columns = weight.codes
    if weight.order is not None:
        columns = np.empty_like(weight.codes)
        columns[:, weight.order] = weight.codes
    tensors = {
        place.named("weight_packed"): torch.from_numpy(_words(columns, how.bits)),
        place.named("weight_scale"): torch.from_numpy(weight.scales).bfloat16(),
        place.named("weight_shape"): torch.tensor([n, k]),
    }
    if weight.offsets is not None:
        zeros = np.rint(MIDDLE[how.bits] - weight.offsets / weight.scales).astype(np.uint8)
        tensors[place.named("weight_zero_point")] = torch.from_numpy(
            np.ascontiguousarray(_words(np.ascontiguousarray(zeros.T), how.bits).T)
        )
    if weight.order is not None:
        index = np.empty(k, np.int32)
        index[weight.order] = np.arange(k) // how.group
        tensors[place.named("weight_g_idx")] = torch.from_numpy(index)
    return tensors


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [N, ceil(K * bits / 32)], the first code in the lowest bits."""
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    joined = padded if bits == 8 else padded[:, 0::2] | padded[:, 1::2] << 4
    return np.ascontiguousarray(joined).view(np.int32)
