"""The Serve ingress: puts the HTTP application of `moe_ray.api.http` on the trunks of this Serve application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fastapi
import psutil
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from moe_ray import telemetry
from moe_ray.api.http import build_app
from moe_ray.api.service import HttpOptions, ServedModel
from moe_ray.config import Config
from moe_ray.deploy.discovery import ask_each, discover_trunks
from moe_ray.deploy.house_view import ModelFacts
from moe_ray.deploy.link_options import link_options
from moe_ray.deploy.load_overview import overview
from moe_ray.deploy.served_house import ServedHouse
from moe_ray.gateway.sessions import Sessions
from moe_ray.hub import resolve_model
from moe_ray.model.model_config import ModelConfig
from moe_ray.text.tokenizer import Tokenizer


# Without an application `serve.ingress` asks each replica for its own, so nothing of FastAPI is pickled with the class.
@serve.ingress()
class Gateway:
    """One gateway replica."""

    async def __init__(  # type: ignore[misc]
        self, config: Config, trunk: DeploymentHandle, experts: Sequence[DeploymentHandle]
    ) -> None:
        telemetry.configure(config.log_level)
        self._sessions = Sessions(discover_trunks(trunk), link_options(config), config.experts.deadline_s)
        self._sessions.start()
        self._experts = experts
        http = config.gateway
        options = HttpOptions(
            api_keys=http.api_keys,
            retry_after_s=http.retry_after_s,
            cors_origins=http.cors_origins,
            headers_within_s=http.headers_within_s,
            keep_alive_s=http.keep_alive_s,
            page=http.page.enabled,
        )
        directory = resolve_model(config)
        self._service = ServedModel(config.served_name, Tokenizer(directory), self._sessions, options)
        model = ModelConfig.load(directory)
        facts = ModelFacts(
            config.served_name, model.num_hidden_layers, model.num_local_experts, model.num_experts_per_tok
        )
        application = serve.get_replica_context().app_name
        may_change = bool(http.page.control)
        self._house = ServedHouse(application, facts, trunk, experts, self._service.missing, may_change)

    def __serve_build_asgi_app__(self) -> fastapi.FastAPI:
        """The replica's HTTP application; called by Serve after `__init__`, on the same loop."""
        return build_app(self._service, self._expert_load, self._house)

    async def status(self) -> dict[str, Any]:
        """Place and memory of this process; asked over Serve, not HTTP."""
        node_id = ray.get_runtime_context().get_node_id()
        return {**telemetry.process_status(psutil.Process()), "node_id": node_id}

    async def _expert_load(self) -> dict[str, Any]:
        names = [handle.deployment_name for handle in self._experts]
        return overview(dict(zip(names, await ask_each(self._experts, "load"), strict=True)))
