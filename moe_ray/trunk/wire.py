"""Requests and token events between gateway and trunk, as protobuf messages of protos/moe_ray.proto."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, Final, cast

from google.protobuf.descriptor import FieldDescriptor

from moe_ray import errors
from moe_ray.core import (
    AdapterEntry,
    EngineStats,
    FinishReason,
    Request,
    RoutedExperts,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from moe_ray.engine.step_times import STAGES, Kind, StepTimes
from moe_ray.errors import InvalidRequest, MoeRayError, ProtocolError
from moe_ray.histogram import Histogram
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.sampling import Grammar, GrammarKind

_FINISH_REASONS: Final = ("stop", "length", "abort")
_SAMPLING_FIELDS: Final[tuple[FieldDescriptor, ...]] = tuple(pb.SamplingParams.DESCRIPTOR.fields)  # type: ignore[arg-type]
"""Named like those of `SamplingParams`."""


COUNTER_FIELDS: Final = tuple(
    field.name for field in fields(EngineStats) if field.name in pb.TrunkCounters.DESCRIPTOR.fields_by_name
)
"""Of `EngineStats`: those that only grow."""


def pack_request(request: Request) -> pb.Submit:
    """Request → message."""
    return pb.Submit(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        sampling=pb.SamplingParams(**{field.name: _message(request.sampling, field) for field in _SAMPLING_FIELDS}),
        traceparent=request.traceparent,
        adapter_id=request.adapter_id,
        adapter_source=request.adapter_source,
    )


def unpack_request(message: pb.Submit) -> Request:
    """Message → request. Raises `InvalidRequest` for a parameter out of range. Stop strings stay with the gateway."""
    sampling = {field.name: _value(message.sampling, field) for field in _SAMPLING_FIELDS}
    return Request(
        message.request_id,
        tuple(message.prompt_token_ids),
        SamplingParams(**sampling),
        tuple(message.output_token_ids),
        message.traceparent,
        message.adapter_id,
        message.adapter_source,
    )


def pack_adapter(entry: AdapterEntry) -> pb.AdapterEntry:
    """Entry → message."""
    return pb.AdapterEntry(**asdict(entry))


def unpack_adapter(message: pb.AdapterEntry) -> AdapterEntry:
    """Message → entry."""
    return AdapterEntry(message.name, message.adapter_id, message.source, message.version, message.removed)


def _message(sampling: SamplingParams, field: FieldDescriptor) -> Any:
    """The value of one field as its message takes it."""
    value = getattr(sampling, field.name)
    if isinstance(value, Grammar):
        return pb.Grammar(kind=value.kind, source=value.source)
    if field.name == "bad_words_ids":
        return [pb.TokenIds(ids=ids) for ids in value]
    return value


def _value(message: pb.SamplingParams, field: FieldDescriptor) -> Any:
    """The value of one field as `SamplingParams` takes it; None for one that is not set."""
    if field.has_presence and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, pb.Grammar):
        return Grammar(cast(GrammarKind, value.kind), value.source)
    if field.name == "bad_words_ids":
        return tuple(tuple(each.ids) for each in value)
    return tuple(value) if field.is_repeated else value


def pack_load(stats: EngineStats, draining: bool, times: StepTimes | None = None) -> pb.TrunkLoad:
    """How busy a trunk is, and whether it takes nothing new → message; with `times`, all its counters, too."""
    return pb.TrunkLoad(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        kv_blocks_total=stats.kv_blocks_total,
        kv_blocks_free=stats.kv_blocks_free,
        draining=draining,
        counters=None if times is None else pack_counters(stats, times),
    )


def pack_counters(stats: EngineStats, times: StepTimes) -> pb.TrunkCounters:
    """What a trunk did since it was started → message."""

    def of_kind(kind: Kind) -> pb.StepTimes:
        stages = [_distribution(times.stages[kind, stage]) for stage in STAGES]
        return pb.StepTimes(steps=_distribution(times.steps[kind]), stages=stages)

    return pb.TrunkCounters(
        **{name: getattr(stats, name) for name in COUNTER_FIELDS},
        prefill=of_kind("prefill"),
        decode=of_kind("decode"),
        step_tokens=_distribution(times.tokens),
        step_sequences=_distribution(times.sequences),
        joined_steps=times.joined,
    )


def _distribution(histogram: Histogram) -> pb.Distribution:
    return pb.Distribution(counts=histogram.counts, total=histogram.total)


def pack_step(events: Iterable[TokenEvent], load: pb.TrunkLoad, adapters: Iterable[AdapterEntry] = ()) -> pb.StepEvents:
    """What one step brought one gateway → message; with what it may not know of adapters."""
    return pb.StepEvents(events=map(pack_event, events), load=load, adapters=map(pack_adapter, adapters))


def pack_event(event: TokenEvent) -> pb.TokenEvent:
    """Event → message."""
    message = pb.TokenEvent(
        request_id=event.request_id,
        token_ids=event.token_ids,
        finish_reason=event.finish_reason or "",
        stop_token_id=event.stop_token_id,
        num_cached_tokens=event.num_cached_tokens,
        queue_s=event.queue_s,
        degraded_positions=event.degraded_positions,
    )
    message.logprobs.extend(map(_pack_logprobs, event.logprobs))
    if event.prompt_logprobs:
        message.prompt_logprobs.extend(map(_pack_logprobs, event.prompt_logprobs))
        message.prompt_logprobs_start = event.prompt_logprobs_start
    if (told := event.routed_experts) is not None:
        positions, layers, top_k = told.shape
        message.routed_experts.CopyFrom(
            pb.RoutedExperts(
                start=told.start, num_positions=positions, num_layers=layers, top_k=top_k, experts=told.data
            )
        )
    if event.error is not None:
        message.error_type = type(event.error).__name__
        message.error_message = str(event.error)
        message.error_param = getattr(event.error, "param", None) or ""
    return message


def unpack_event(message: pb.TokenEvent) -> TokenEvent:
    """Message → event. Raises `ProtocolError` on a finish reason that does not exist."""
    if message.finish_reason and message.finish_reason not in _FINISH_REASONS:
        raise ProtocolError(f"trunk sent finish reason {message.finish_reason!r}")
    return TokenEvent(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_unpack_logprobs, message.logprobs)),
        finish_reason=cast(FinishReason, message.finish_reason) if message.finish_reason else None,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        num_cached_tokens=message.num_cached_tokens,
        queue_s=message.queue_s,
        degraded_positions=tuple(message.degraded_positions),
        routed_experts=_routed(message.routed_experts) if message.HasField("routed_experts") else None,
        prompt_logprobs=tuple(map(_unpack_logprobs, message.prompt_logprobs)),
        prompt_logprobs_start=message.prompt_logprobs_start,
        error=_error(message) if message.error_type else None,
    )


def _pack_logprobs(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top_token_ids=[token for token, _ in entry.top],
        top_logprobs=[value for _, value in entry.top],
        rank=entry.rank,
    )


def _unpack_logprobs(message: pb.TokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(message.token_id, message.logprob, top, message.rank)


def _routed(message: pb.RoutedExperts) -> RoutedExperts:
    return RoutedExperts(message.start, (message.num_positions, message.num_layers, message.top_k), message.experts)


def _error(message: pb.TokenEvent) -> MoeRayError:
    kind = getattr(errors, message.error_type, None)
    if not (isinstance(kind, type) and issubclass(kind, MoeRayError)):
        kind = errors.EngineError
    if issubclass(kind, InvalidRequest):
        return kind(message.error_message, message.error_param or None)
    return kind(message.error_message)
