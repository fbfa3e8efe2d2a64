"""The engine: requests in, token events out, one step at a time. Knows token ids only; used by one thread."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from moe_ray.core import Batch, EngineStats, Request, Sequence, TokenEvent, TokenLogprobs
from moe_ray.engine import prompt_logprobs
from moe_ray.engine import routed_experts as routing
from moe_ray.engine.batches import split_batch
from moe_ray.engine.blocks import BlockAllocator
from moe_ray.engine.drafts import StepCosts
from moe_ray.engine.kv_cache import KVCache, cache_dtype
from moe_ray.engine.overlap import Overlap
from moe_ray.engine.sampler import sample
from moe_ray.engine.scheduler import Scheduler, SchedulerLimits
from moe_ray.errors import ConfigError, ContextLengthExceeded, InvalidRequest, MoeRayError, Overloaded
from moe_ray.model.trunk import Trunk, interleave


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything an engine is told at construction."""

    num_blocks: int
    block_size: int = 16
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_model_len: int = 4096
    micro_batches: int | None = 1
    """None: as many as turn out to be fastest."""
    eos_token_ids: frozenset[int] = frozenset()
    kv_cache_dtype: str = "auto"
    """"auto": as the trunk's rows; or "int8"."""


class Engine:
    """Continuous batching over one trunk. `submit` and `abort` between calls of `step`; all from one thread."""

    def __init__(self, trunk: Trunk, options: EngineOptions) -> None:
        """Allocate the KV cache. Raises `ConfigError` if it cannot hold one sequence of max_model_len."""
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
        self._allocator = BlockAllocator(options.num_blocks, options.block_size)
        costs = StepCosts(trunk.config.num_local_experts, trunk.config.num_experts_per_tok)
        self._scheduler = Scheduler(
            options.limits, self._allocator, options.eos_token_ids, options.max_model_len, costs
        )
        self._overlap = Overlap()
        self._live: dict[str, Sequence] = {}
        self._steps = self._prompt_tokens = self._generated_tokens = self._degraded_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

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

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `InvalidRequest` if it cannot be served, `Overloaded` if the queue is full."""
        self.check(request)
        if request.request_id in self._live:
            raise InvalidRequest(f"request id {request.request_id!r} is already in use")
        if (overload := self.overload()) is not None:
            raise overload
        seq = Sequence(request, [*request.prompt_token_ids, *request.output_token_ids])
        self._live[request.request_id] = seq
        self._scheduler.add(seq)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` if a request could not be served by an idle engine. Callable from any thread."""
        vocab, total = self._trunk.config.vocab_size, len(request.prompt_token_ids) + len(request.output_token_ids)
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        most = request.sampling.max_tokens
        # Log-probabilities of a prompt may be asked for without a token behind it.
        if total + (most != 0) > self.options.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.options.max_model_len} tokens; the prompt has {total}, "
                f"which leaves no room to generate",
                "prompt",
            )
        if most is not None and len(request.output_token_ids) >= most and (most or request.sampling.empty):
            raise InvalidRequest(f"all max_tokens ({most}) were generated already", "output_token_ids")
        for param, ids in (
            ("prompt", request.prompt_token_ids),
            ("output_token_ids", request.output_token_ids),
            ("logit_bias", tuple(request.sampling.logit_bias)),
            ("stop_token_ids", request.sampling.stop_token_ids),
            ("allowed_token_ids", request.sampling.allowed_token_ids),
            ("bad_words_ids", tuple(itertools.chain.from_iterable(request.sampling.bad_words_ids))),
        ):
            if ids and (min(ids) < 0 or max(ids) >= vocab):
                raise InvalidRequest(f"token ids of `{param}` must be between 0 and {vocab - 1}", param)

    def overload(self, coming: int = 0) -> Overloaded | None:
        """Why no further request can wait, behind `coming` ones that are to be submitted. Callable from any thread."""
        most = self.options.limits.max_waiting
        if len(self._scheduler.waiting) + coming < most:
            return None
        return Overloaded(f"{most} requests are waiting already; try again later")

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks; False if it is not live. No event follows."""
        seq = self._live.pop(request_id, None)
        if seq is not None:
            self._scheduler.finish(seq)
        return seq is not None

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Compute one batch and return its events; an empty list when there was nothing to do.

        When the batch cannot be computed (an expert stayed away past its deadline) each of its requests ends in an
        event that carries the error, and the engine goes on with the others.
        """
        batch = self._scheduler.schedule()
        if batch is None:
            return []
        try:
            logits = self._forward(batch)
        except MoeRayError as error:
            for seq in batch.sequences:
                self.abort(seq.request.request_id)
            return [TokenEvent(seq.request.request_id, error=error) for seq in batch.sequences]
        scored = prompt_logprobs.take(batch, logits)
        sequences, drafts = _rows(batch)
        sampled = sample(prompt_logprobs.sampled_rows(batch, logits), sequences, self.options.eos_token_ids, drafts)
        self._steps += 1
        # A sequence with output computes its newest token for the first time: that one is no prompt, nor recomputed.
        newest = sum(seq.num_output > 0 for seq, n in zip(batch.sequences, batch.num_sampled, strict=True) if n)
        drafted = sum(count - 1 for count in batch.num_sampled if count)
        self._prompt_tokens += batch.num_tokens - newest - drafted
        outcomes = self._scheduler.update(batch, sampled.token_ids)
        routing.keep(batch)
        events, row = [], 0
        for outcome in outcomes:
            seq, tokens = outcome.seq, outcome.token_ids
            told = scored.pop(outcome.index, ())
            if outcome.finish_reason is not None:
                del self._live[seq.request.request_id]
            self._generated_tokens += len(tokens)
            events.append(
                TokenEvent(
                    request_id=seq.request.request_id,
                    token_ids=tokens,
                    logprobs=tuple(entry for entry in sampled.logprobs[row : row + len(tokens)] if entry is not None),
                    finish_reason=outcome.finish_reason,
                    stop_token_id=outcome.stop_token_id,
                    num_cached_tokens=seq.num_cached_prompt,
                    degraded_positions=tuple(seq.degraded[seq.degraded_told :]),
                    routed_experts=routing.tell(seq, batch),
                    prompt_logprobs=told,
                    prompt_logprobs_start=seq.num_scored + 1 - len(told),
                )
            )
            seq.degraded_told = len(seq.degraded)
            row += batch.num_sampled[outcome.index]
        return events + [_prompt_event(batch.sequences[i], told) for i, told in scored.items()]

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
            num_waiting=len(self._scheduler.waiting),
            kv_blocks_total=self._allocator.num_blocks,
            kv_blocks_free=self._allocator.num_free,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            draft_tokens=self._scheduler.draft_tokens,
            accepted_draft_tokens=self._scheduler.accepted_draft_tokens,
            degraded_tokens=self._degraded_tokens,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if block bookkeeping is inconsistent. Between steps only."""
        self._scheduler.check_integrity()


def _prompt_event(seq: Sequence, told: tuple[TokenLogprobs, ...]) -> TokenEvent:
    """What is known of a prompt that is not computed to its end yet."""
    start = seq.num_scored + 1 - len(told)
    return TokenEvent(seq.request.request_id, prompt_logprobs=told, prompt_logprobs_start=start)


def _rows(batch: Batch) -> tuple[list[Sequence], list[list[int]]]:
    """The sequence of each row of a batch's logits, and the drafts that lie before it (no list at all if none do)."""
    if max(batch.num_sampled) <= 1:
        return [seq for seq, count in zip(batch.sequences, batch.num_sampled, strict=True) if count], []
    sequences: list[Sequence] = []
    drafts: list[list[int]] = []
    for i, (seq, count) in enumerate(zip(batch.sequences, batch.num_sampled, strict=True)):
        draft = batch.drafts(i)
        sequences += [seq] * count
        drafts += [draft[:n] for n in range(count)]
    return sequences, drafts


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
