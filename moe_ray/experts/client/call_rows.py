"""Between the routed rows of a layer and the rows of its calls: what is sent, and what is made of the replies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_ray.experts.client.call import Call
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.sharing import ExpertNumbers
from moe_ray.model.moe import Gathered, Routed, renormalise
from moe_ray.transport.base import CallBatch, Link, Replies


def batch_of(
    calls: Sequence[Call], routed: Routed, whole: bool = False, numbers: ExpertNumbers | None = None
) -> CallBatch:
    """The batch that carries these calls of one layer; `whole`: they are all its calls, and nothing is copied.

    `numbers`: by which replicas know the experts; None: by their own.
    """
    layer = calls[0].layer
    experts = [call.expert if numbers is None else numbers.of(layer, call.expert) for call in calls]
    counts = [call.count for call in calls]
    adapters = () if routed.token_adapters is None else [call.adapters for call in calls]
    if whole:
        return CallBatch(layer, experts, counts, routed.rows, routed.weights, adapters, routed.reply_rows())
    rows = [routed.rows[call.row_range] for call in calls]
    weights = [routed.weights[call.row_range] for call in calls]
    if len(calls) == 1:
        return CallBatch(layer, experts, counts, rows[0], weights[0], adapters)
    return CallBatch(layer, experts, counts, torch.cat(rows), torch.cat(weights), adapters)


def where_sent(routed: Routed, links: Sequence[Link], options: DispatchOptions) -> Routed:
    """The rows as these links take them: where they are, or in the host's memory."""
    stay = options.in_process or not options.card_rows or all(link.on_card for link in links)
    return routed if stay else routed.on_host()


def assemble(calls: Sequence[Call], routed: Routed, first: Replies | None) -> Gathered:
    """The rows of a layer whose calls are done or lost, [R, D] in row order; lost ones are renormalised away.

    `first`: the replies of the layer's first scatter. Where each call was answered there, nothing is copied.
    """
    if first is not None and all(call.answer is not None and call.answer.replies is first for call in calls):
        return Gathered(first.rows())
    rows: list[torch.Tensor] = []
    lost: list[slice] = []
    for call in calls:
        if call.answer is not None:
            rows.append(call.answer.replies.rows_of(call.answer.index))
        else:
            rows.append(torch.zeros_like(routed.rows[call.row_range]))
            lost.append(call.row_range)
    whole = torch.cat([each.to(routed.rows.device) for each in rows])
    return renormalise(whole, routed, lost) if lost else Gathered(whole)
