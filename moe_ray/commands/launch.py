"""`moe-ray serve`: starts or joins Ray, deploys the application, shows it loading, and takes it all down again."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig
from rich.console import Console

from moe_ray.commands.cache import with_usable_cache
from moe_ray.commands.greeting import greet
from moe_ray.commands.ingress import choose_ingress, proxy_location, with_listening_gateway
from moe_ray.commands.page_control import with_page_control
from moe_ray.commands.placement import on_cluster_cards
from moe_ray.commands.plan_report import print_plan
from moe_ray.commands.planned import Planned, planned
from moe_ray.commands.timeline import Timeline
from moe_ray.config import Config
from moe_ray.config.gateway import Listen
from moe_ray.console import loading_bars
from moe_ray.deploy.app import build_app
from moe_ray.deploy.loading_board import NAME, NAMESPACE, LoadingBoard
from moe_ray.deploy.local_ray import join, reason, start
from moe_ray.deploy.ray_internals import HAPROXY_SETTING
from moe_ray.deploy.replica_targets import forget_replicas
from moe_ray.deploy.served_adapters import check_adapters
from moe_ray.deploy.servers import APP_NAME
from moe_ray.deploy.urls import listen_address, missing_at, url_of
from moe_ray.errors import MoeRayError, NotReady
from moe_ray.hub import check_draft, resolve_model
from moe_ray.model.compute.compute import this_machine
from moe_ray.model.compute.resolve import Wanted, resolve
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.build import prepare
from moe_ray.text.tokenizer import Tokenizer

READY_TIMEOUT_S = 120.0
STATUS_EVERY_S = 1.0
"""How often Serve is asked whether an actor has failed: its answers take time of the cores that actors start on."""
OBJECT_STORE_BYTES = 512 * 2**20
"""Of a Ray that we start ourselves: tokens and rows do not pass through it, except over the `ray` carrier."""


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """Where the server listens and which Ray it runs on."""

    host: str
    port: int
    address: str | None
    """None: start Ray in this machine and end it afterwards."""
    ingress: str
    """One of `moe_ray.commands.ingress.INGRESSES`."""
    dashboard: bool


class DeployFailed(MoeRayError):
    """An actor could not be started; the message is the actor's own."""


def run(config: Config, options: LaunchOptions, console: Console) -> None:
    """Serve until SIGINT or SIGTERM, then end everything that this call started.

    Raises `CheckpointError` or `ConfigError` before anything is started, `DeployFailed` if an actor does not come up.
    """
    timeline = Timeline()
    config = with_usable_cache(config, console)
    ingress = choose_ingress(options.ingress, options.address is None, config.gateway.num_replicas)
    with loading_bars(console) as progress:
        directory = resolve_model(config, progress)
        # Reads every header and the tokenizers: a broken checkpoint is told before anything is started.
        plan = planned(config, directory, progress=partial(progress, "comparing experts"))
    for each in (config, *config.for_variants):
        Tokenizer(resolve_model(each))
        check_draft(each)
    check_adapters(config, plan.model)
    timeline.mark("model")
    if options.address is None:
        options = replace(options, host=listen_address(options.host, options.port))
    if ingress == "direct":
        config = with_listening_gateway(config, Listen(options.host, options.port))
    options = replace(options, ingress=ingress)
    config = with_page_control(config, options.host, own_ray=options.address is None)
    # Both, and by name: a shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        starting = "starting Ray" if options.address is None else f"joining Ray at {options.address}"
        with console.status(starting) as status:
            building = _build_native_code(config)
            dashboard = _start_ray(options, config)
            timeline.mark("Ray")
            if building.is_alive():
                status.update("compiling the kernels for this machine's CPU, once")
                building.join()
                timeline.mark("kernels")
        # Ray takes SIGTERM for itself while it starts.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        config, plan = on_cluster_cards(config, directory, plan, console)
        print_plan(console, plan, None)
        if options.address is None:
            _print_backend(config, plan.model, console)
        _deploy(config, options, plan, console, timeline)
        url = url_of(options.host, options.port)
        greet(config, url, ray.get_runtime_context().gcs_address, dashboard, console, timeline)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        console.print("stopping …")
    except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
        raise DeployFailed(f"Ray or Serve failed: {reason(error)}") from error
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _stop(options)
    console.print("stopped")


def _print_backend(config: Config, model: ModelConfig, console: Console) -> None:
    """Say what trunk and experts compute with on this machine, and what makes that slower than it could be."""
    alike = config.trunk.device == config.experts.device or config.transport == "local"
    for whose, section in (("trunk ", config.trunk), ("experts ", config.experts)):
        quantize = (config.trunk.quantize or config.experts.quantize) if alike else section.quantize
        wanted = Wanted.of(config.computing_on(section.device).model, quantize)
        backend = resolve(model, wanted, this_machine(wanted))
        console.print(f"computing {'' if alike else whose}{backend}", highlight=False, soft_wrap=True)
        for note in (*backend.notes, backend.slower_because):
            if note:
                console.print(f"  {note}", style="yellow", highlight=False, soft_wrap=True)
        if alike:
            return


def _build_native_code(config: Config) -> threading.Thread:
    """Build what is native meanwhile, if this machine has not yet: so that no actor has to. None is needed to run."""
    thread = threading.Thread(target=prepare, args=(config.cache_dir,), name="native-build", daemon=True)
    if config.model.kernels != "torch":
        thread.start()
    return thread


def _start_ray(options: LaunchOptions, config: Config) -> str:
    """Return host:port of Ray's dashboard, "" where it has none."""
    logging.getLogger("ray.serve").setLevel(
        config.log_level.upper() if config.log_level == "debug" else logging.WARNING
    )
    quiet: dict[str, Any] = {"log_to_driver": config.log_level == "debug", "logging_level": logging.ERROR}
    if options.address is not None:
        return join(options.address, namespace=NAMESPACE, **quiet).dashboard_url or ""
    if options.ingress == "haproxy":
        os.environ[HAPROXY_SETTING] = "1"
    context = start(
        namespace=NAMESPACE,
        include_dashboard=options.dashboard,
        object_store_memory=OBJECT_STORE_BYTES,
        **quiet,
    )
    return context.dashboard_url or ""


def _deploy(config: Config, options: LaunchOptions, plan: Planned, console: Console, timeline: Timeline) -> None:
    forget_replicas(APP_NAME)  # on a Ray that runs longer than we do: those of an earlier run
    log_config = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(
        proxy_location=proxy_location(options.ingress, options.address is None),
        http_options=HTTPOptions(host=options.host, port=options.port),
        logging_config=log_config,
    )
    board: Any = ray.remote(num_cpus=0)(LoadingBoard).options(name=NAME, get_if_exists=True).remote()
    failure: list[BaseException] = []

    def deploy() -> None:
        try:
            serve.run(build_app(config), name=APP_NAME, route_prefix="/", logging_config=log_config)
        except Exception as error:  # noqa: BLE001 - raised on the main thread
            failure.append(error)

    thread = threading.Thread(target=deploy, name="deploy", daemon=True)
    thread.start()
    ahead = ["weights", "actors"]  # stretches to come: until the first actor loads, until all have loaded
    with loading_bars(console) as progress:
        for actor, total in plan.bytes_to_read.items():
            progress(actor, 0, total)
        deployed = loaded = False
        ask_at = time.monotonic() + STATUS_EVERY_S
        while not (deployed and loaded):  # experts serve, and Serve is content, before all their layers are there
            thread.join(timeout=0.2)
            deployed, rows = not thread.is_alive(), ray.get(board.rows.remote())
            for actor, (done, total) in rows.items():
                progress(actor, done, total)
            loaded = len(rows) == len(plan.bytes_to_read) and all(done == total for done, total in rows.values())
            if rows and "actors" in ahead:
                timeline.mark(ahead.pop())
            if loaded and "weights" in ahead:
                timeline.mark(ahead.pop())
            if failure or time.monotonic() > ask_at:
                _raise_if_failed(failure)
                ask_at = time.monotonic() + STATUS_EVERY_S
    ray.kill(board)
    timeline.mark("Serve")
    with console.status("linking trunk and experts"):
        _wait_ready(url_of(options.host, options.port))
    timeline.mark("links")


def _raise_if_failed(failure: list[BaseException]) -> None:
    state = serve.status().applications.get(APP_NAME)
    if state is not None and state.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        messages = [d.message for d in state.deployments.values() if d.status.value in ("DEPLOY_FAILED", "UNHEALTHY")]
        raise DeployFailed(_root_cause((messages or [state.message])[0]))
    if failure:
        raise DeployFailed(_root_cause(str(failure[0])))


def _root_cause(message: str) -> str:
    """The last line of a remote traceback that names an error; the whole message if none does."""
    lines = [line.strip() for line in message.splitlines() if "Error" in line or "moe_ray.errors" in line]
    return lines[-1] if lines else message.strip()


def _wait_ready(url: str) -> None:
    deadline, missing = time.monotonic() + READY_TIMEOUT_S, ["Gateway"]
    while time.monotonic() < deadline:
        found = missing_at(f"{url}/health")
        if found == []:
            return
        missing = found or missing
        time.sleep(0.1)
    raise NotReady(f"not ready after {READY_TIMEOUT_S:g} s; still missing: {', '.join(missing)}")


def _stop(options: LaunchOptions) -> None:
    if not ray.is_initialized():
        return
    # Our own Ray ends with this process, Serve's controller and proxy with it.
    serve.delete(APP_NAME)
    ray.shutdown()
