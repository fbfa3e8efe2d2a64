"""What experts of Mixtral-8x7B would launch, by name of what they hold: on the `meta` device, which has no memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch

from moe_ray.core import AdapterRows
from moe_ray.model.compute.native.held_form import HeldForm
from moe_ray.model.compute.triton.expert import TritonFFN
from moe_ray.model.compute.triton.launch import Launch
from moe_ray.model.compute.triton.reading import blank_expert
from moe_ray.model.families import ClampedSwiGLU
from moe_ray.model.formats.grouped import Grouping
from moe_ray.model.formats.held import GROUPINGS
from moe_ray.model.lora.parts import ExpertPart, LowRank

HIDDEN, INNER = 4096, 14336
HELD: Final[dict[str, Grouping | None]] = {
    "floats": None,
    **GROUPINGS,
    "gptq": Grouping(4, 128, offsets=True, reordered=True),
    "awq": Grouping(4, 64, offsets=True),
    "rows": Grouping(8, 0),
    "fp8": Grouping(8, 128, float8="e4m3"),
    "fp8-rows": Grouping(8, 0, float8="e5m2"),
    "gpt-oss": Grouping(4, 32, levels=tuple(float(x) for x in range(16))),
}


def launches(name: str) -> Iterator[Launch]:
    """`name`: of `HELD`, and a dtype; with "adapter" behind, what an adapter has launched as well."""
    held, dtype, *more = name.split()
    how = HELD[held]
    forms = []
    for inputs in (HIDDEN, INNER):
        of_rows = how is not None and not how.group
        forms.append(HeldForm(dtype, replace(how, group=inputs) if how is not None and of_rows else how))
    clamped = ClampedSwiGLU(7.0, 1.702) if held == "gpt-oss" else None
    ffn = TritonFFN(blank_expert((forms[0], forms[1]), (INNER, HIDDEN), clamped is not None, "meta"), clamped)
    rows = torch.empty(64, HIDDEN, dtype=getattr(torch, dtype), device="meta")
    runs: tuple[AdapterRows, ...] = ()
    if more:
        ffn.add_adapter(1, _part())
        runs = (AdapterRows(1, 64),)
    weights = torch.empty(64, device="meta")
    return ffn.launches(rows, weights, torch.empty_like(rows), runs)


def _part() -> ExpertPart:
    import numpy as np

    def thin(n: int, k: int) -> LowRank:
        return LowRank(np.zeros((8, k), np.float32), np.zeros((n, 8), np.float32), 1.0)

    return ExpertPart(thin(INNER, HIDDEN), thin(INNER, HIDDEN), thin(HIDDEN, INNER))
