"""An engine in a process of its own, over experts beside it or elsewhere, that times one wave of prompts at a time."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moe_ray.bench.card import memory_of_this_process
from moe_ray.bench.child import ChildFailed, Parent, answer_commands
from moe_ray.bench.expert_process import ExpertHost
from moe_ray.config import Config
from moe_ray.core import ReplicaInfo, Request, SamplingParams
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.engine.traced_step import StepTracer, TracedStep
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.local import local_experts
from moe_ray.experts.replica_data import unpacked
from moe_ray.hub import open_draft
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute, limit_torch_threads
from moe_ray.transport import connect
from moe_ray.transport.base import MAILBOX_ADDRESS, LinkOptions

LINK_S = 30.0
RAY_LOAD_S = 300.0
FIRST_ID = 3
"""Lower ids are unknown, begin and end of sequence, in the models we know."""

TRACEPARENT = "00-" + 32 * "1" + "-" + 16 * "1" + "-01"
MOST_TRACED_STEPS = 1_000_000

Wave = dict[str, Any]


def run_wave(engine: Engine, prompts: list[list[int]], output_tokens: int, traceparent: str = "") -> Wave:
    """Submit all prompts at once, generate greedily to the full length, and time it (seconds from the submission).

    With a `traceparent` the engine's tracer, if it has one, is told of the steps.
    """
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    outputs: dict[str, list[int]] = {f"p{i}": [] for i in range(len(prompts))}
    first: dict[str, float] = {}
    started = time.perf_counter()
    for name, prompt in zip(outputs, prompts, strict=True):
        engine.submit(Request(name, tuple(prompt), sampling, traceparent=traceparent))
    decoded, now = 0, 0.0  # tokens that came after every sequence had its first
    while engine.has_work:
        all_began = len(first) == len(outputs)
        events = engine.step()
        now = time.perf_counter() - started
        for event in events:
            if event.error is not None:
                raise event.error
            first.setdefault(event.request_id, now)
            outputs[event.request_id] += event.token_ids
            decoded += len(event.token_ids) if all_began else 0
    return {
        "wall_s": now,
        "ttft_p50_ms": 1000 * statistics.median(first.values()),
        "decode_s": now - max(first.values()),
        "decode_tokens": decoded,
        "outputs": list(outputs.values()),
    }


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts that no other seed gives again, so that the prefix cache has nothing of them."""
    ids = random.Random(seed)
    return [[ids.randrange(FIRST_ID, vocab_size) for _ in range(length)] for _ in range(count)]


class EngineHost:
    """A loaded engine and what has to be closed with it."""

    def __init__(self, parent: Parent, closing: contextlib.ExitStack) -> None:
        self._parent, self._closing = parent, closing
        self._engine: Engine | None = None
        self._vocab_size = 0
        self._exchanges: list[float] = []  # seconds from the first call of a layer to its last row, of decoding steps
        self._actors: list[Any] = []  # an actor lives as long as somebody holds its handle

    def load(
        self,
        name: str,
        config: dict[str, Any],
        directory: str,
        carrier: str,
        experts: list[dict[str, Any]],
        token: str,
    ) -> dict[str, Any]:
        """Load the trunk and link it to its experts; answers how the engine computes. Raises `CheckpointError`."""
        settings = Config(**config)
        limit_torch_threads(settings.trunk.threads or 1)
        checkpoint = Checkpoint.open(Path(directory))
        model, dtypes = checkpoint.config, list[str]()
        infos = [unpacked(info) for info in experts]
        if carrier == "ray":
            infos = self._start_actors(config, directory, model.num_local_experts)

        def pool(compute: Compute) -> ExpertDispatcher:
            dtypes.append(compute.dtype)
            if carrier == "local":
                bars = partial(self._expert_bar, name)
                of = settings.experts
                return local_experts(checkpoint, compute, bars, of.quantize_of, offload_bytes=of.offload_bytes_of)
            return self._linked(settings, compute, infos, model.expert_keys, carrier, token)

        draft = open_draft(settings, checkpoint.directory)
        self._engine = build_engine(settings, checkpoint, pool, self._bar(f"{name} Trunk"), draft=draft)
        self._engine.trace_steps(StepTracer(self._note, MOST_TRACED_STEPS))
        self._vocab_size = model.vocab_size
        checkpoint.close()
        return {"dtype": dtypes[0]}

    def run(
        self, concurrency: int, prompt_tokens: int, output_tokens: int, seed: int, layer_times: bool = False
    ) -> Wave:
        """Time one wave of `concurrency` prompts; `layer_times`: and the exchange with the experts of each layer."""
        assert self._engine is not None, "load comes first"
        prompts = random_prompts(concurrency, prompt_tokens, self._vocab_size, seed)
        self._exchanges.clear()
        wave = run_wave(self._engine, prompts, output_tokens, TRACEPARENT if layer_times else "")
        if self._exchanges:
            wave["exchange_p50_us"] = 1e6 * statistics.median(self._exchanges)
        return wave

    def memory(self) -> dict[str, Any]:
        """Bytes of the card that this process has taken at most; of the CPU what is resident."""
        return memory_of_this_process()

    def _note(self, step: TracedStep) -> None:
        if step.num_tokens == step.num_sequences:  # none of them computes a prompt
            self._exchanges += [layer.gathered_s - layer.begun_s for layer in step.layers]

    def _expert_bar(self, name: str, expert: int) -> Callable[[int, int], None]:
        return self._bar(f"{name} Expert{expert}")

    def _bar(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._parent.progress(what, done, total)

    def _linked(
        self,
        config: Config,
        compute: Compute,
        infos: list[ReplicaInfo],
        keys: frozenset[tuple[int, int]],
        carrier: str,
        token: str,
    ) -> ExpertDispatcher:
        native = None if config.model.kernels == "torch" else config.cache_dir
        options, way = LinkOptions(token=token, native_dir=native), carrier
        if carrier == MAILBOX_ADDRESS:
            from moe_ray.transport.mailbox.open_card import card_mailboxes

            options, way = replace(options, mailboxes=card_mailboxes(compute.device)), "socket"
        table = ReplicaTable(lambda: infos, lambda info: connect(way, info, options), keys, config.experts.refresh_s)
        self._closing.callback(table.close)
        table.start()
        deadline = time.monotonic() + LINK_S
        while missing := table.missing():
            if time.monotonic() > deadline:
                raise ChildFailed(f"no {carrier} link to experts {missing} within {LINK_S:g} s")
            table.wait_change(table.version, 0.1)
        if carrier == MAILBOX_ADDRESS and compute.device == "cuda":
            replicas = {replica for key in keys for replica in table.replicas_of(*key)}
            if not all(replica.link.on_card for replica in replicas):
                raise ChildFailed("rows do not go through the card on every link: the log says why")
        return ExpertDispatcher(
            table,
            DispatchOptions(
                deadline_s=config.experts.deadline_s,
                call_timeout_s=config.experts.call_timeout_s,
                card_rows=options.mailboxes is not None,
            ),
        )

    def _start_actors(self, config: dict[str, Any], directory: str, count: int) -> list[ReplicaInfo]:
        from moe_ray.bench.own_ray import own_ray

        self._closing.enter_context(own_ray())
        import ray

        actor = ray.remote(num_cpus=0)(ExpertHost)
        self._actors = [actor.options(name=f"Expert{e}").remote(config, directory, e) for e in range(count)]
        waiting = [actor.listen.remote(["ray"], "") for actor in self._actors]
        infos: list[ReplicaInfo] = []
        for done, answer in enumerate(waiting, 1):
            infos.append(ray.get(answer, timeout=RAY_LOAD_S))
            self._parent.progress("ray Experts", done, count)
        return infos


def main() -> None:
    """Answer `load` and `run`."""
    parent = Parent()
    with contextlib.ExitStack() as closing:
        host = EngineHost(parent, closing)
        answer_commands(parent, {"load": host.load, "run": host.run, "memory": host.memory})


if __name__ == "__main__":
    main()
