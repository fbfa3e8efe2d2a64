"""The engine: requests in, token events out, one step at a time. Knows token ids only; used by one thread."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moe_ray.core import EngineStats, Request, Sequence, TokenEvent
from moe_ray.engine.blocks import BlockAllocator
from moe_ray.engine.kv_cache import KVCache
from moe_ray.engine.sampler import sample
from moe_ray.engine.scheduler import Scheduler, SchedulerLimits, split
from moe_ray.errors import ConfigError, InvalidRequest, MoeRayError, Overloaded
from moe_ray.model.trunk import Trunk, interleave


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything an engine is told at construction."""

    num_blocks: int
    block_size: int = 16
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_model_len: int = 4096
    micro_batches: int = 1
    eos_token_ids: frozenset[int] = frozenset()


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
        self._cache = KVCache(trunk.config, options.num_blocks, options.block_size, trunk.dtype, trunk.device)
        self._allocator = BlockAllocator(options.num_blocks, options.block_size)
        self._scheduler = Scheduler(options.limits, self._allocator, options.eos_token_ids, options.max_model_len)
        self._live: dict[str, Sequence] = {}
        self._steps = self._prompt_tokens = self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def kv_cache_bytes(self) -> int:
        return self._cache.nbytes

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `InvalidRequest` if it cannot be served, `Overloaded` if the queue is full."""
        vocab, total = self._trunk.config.vocab_size, len(request.prompt_token_ids) + len(request.output_token_ids)
        if request.request_id in self._live:
            raise InvalidRequest(f"request id {request.request_id!r} is already in use")
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        if total >= self.options.max_model_len:
            raise InvalidRequest(
                f"This model's maximum context length is {self.options.max_model_len} tokens; the prompt has {total}, "
                f"which leaves no room to generate",
                "prompt",
            )
        most = request.sampling.max_tokens
        if most is not None and len(request.output_token_ids) >= most:
            raise InvalidRequest(f"all max_tokens ({most}) were generated already", "output_token_ids")
        for param, ids in (
            ("prompt", request.prompt_token_ids),
            ("output_token_ids", request.output_token_ids),
            ("logit_bias", tuple(request.sampling.logit_bias)),
            ("stop_token_ids", request.sampling.stop_token_ids),
        ):
            if ids and (min(ids) < 0 or max(ids) >= vocab):
                raise InvalidRequest(f"token ids of `{param}` must be between 0 and {vocab - 1}", param)
        if len(self._scheduler.waiting) >= self.options.limits.max_waiting:
            raise Overloaded(f"{self.options.limits.max_waiting} requests are waiting already; try again later")
        seq = Sequence(request, [*request.prompt_token_ids, *request.output_token_ids])
        self._live[request.request_id] = seq
        self._scheduler.add(seq)

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
        passes = [self._trunk.forward(part, self._cache) for part in split(batch, self.options.micro_batches)]
        try:
            logits = torch.cat(interleave(passes))
        except MoeRayError as error:
            for seq in batch.sequences:
                self.abort(seq.request.request_id)
            return [TokenEvent(seq.request.request_id, error=error) for seq in batch.sequences]
        sampling = [seq for seq, wanted in zip(batch.sequences, batch.sample, strict=True) if wanted]
        sampled = sample(logits, sampling, self.options.eos_token_ids)
        self._steps += 1
        self._generated_tokens += len(sampling)
        # A sequence with output computes its newest token for the first time: that one is no prompt, nor recomputed.
        self._prompt_tokens += batch.num_tokens - sum(seq.num_output > 0 for seq in sampling)
        events = []
        results = self._scheduler.update(batch, sampled.token_ids)
        for (seq, reason, stop_token), logprobs in zip(results, sampled.logprobs, strict=True):
            if reason is not None:
                del self._live[seq.request.request_id]
            events.append(
                TokenEvent(
                    request_id=seq.request.request_id,
                    token_ids=(seq.token_ids[-1],),
                    logprobs=() if logprobs is None else (logprobs,),
                    finish_reason=reason,
                    stop_token_id=stop_token,
                    num_cached_tokens=seq.num_cached_prompt,
                )
            )
        return events

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
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if block bookkeeping is inconsistent. Between steps only."""
        self._scheduler.check_integrity()
