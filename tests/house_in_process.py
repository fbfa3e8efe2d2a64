"""The page's house over a trunk in this process: its experts are real workers, and their counters are real."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from in_process import Trunk, served

from moe_ray.api.service import HttpOptions
from moe_ray.deploy.house_view import ModelFacts, house_view
from moe_ray.errors import InvalidRequest
from moe_ray.experts.server.load_counters import WINDOW_S, LoadSampler
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.model_config import ModelConfig


class HouseInProcess:
    """Nothing in it can be scaled or killed; `looks` counts how often it was asked."""

    control = False

    def __init__(self, directory: Path, trunk: Trunk, name: str = "random") -> None:
        model = ModelConfig.load(directory)
        self._facts = ModelFacts(name, model.num_hidden_layers, model.num_local_experts, model.num_experts_per_tok)
        self._trunk = trunk
        self.looks = 0
        self._replicas: list[tuple[Any, ExpertWorker, LoadSampler]] = []
        for replica in trunk.runtime._experts.table.replicas():
            worker: ExpertWorker = replica.link.handler.__self__  # type: ignore[attr-defined]
            self._replicas.append((replica, worker, LoadSampler(worker.key_loads)))

    async def look(self) -> dict[str, Any]:
        self.looks += 1
        info = self._trunk.info
        trunk = {
            "replica_id": info.replica_id,
            "model": self._facts.name,
            "node_id": info.node_id,
            "pid": info.pid,
            **self._trunk.runtime.status(),
        }
        answers = {f"Expert{i}": [self._answer(*each)] for i, each in enumerate(self._replicas)}
        return {**house_view(self._facts, {}, {"Trunk": [trunk]}, answers, []), "control": self.control}

    def _answer(self, replica: Any, worker: ExpertWorker, sampler: LoadSampler) -> dict[str, Any]:
        stats, keys = worker.stats(), len(worker.keys)
        return {
            "replica_id": replica.replica_id,
            "node_id": replica.info.node_id,
            "pid": replica.info.pid,
            "weight_bytes": stats.weight_bytes,
            "queued_rows": stats.queued_rows,
            "device": worker.compute.device,
            "format": worker.compute.dtype,
            "loaded_keys": keys,
            "keys": keys,
            "load": asdict(sampler.window(WINDOW_S)),
        }

    async def scale(self, expert: int, replicas: int | None) -> None:
        raise InvalidRequest("experts in this process have no replicas", "expert")

    async def kill(self, replica_id: str) -> None:
        raise InvalidRequest("experts in this process have no replicas", "replica_id")


@contextlib.contextmanager
def page_server(
    directory: Path, trunk: Trunk, options: HttpOptions | None = None, house: HouseInProcess | None = None
) -> Iterator[str]:
    """Serve the page on a loop of its own, in a thread; yields the URL."""
    ready: Future[str] = Future()
    loop = asyncio.new_event_loop()
    done = asyncio.Event()

    async def serve() -> None:
        async with served(directory, [trunk.info], options, house=house) as client:
            ready.set_result(str(client.base_url))
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="page-server")
    thread.start()
    try:
        yield ready.result(30)
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()
