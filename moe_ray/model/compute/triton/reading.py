"""Makes the weights of an expert that Triton's kernels compute: of a checkpoint's matrices, or blank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_ray.model.compute.native.held_form import HeldForm, check_one_order
from moe_ray.model.compute.triton.expert import ExpertWeights
from moe_ray.model.compute.triton.tiles import CodeTensors, TiledWeight, Tiling, tiled_codes, tiled_floats
from moe_ray.model.formats.grouped import GroupedCodes, Grouping
from moe_ray.model.formats.rounding import CHUNK, fit, nearest
from moe_ray.model.matrix import Matrix, tensor_of


def hold_tiled(form: HeldForm, device: torch.device, *matrices: Sequence[Matrix]) -> TiledWeight:
    """Read matrices and tile them in turns, as `form` says. Each is given as weights [N, K] one above the other.

    What is quantised on load is rounded on `device`. Raises `CheckpointError`.
    """
    dtype: torch.dtype = getattr(torch, form.dtype)
    how = form.grouping
    if how is None:
        floats = [torch.cat([tensor_of(each.values()).to(device, dtype) for each in rows]) for rows in matrices]
        return tiled_floats(floats, dtype)
    if form.as_stored:
        codes = [[each.codes() for each in rows] for rows in matrices]
        check_one_order([each for rows in codes for each in rows])
        return tiled_codes([_stacked([_moved(each, device) for each in rows]) for rows in codes], how, dtype)
    return tiled_codes(
        [_stacked([round_on(tensor_of(each.values()).to(device), how) for each in rows]) for rows in matrices],
        how,
        dtype,
    )


def _stacked(rows: Sequence[CodeTensors]) -> CodeTensors:
    """Weights of one grouping and order, one above the other."""
    if len(rows) == 1:
        return rows[0]
    offsets = [each.offsets for each in rows if each.offsets is not None]
    return CodeTensors(
        torch.cat([each.codes for each in rows]),
        torch.cat([each.scales for each in rows]),
        torch.cat(offsets) if offsets else None,
        rows[0].order,
    )


def blank_expert(
    forms: tuple[HeldForm, HeldForm], shape: tuple[int, int], biases: bool, device: torch.device | str = "cpu"
) -> ExpertWeights:
    """Memory for an expert whose gate and up are [I, D] = `shape`. `forms`: of gate and up, and of down."""
    inner, hidden = shape
    w13, w2 = (
        TiledWeight.blank(Tiling(n, k, count, getattr(torch, form.dtype), form.grouping), device)
        for form, n, k, count in ((forms[0], inner, hidden, 2), (forms[1], hidden, inner, 1))
    )
    if not biases:
        return ExpertWeights(w13, w2)
    of_13, of_2 = (torch.empty(length, dtype=torch.float32, device=device) for length in (2 * inner, hidden))
    return ExpertWeights(w13, w2, of_13, of_2)


def read_expert(
    forms: tuple[HeldForm, HeldForm],
    matrices: tuple[Matrix, Matrix, Matrix],
    biases: Sequence[torch.Tensor],
    device: torch.device,
) -> ExpertWeights:
    """Read gate, up and down; `biases`: theirs, or none. Raises `CheckpointError`."""
    gate, up, down = matrices
    w13, w2 = hold_tiled(forms[0], device, [gate], [up]), hold_tiled(forms[1], device, [down])
    if not biases:
        return ExpertWeights(w13, w2)
    of_gate, of_up, of_down = (bias.to(device, torch.float32) for bias in biases)
    return ExpertWeights(w13, w2, torch.cat((of_gate, of_up)), of_down.contiguous())


def round_on(values: torch.Tensor, grouping: Grouping) -> CodeTensors:
    """Codes of float values [N, K], as `formats.rounding` rounds them, on their device.

    But levels always span the largest value of a group, as where the native kernels round.
    """
    n, k = values.shape
    codes = torch.empty((n, k), dtype=torch.uint8, device=values.device)
    scales = torch.empty((n, k // grouping.group), device=values.device)
    offsets = torch.empty_like(scales) if grouping.offsets else None
    rows = max(1, CHUNK // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        chunk = values[part].float()
        scales[part], offset = fit(chunk, grouping, search=grouping.levels is None)
        if offsets is not None and offset is not None:
            offsets[part] = offset
        codes[part] = nearest(chunk, scales[part], offset, grouping)
    return CodeTensors(codes, scales, offsets)


def _moved(codes: GroupedCodes, device: torch.device) -> CodeTensors:
    arrays = (codes.codes, codes.scales, codes.offsets, codes.order)
    of_codes, scales, offsets, order = (None if each is None else torch.from_numpy(each).to(device) for each in arrays)
    assert of_codes is not None
    assert scales is not None
    return CodeTensors(of_codes, scales, offsets, order)
