"""What `moe-ray ps` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from moe_ray.deploy.process_table import ProcessRow

COLUMNS = ("actor", "pid", "node", "device", "format", "memory", "state", "load")


def process_view(rows: Sequence[ProcessRow]) -> Table:
    """A table that fits 80 columns; the nodes are shown where there is more than one."""
    nodes = {row.node for row in rows if row.node}
    shown = [column for column in COLUMNS if column != "node" or len(nodes) > 1]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in shown:
        table.add_column(column, justify="right" if column in ("pid", "memory") else "left")
    for row in rows:
        cells = {
            "actor": row.actor,
            "pid": "-" if row.pid is None else str(row.pid),
            "node": row.node[:8],
            "device": row.device,
            "format": row.format,
            "memory": "-" if row.memory_bytes is None else f"{row.memory_bytes / 2**20:,.0f} MiB",
            "state": row.state,
            "load": row.load,
        }
        table.add_row(*(cells[column] for column in shown))
    return table
