"""Which adapter is added for which rows of a call, on the wire: runs of consecutive rows, each of one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from moe_ray.core import AdapterRows
from moe_ray.errors import InvalidCall, ProtocolError
from moe_ray.pb import moe_ray_pb2 as pb

MAX_ADAPTER_RUNS: Final = 64
"""Of a call."""
_MAX_ADAPTER_ID: Final = 2**64 - 1


def check_runs(runs: Sequence[AdapterRows], num_rows: int) -> None:
    """Raise `InvalidCall` unless these are no runs, or runs of so many rows that a header can carry."""
    if not runs:
        return
    if len(runs) > MAX_ADAPTER_RUNS:
        raise InvalidCall(f"adapters has {len(runs)} runs of rows, at most {MAX_ADAPTER_RUNS} are allowed")
    for run in runs:
        if not 0 <= run.adapter_id <= _MAX_ADAPTER_ID:
            raise InvalidCall(f"adapter_id is {run.adapter_id}, expected 0..{_MAX_ADAPTER_ID}")
        if run.count < 1:
            raise InvalidCall(f"adapters has a run of {run.count} rows, expected at least 1")
    total = sum(run.count for run in runs)
    if total != num_rows:
        raise InvalidCall(f"adapters has runs of {total} rows in all, expected {num_rows}")


def runs_of(header: pb.ExpertCallHeader) -> tuple[AdapterRows, ...]:
    """The runs of rows that a header tells. Raises `ProtocolError`."""
    ids, rows = header.adapter_ids, header.adapter_rows
    if len(ids) != len(rows):
        raise ProtocolError(f"header.adapter_ids has {len(ids)} items, header.adapter_rows {len(rows)}")
    runs = tuple(AdapterRows(adapter_id, count) for adapter_id, count in zip(ids, rows, strict=True))
    try:
        check_runs(runs, header.num_rows)
    except InvalidCall as error:
        raise ProtocolError(f"header: {error}") from None
    return runs
