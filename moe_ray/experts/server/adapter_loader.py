"""How a replica comes by its parts of adapters: read one after the other beside its serving, as trunks want them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_ray.errors import AdapterError, MoeRayError
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.lora.adapter_file import read_adapter
from moe_ray.model.model_config import ModelConfig

logger = logging.getLogger(__name__)


class AdapterLoader:
    """The adapters of one replica. From any thread; they are loaded on one of its own."""

    def __init__(
        self,
        name: str,
        worker: ExpertWorker,
        config: ModelConfig,
        locate: Callable[[str], Path] = Path,
        complete: Callable[[], bool] = lambda: True,
    ) -> None:
        """`locate`: from the source of an adapter to its directory. `complete`: whether all keys are in `worker`."""
        self._name, self._worker, self._config = name, worker, config
        self._locate, self._complete = locate, complete
        self._lock = threading.Lock()
        self._held: frozenset[int] = frozenset()
        self._loading: set[int] = set()
        self._unwanted: set[int] = set()
        """Those of `_loading` that were given up meanwhile."""
        self._faults: dict[int, str] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-load")

    @property
    def held(self) -> frozenset[int]:
        """Ids of the adapters that are held for every key."""
        return self._held

    @property
    def faults(self) -> dict[int, str]:
        """Adapter id → why it could not be loaded when it was asked for last."""
        with self._lock:
            return dict(self._faults)

    def ask(self, wanted: Mapping[int, str], unwanted: Collection[int] = ()) -> None:
        """Begin to load what is wanted (id → source) and not here, forget the unwanted. Waits for nothing."""
        with self._lock:
            for adapter_id in unwanted:
                self._faults.pop(adapter_id, None)
                if adapter_id in self._loading:
                    self._unwanted.add(adapter_id)
                elif adapter_id in self._held:
                    self._held -= {adapter_id}
                    self._worker.remove_adapter(adapter_id)
            self._unwanted -= wanted.keys()
            if not self._complete():
                return  # trunks ask again
            for adapter_id, source in wanted.items():
                if adapter_id not in self._held and adapter_id not in self._loading:
                    self._loading.add(adapter_id)
                    self._thread.submit(self._load, adapter_id, source)

    def close(self) -> None:
        """Load no more. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self, adapter_id: int, source: str) -> None:
        fault: str | None = None
        try:
            adapter = read_adapter(self._locate(source), self._config)
            if adapter.adapter_id != adapter_id:
                raise AdapterError(f"{source}: its files are others here than those that the gateway has read")
            self._worker.add_adapter(adapter)
        except MoeRayError as error:
            fault = str(error)
            logger.warning("%s: an adapter cannot be loaded: %s", self._name, error)
        except Exception as error:  # whatever it is, requests for it must end
            fault = f"an internal fault: {type(error).__name__}"
            logger.exception("%s: an adapter cannot be loaded", self._name)
        with self._lock:
            self._loading.discard(adapter_id)
            if fault is not None:
                self._faults[adapter_id] = f"{self._name}: {fault}"
                return
            self._faults.pop(adapter_id, None)
            if adapter_id in self._unwanted:
                self._unwanted.discard(adapter_id)
                self._worker.remove_adapter(adapter_id)
            else:
                self._held |= {adapter_id}
                logger.info("%s: adapter %s is here", self._name, source)
