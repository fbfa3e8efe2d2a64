"""Every process of an application as one row: from answers as they may be, and from a real application."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from served import Served

from moe_ray.commands.ps_report import process_view
from moe_ray.deploy.process_table import ProcessRow, process_rows

PLACE = {"node_id": "ab" * 20, "pss_bytes": 2**30, "rss_bytes": 2**31}
EXPERT = {
    **PLACE,
    "pid": 12,
    "device": "cuda",
    "format": "int4",
    "loaded_keys": 4,
    "keys": 4,
    "load": {"busy": 0.25, "seconds": 10.0, "rows_per_layer": {3: [100, 300]}},
}
TRUNK = {
    **PLACE,
    "pid": 11,
    "device": "cpu",
    "format": "bfloat16",
    "missing": ["Expert4"],
    "kv_blocks_total": 10,
    "kv_blocks_free": 9,
    "num_running": 2,
    "num_waiting": 1,
}


def deployment(name: str, *actors: dict[str, Any], **states: int) -> dict[str, Any]:
    return {"name": name, "status": "HEALTHY", "message": "why", "replica_states": states, "actors": list(actors)}


def test_rows() -> None:
    rows = process_rows(
        {
            "deployments": [
                deployment("Gateway", {**PLACE, "pid": 10, "pss_bytes": None}, RUNNING=1),
                deployment("Trunk", TRUNK, RUNNING=1),
                deployment("Expert3", {**EXPERT, "pid": 13, "loaded_keys": 1}, EXPERT, RUNNING=3, STARTING=1),
                deployment("Expert4", UPDATING=0),
            ]
        }
    )
    node = PLACE["node_id"]
    assert rows == [
        ProcessRow("Gateway", "running", 10, node, "cpu", "", 2**31, ""),
        ProcessRow("Trunk", "without Expert4", 11, node, "cpu", "bfloat16", 2**30, "2 running, 1 waiting, KV 10%"),
        ProcessRow("Expert3", "running", 12, node, "cuda", "int4", 2**30, "busy 25%, 40 rows/s"),
        ProcessRow("Expert3", "loading 1/4", 13, node, "cuda", "int4", 2**30, "busy 25%, 40 rows/s"),
        ProcessRow("Expert3", "does not answer"),
        ProcessRow("Expert3", "starting"),
        ProcessRow("Expert4", "healthy", load="why"),
    ]
    assert "node" not in shown(rows)
    assert "abababab" in shown([*rows, ProcessRow("Expert5", "running", 14, "cd" * 20)])


def shown(rows: list[ProcessRow]) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(process_view(rows))
    assert all(len(line) <= 80 for line in out.getvalue().splitlines())
    return out.getvalue()


def test_a_real_application(served_random: Served) -> None:
    from moe_ray.deploy.status import collect

    rows = process_rows(collect(name=served_random.app_name))
    experts = [name for e in range(8) for name in [f"Expert{e}"] * (2 if e == 3 else 1)]
    assert [row.actor for row in rows] == ["Gateway", "Trunk", *experts]
    assert {row.state for row in rows} == {"running"}
    assert len({row.pid for row in rows}) == 11
    assert {(row.device, row.format) for row in rows[1:]} == {("cpu", "float32")}
    assert all(row.memory_bytes for row in rows)
