"""The process of `bench gpu` that times kernels: what it holds on the card is gone before an engine is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_ray.bench.child import Parent, answer_commands
from moe_ray.bench.gpu_kernels import KernelTable


def kernels(device: str, kernels: str, rows: list[int], cache_dir: str, directories: dict[str, str]) -> dict[str, Any]:
    """Time one expert's layer of each checkpoint; answers the table and what the device is. Raises `ConfigError`."""
    table = KernelTable(device, kernels, tuple(rows), Path(cache_dir))
    found, facts = table.measured({weights: Path(directory) for weights, directory in directories.items()})
    return {"rows": found, "facts": facts}


def main() -> None:
    """Answer `kernels`."""
    answer_commands(Parent(), {"kernels": kernels})


if __name__ == "__main__":
    main()
