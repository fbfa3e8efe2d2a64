"""The engine: requests in, token events out, one step at a time. Knows token ids only; used by one thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from moe_ray.core import AdapterRef, Batch, EngineStats, Request, Sequence, TokenEvent
from moe_ray.engine import prompt_logprobs
from moe_ray.engine import routed_experts as routing
from moe_ray.engine.adapter_shelf import AdapterShelf
from moe_ray.engine.admission import check_request
from moe_ray.engine.batches import split_batch
from moe_ray.engine.blocks import BlockAllocator
from moe_ray.engine.draft_model import DraftModel
from moe_ray.engine.drafting import Drafting
from moe_ray.engine.drafts import StepCosts
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.grammar.grammars import Grammars
from moe_ray.engine.kv_cache import KVCache, cache_dtype
from moe_ray.engine.overlap import Overlap
from moe_ray.engine.scheduler import Scheduler
from moe_ray.engine.step_times import StepTimes
from moe_ray.engine.step_tokens import step_tokens
from moe_ray.engine.tiers.kv_tiers import open_tiers
from moe_ray.engine.token_events import token_event
from moe_ray.engine.torch_threads import torch_threads
from moe_ray.engine.traced_step import StepTracer
from moe_ray.engine.unready import Unready
from moe_ray.errors import ConfigError, InvalidRequest, MoeRayError, Overloaded
from moe_ray.model.trunk import Trunk, interleave
from moe_ray.timings import SequenceTimes


class Engine:
    """Continuous batching over one trunk. `submit` and `abort` between calls of `step`; all from one thread."""

    def __init__(
        self,
        trunk: Trunk,
        options: EngineOptions,
        grammars: Grammars | None = None,
        draft_model: DraftModel | None = None,
        adapters: AdapterShelf | None = None,
    ) -> None:
        """Allocate the KV cache. Raises `ConfigError` if it cannot hold one sequence of max_model_len.

        `grammars`: of the model's vocabulary; without them requests that have a grammar are refused. `draft_model`:
        whose KV cache has as many blocks, where `options.limits.speculation` is to use one. `adapters`: of `trunk`;
        None: requests that have an adapter touch the trunk alone.
        """
        capacity = options.num_blocks * options.block_size
        if capacity < options.max_model_len:
            raise ConfigError(
                f"the KV cache holds {capacity} tokens, fewer than max_model_len {options.max_model_len}; "
                f"lower max_model_len or give the cache more memory"
            )
        self.options = options
        self._trunk = trunk
        held = cache_dtype(options.kv_cache_dtype, trunk.dtype)
        self._cache = KVCache(trunk.config, options.num_blocks, options.block_size, held, trunk.device)
        trunk.warm_up(self._cache)
        self._tiers = open_tiers(self._cache, options.tiers)
        self._allocator = BlockAllocator(options.num_blocks, options.block_size, self._tiers)
        costs = StepCosts(trunk.config.num_local_experts, trunk.config.num_experts_per_tok)
        self._scheduler = Scheduler(
            *(options.limits, self._allocator, options.eos_token_ids, options.max_model_len, costs),
            draft_model,
            self._tiers,
        )
        self._overlap = Overlap()
        self._live: dict[str, Sequence] = {}
        self._adapters = adapters or AdapterShelf(trunk)
        self._unready = Unready(grammars, self._adapters, self._scheduler.prefixes.fetch)
        """Those of them that wait for their grammar, adapter or blocks, and are not in the scheduler."""
        self.times = StepTimes()
        self._tracer: StepTracer | None = None
        self._steps = self._prompt_tokens = self._generated_tokens = self._degraded_tokens = 0

    @property
    def has_work(self) -> bool:
        """A step has something to do; not while all that is live waits for its grammar or adapter."""
        return len(self._live) > len(self._unready) or self._unready.some_ready

    @property
    def device(self) -> str:
        return str(self._trunk.device)

    @property
    def held(self) -> tuple[str, ...]:
        """What the trunk's matrices are held as, in words."""
        return self._trunk.held

    @property
    def kv_cache_bytes(self) -> int:
        return self._cache.nbytes

    @property
    def drafting(self) -> Drafting | None:
        """What guesses tokens; None: nothing does."""
        return self._scheduler.drafting

    def trace_steps(self, tracer: StepTracer) -> None:
        """Have the steps of traced requests timed by `tracer`; before the first request."""
        self._tracer = tracer

    def submit(self, request: Request, arrived_s: float | None = None) -> None:
        """Queue a request that came at `arrived_s` of `time.perf_counter`, or now.

        Raises `InvalidRequest` if it cannot be served, `Overloaded` if the queue is full.
        """
        self.check(request)
        if request.request_id in self._live:
            raise InvalidRequest(f"request id {request.request_id!r} is already in use")
        if (overload := self.overload()) is not None:
            raise overload
        arrived_s = time.perf_counter() if arrived_s is None else arrived_s
        seq = Sequence(request, [*request.prompt_token_ids, *request.output_token_ids], times=SequenceTimes(arrived_s))
        self._live[request.request_id] = seq
        if not self._unready.add(seq):
            self._scheduler.add(seq)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` if a request could not be served by an idle engine. Callable from any thread.

        Whether its grammar can be compiled shows later.
        """
        check_request(request, self._trunk.config.vocab_size, self.options.max_model_len)
        self._unready.check(request)

    def overload(self, coming: int = 0) -> Overloaded | None:
        """Why no further request can wait, behind `coming` ones that are to be submitted. Callable from any thread."""
        most = self.options.limits.max_waiting
        if len(self._scheduler.waiting) + len(self._unready) + coming < most:
            return None
        return Overloaded(f"{most} requests are waiting already; try again later")

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks; False if it is not live. No event follows."""
        seq = self._forget(request_id)
        if seq is not None and not self._unready.drop(seq):
            self._scheduler.finish(seq)
        return seq is not None

    def _forget(self, request_id: str) -> Sequence | None:
        """Take a request out of those that are live."""
        seq = self._live.pop(request_id, None)
        if seq is not None and seq.request.adapter_id:
            self._adapters.release(seq.request.adapter_id)
        if seq is not None and self._tiers is not None:
            self._tiers.drop(seq)
        return seq

    def load_adapter(self, adapter: AdapterRef) -> None:
        """Begin to load an adapter before the first request for it comes, if there is room for it."""
        self._adapters.preload(adapter)

    def drop_adapter(self, adapter_id: int) -> None:
        """Forget an adapter as soon as no live request has it."""
        self._adapters.drop(adapter_id)

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, on any thread, whenever what a sequence waited for is ready."""
        self._unready.wake_with(wake)

    def wait(self) -> None:
        """Return when a step has something to do, at once if nothing is live."""
        if self._live and not self.has_work:
            self._unready.wait()

    def close(self) -> None:
        """End what compiles grammars and loads adapters; write to the disk what is to outlive this. Idempotent."""
        self._unready.close()
        if self._tiers is not None:
            self._tiers.close(self._allocator.keyed())

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Compute one batch and return its events; an empty list when there was nothing to do.

        When the batch cannot be computed (an expert stayed away past its deadline) each of its requests ends in an
        event that carries the error, and the engine goes on with the others.
        """
        begun = time.perf_counter()
        refused = self._take_ready()
        batch = self._scheduler.schedule()
        if batch is None:
            return refused
        scheduled = time.perf_counter()
        for seq in batch.sequences:
            if seq.times.queue_s is None:
                seq.times.queue_s = scheduled - seq.times.arrived_s
        traced = () if self._tracer is None else self._tracer.begin(batch)
        try:
            logits = self._forward(batch)
        except MoeRayError as error:
            for seq in batch.sequences:
                self.abort(seq.request.request_id)
            return [*refused, *(TokenEvent(seq.request.request_id, error=error) for seq in batch.sequences)]
        forwarded = time.perf_counter()
        sampled, scored = step_tokens(batch, logits, self.options.eos_token_ids)
        decoded = time.perf_counter()
        self._steps += 1
        # A sequence with output computes its newest token for the first time: that one is no prompt, nor recomputed.
        newest = sum(seq.num_output > 0 for seq, n in zip(batch.sequences, batch.num_sampled, strict=True) if n)
        drafted = sum(count - 1 for count in batch.num_sampled if count)
        self._prompt_tokens += batch.num_tokens - newest - drafted
        outcomes = self._scheduler.update(batch, sampled.token_ids)
        routing.keep(batch)
        updated = time.perf_counter()
        if self.drafting is not None:
            self.drafting.note_step(batch.num_tokens, updated - begun)
        if self._tiers is not None:
            self._tiers.note_step(batch, forwarded - scheduled)
        self.times.note(batch, (begun, scheduled, forwarded, decoded, updated))
        if self._tracer is not None:
            self._tracer.end(batch, traced, begun, updated)
        events, row = refused, 0
        for outcome in outcomes:
            seq = outcome.seq
            told = scored.pop(outcome.index, ())
            if outcome.finish_reason is not None or outcome.stuck:
                self._forget(seq.request.request_id)
            self._generated_tokens += len(outcome.token_ids)
            events.append(token_event(outcome, batch, sampled, row, told))
            row += batch.num_sampled[outcome.index]
        return events + [prompt_logprobs.event_of(batch.sequences[i], told) for i, told in scored.items()]

    def _take_ready(self) -> list[TokenEvent]:
        """Schedule the sequences whose grammars are ready; the events of those whose are refused."""
        refused = []
        for seq, error in self._unready.take():
            if error is None:
                self._scheduler.add(seq)
            else:
                self._forget(seq.request.request_id)
                refused.append(TokenEvent(seq.request.request_id, error=error))
        return refused

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Logits of the batch's sampled positions."""
        model, sequences = self._trunk.config, len(batch.sequences)
        routing.prepare(batch, model.num_hidden_layers, model.num_local_experts, model.num_experts_per_tok)
        parts = self.options.micro_batches or self._overlap.choose(batch.num_tokens, sequences)
        started, waited = time.perf_counter(), self._trunk.waited_s
        batches = split_batch(batch, parts)
        passes = [self._trunk.forward(part, self._cache) for part in batches]
        # After a product torch's pool spins, on the cores of the kernels' own threads.
        with torch_threads(1) if self._trunk.own_threads else contextlib.nullcontext():
            logits = interleave(passes)
        for part in batches:
            if part.degraded:
                self._note_degraded(part)
        if not self.options.micro_batches:
            seconds = time.perf_counter() - started
            self._overlap.record(batch.num_tokens, sequences, parts, seconds, self._trunk.waited_s - waited)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _note_degraded(self, batch: Batch) -> None:
        self._degraded_tokens += len(batch.degraded)
        for i, seq in enumerate(batch.sequences):
            chunk = range(batch.query_start[i], batch.query_start[i + 1])
            seq.degraded += [batch.positions[flat] for flat in chunk if flat in batch.degraded]

    def stats(self) -> EngineStats:
        """A snapshot; callable from any thread."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + len(self._unready),
            kv_blocks_total=self._allocator.num_blocks,
            kv_blocks_free=self._allocator.num_free,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_query_tokens=self._scheduler.prefixes.query_tokens,
            prefix_hit_tokens=self._scheduler.prefixes.hit_tokens,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            drafts=self._scheduler.drafts,
            draft_tokens=self._scheduler.draft_tokens,
            accepted_draft_tokens=self._scheduler.accepted_draft_tokens,
            degraded_tokens=self._degraded_tokens,
            adapters=len(self._adapters.held),
            **({} if self._tiers is None else asdict(self._tiers.stats())),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if block bookkeeping is inconsistent. Between steps only."""
        self._scheduler.check_integrity()
        if self._tiers is not None:
            self._tiers.check_integrity()
