"""The Serve ingress: puts the HTTP application of `moe_ray.api.http` on the trunks of this Serve application."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastapi
import psutil
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from moe_ray import telemetry
from moe_ray.api.http import build_app
from moe_ray.api.observation import Observation
from moe_ray.api.service import HttpOptions, ServedModel
from moe_ray.api.tgi.limits import TgiLimits
from moe_ray.config import Config
from moe_ray.config.gateway import Listen
from moe_ray.deploy.discovery import ask_each, discover_trunks
from moe_ray.deploy.house_view import ModelFacts
from moe_ray.deploy.link_options import link_options
from moe_ray.deploy.load_overview import overview
from moe_ray.deploy.metrics import Reporter
from moe_ray.deploy.open_tracing import open_tracing
from moe_ray.deploy.own_port import OwnPort
from moe_ray.deploy.served_adapters import adapter_opener, configured_adapters
from moe_ray.deploy.served_house import ServedHouse
from moe_ray.deploy.stored_responses import response_store
from moe_ray.deploy.vllm_metrics import SequenceMetrics
from moe_ray.gateway.sessions import Sessions
from moe_ray.hub import resolve_model
from moe_ray.model.model_config import ModelConfig
from moe_ray.observe.tracing import Tracing
from moe_ray.text.tokenizer import Tokenizer


# Without an application `serve.ingress` asks each replica for its own, so nothing of FastAPI is pickled with the class.
@serve.ingress()
class Gateway:
    """One gateway replica."""

    async def __init__(  # type: ignore[misc]
        self,
        config: Config,
        trunk: DeploymentHandle,
        experts: Sequence[DeploymentHandle],
        responses: DeploymentHandle | None,
        variants: Sequence[DeploymentHandle] = (),
    ) -> None:
        """`responses`: what keeps them where there are several gateways. `variants`: the trunks of each variant."""
        telemetry.configure(config.log_level, config.log_format)
        self._sessions = _sessions_over(trunk, config)
        self._experts = experts
        http = config.gateway
        directory = resolve_model(config)
        options = HttpOptions(
            api_keys=http.api_keys,
            retry_after_s=http.retry_after_s,
            cors_origins=http.cors_origins,
            headers_within_s=http.headers_within_s,
            keep_alive_s=http.keep_alive_s,
            tgi=_tgi_limits(config, directory),
            page=http.page.enabled,
            # Where there is a proxy of Serve, it tells ids and counts requests.
            tells_request_id=http.listen is not None,
            max_ongoing_requests=None if http.listen is None else http.max_ongoing_requests,
        )
        self._tracing = open_tracing(config.tracing, "Gateway")
        sequences = SequenceMetrics(config.served_name)
        store = response_store(http, responses)
        others, reports = [], [sequences.report]
        for own, trunks in zip(config.for_variants, variants, strict=True):
            ended = SequenceMetrics(own.served_name)
            reports.append(ended.report)
            others.append(
                ServedModel(
                    own.served_name,
                    Tokenizer(resolve_model(own), http.tool_call_parser),
                    _sessions_over(trunks, own),
                    options,
                    observation=Observation(own.served_name, self._tracing, ended.take),
                    responses=store,
                )
            )
        self._reporter = Reporter(*reports)
        model = ModelConfig.load(directory)
        self._sessions.serve_adapters(configured_adapters(config.adapters, model))
        self._service = ServedModel(
            config.served_name,
            Tokenizer(directory, http.tool_call_parser),
            self._sessions,
            options,
            config.model.aliases,
            Observation(config.served_name, self._tracing, sequences.take),
            store,
            adapter_opener(model, config.adapters.max_rank) if config.adapters.runtime_loading else None,
            others,
        )
        facts = ModelFacts(
            config.served_name, model.num_hidden_layers, model.num_local_experts, model.num_experts_per_tok
        )
        application = serve.get_replica_context().app_name
        may_change = bool(http.page.control)
        house = ServedHouse(application, facts, (trunk, *variants), experts, self._service.missing, may_change)
        self._app = build_app(self._service, self._expert_load, house)
        self._port = None if http.listen is None else await OwnPort.open(self._app, Listen.parse(http.listen))

    def __serve_build_asgi_app__(self) -> fastapi.FastAPI:
        """The replica's HTTP application; called by Serve after `__init__`, on the same loop."""
        return self._app

    async def status(self) -> dict[str, Any]:
        """Place and memory of this process; asked over Serve, not HTTP."""
        node_id = ray.get_runtime_context().get_node_id()
        return {**telemetry.process_status(psutil.Process()), "node_id": node_id}

    def __del__(self) -> None:
        # Where __init__ has failed, there may be none of them.
        reporter: Reporter | None = getattr(self, "_reporter", None)
        tracing: Tracing | None = getattr(self, "_tracing", None)
        port: OwnPort | None = getattr(self, "_port", None)
        for each in (port, reporter, tracing):
            if each is not None:
                each.close()

    async def _expert_load(self) -> dict[str, Any]:
        names = [handle.deployment_name for handle in self._experts]
        return overview(dict(zip(names, await ask_each(self._experts, "load"), strict=True)))


def _sessions_over(trunks: DeploymentHandle, config: Config) -> Sessions:
    """The sessions of one model, which look for its trunks from now on."""
    sessions = Sessions(discover_trunks(trunks), link_options(config), config.experts.deadline_s)
    sessions.start()
    return sessions


def _tgi_limits(config: Config, directory: Path) -> TgiLimits:
    """What TGI's routes allow and tell."""
    on_cards = (config.trunk.device or config.model.device) == "cuda" or bool(config.trunk.num_gpus)
    return TgiLimits(
        **config.gateway.tgi.model_dump(),
        max_concurrent_requests=config.engine.max_num_seqs + config.engine.max_waiting,
        compute_type="gpu" if on_cards else "cpu",
        model_id=config.model.path,
        model_sha=directory.name if directory.parent.name == "snapshots" else None,  # in the Hub's cache: the commit
    )
