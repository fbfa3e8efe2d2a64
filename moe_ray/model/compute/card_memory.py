"""The budget of memory that one process has on a card which others use, too."""

from __future__ import annotations

import logging

from moe_ray.errors import OverBudget

logger = logging.getLogger(__name__)
GIB = 2**30


def check_budget(whose: str, need_bytes: int, budget_bytes: int | None) -> None:
    """Raise `OverBudget` naming both where `whose` weights need more bytes than the budget; None: there is none."""
    if budget_bytes is not None and need_bytes > budget_bytes:
        raise OverBudget(
            f"{whose}: needs {need_bytes / GIB:.4g} GiB, its budget (gpu_memory_gib) is {budget_bytes / GIB:.4g} GiB: "
            f"hold the weights in fewer bits (quantize), or raise the budget, or place fewer actors on the card"
        )


def share_of(budget_bytes: int, total_bytes: int) -> float:
    """The budget as a share of a card's memory, at most 1."""
    return min(1.0, budget_bytes / total_bytes)


def limit_card_memory(budget_bytes: int | None, device: str) -> None:
    """Let torch take no more of its card than the budget in this process: before it takes any. Nothing on a CPU."""
    if budget_bytes is None or device != "cuda":
        return
    import torch

    total = torch.cuda.get_device_properties(torch.device(device)).total_memory
    torch.cuda.set_per_process_memory_fraction(share_of(budget_bytes, total))
    logger.info("at most %.2f GiB of this card's %.2f", budget_bytes / GIB, total / GIB)
