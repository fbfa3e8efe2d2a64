"""The routes of TGI's API (text-generation-inference)."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from moe_ray import __version__
from moe_ray.api import sse
from moe_ray.api.body import read_body
from moe_ray.api.failure import failure_of
from moe_ray.api.job import MAX_CHOICES, GenerationJob, ModelLimits
from moe_ray.api.openai.conversations import chat_input
from moe_ray.api.openai.parse import parse_chat
from moe_ray.api.openai.parse import to_job as chat_job
from moe_ray.api.openai.schemas import ChatRequest
from moe_ray.api.openapi import events_of, json_body
from moe_ray.api.output import JobOutput
from moe_ray.api.route_answers import ANYWHERE, answers, failures
from moe_ray.api.service import ServedModel, degraded
from moe_ray.api.tgi.errors import stream_error
from moe_ray.api.tgi.parse import parameters_of, read, to_job
from moe_ray.api.tgi.render import TgiRenderer, event
from moe_ray.api.tgi.schemas import (
    TgiChatTokens,
    TgiCompatBody,
    TgiErrorBody,
    TgiGenerateBody,
    TgiGenerated,
    TgiGeneratedList,
    TgiInfo,
    TgiPredictions,
    TgiStreamEvent,
    TgiVertexBody,
)
from moe_ray.api.tgi.timing import Stopwatch, timing_headers
from moe_ray.core import AdapterRef
from moe_ray.errors import InvalidRequest
from moe_ray.text.tokenizer import TokenSpan

PIPELINE: Final = "text-generation"
STATUSES: Final = (413, 422, 424, 429, 500)
EVENTS: Final = events_of(TgiStreamEvent, TgiErrorBody)


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they answer from `service`."""
    limit = service.options.tgi.payload_limit_bytes

    @app.post(
        "/",
        openapi_extra=json_body(TgiCompatBody),
        responses=answers(TgiGeneratedList, TgiErrorBody, EVENTS, STATUSES),
    )
    async def compat_generate(request: Request) -> Response:
        """Generate: a list of one answer, or server-sent events where the body has `stream`."""
        return await compat(service, await read_body(request, limit))

    @app.post(
        "/generate",
        openapi_extra=json_body(TgiCompatBody),
        responses=answers(TgiGenerated, TgiErrorBody, statuses=STATUSES),
    )
    async def generate(request: Request) -> Response:
        """Generate one answer."""
        watch = Stopwatch()
        raw = await read_body(request, limit)
        body = read(TgiCompatBody, raw)
        if body.stream:
            raise InvalidRequest("`stream` is not supported here: use /generate_stream, or `/`", "stream")
        return await _whole(service, raw, body, watch, full_text=False, in_list=False)

    @app.post(
        "/generate_stream",
        openapi_extra=json_body(TgiCompatBody),
        response_class=Response,  # which has no media type of its own
        responses={200: {"content": EVENTS}, **failures(TgiErrorBody, *ANYWHERE, *STATUSES)},
    )
    async def generate_stream(request: Request) -> Response:
        """Generate one answer as server-sent events, one for each token."""
        raw = await read_body(request, limit)
        body = read(TgiCompatBody, raw)
        if body.stream is False:
            raise InvalidRequest("`stream` is true here: use /generate, or `/`", "stream")
        return await _streamed(service, raw, body, full_text=False)

    @app.post(
        "/vertex",
        openapi_extra=json_body(TgiVertexBody),
        responses=answers(TgiPredictions, TgiErrorBody, statuses=STATUSES),
    )
    async def vertex(request: Request) -> Response:
        """Generate an answer for each of several inputs, as Vertex AI sends them."""
        raw = await read_body(request, limit)
        return await _vertex(service, raw, read(TgiVertexBody, raw))

    @app.post(
        "/chat_tokenize",
        openapi_extra=json_body(ChatRequest),
        responses=answers(TgiChatTokens, TgiErrorBody, statuses=(413, 422, 424)),
    )
    async def chat_tokenize(request: Request) -> Response:
        """The text and the tokens that a chat request's messages become."""
        return await _chat_tokenize(service, await read_body(request, limit))

    @app.get("/info", responses=answers(TgiInfo, TgiErrorBody, statuses=()))
    async def info() -> TgiInfo:
        """The served model and the limits of requests."""
        return await _info(service)


async def compat(service: ServedModel, raw: bytes) -> Response:
    """The answer to a body of POST /."""
    watch = Stopwatch()
    body = read(TgiCompatBody, raw)
    if body.stream:
        return await _streamed(service, raw, body, full_text=True)
    return await _whole(service, raw, body, watch, full_text=True, in_list=True)


async def tokenize(service: ServedModel, raw: bytes) -> Response:
    """The answer to a body of POST /tokenize with `inputs`."""
    body = read(TgiGenerateBody, raw)

    def make(_: ModelLimits) -> list[TokenSpan]:
        return service.tokenizer.spans(body.inputs)

    spans = await service.parse(len(raw), make)
    truncate = parameters_of(body).truncate
    return JSONResponse(_tokens(spans[-truncate:] if truncate else spans))


async def _job(service: ServedModel, raw: bytes, body: TgiGenerateBody, *, stream: bool = False) -> GenerationJob:
    job_id = "tgi-" + uuid.uuid4().hex
    adapter = _adapter(service, parameters_of(body).adapter_id)

    def make(limits: ModelLimits) -> GenerationJob:
        return to_job(body, service.tokenizer, limits, service.options.tgi, job_id, stream=stream)

    return (await service.parse(len(raw), make)).with_adapter(adapter)


def _adapter(service: ServedModel, name: str | None) -> AdapterRef | None:
    """The adapter that a request asks for. Raises `InvalidRequest` where it is not served."""
    if name is None:
        return None
    entry = service.adapter(name)
    if entry is None:
        raise InvalidRequest(f"`adapter_id`: no adapter {name!r} is served here", "adapter_id")
    return entry.ref


def _full_text(body: TgiGenerateBody, default: bool) -> bool:
    asked = parameters_of(body).return_full_text
    return default if asked is None else asked


async def _whole(
    service: ServedModel, raw: bytes, body: TgiGenerateBody, watch: Stopwatch, *, full_text: bool, in_list: bool
) -> Response:
    job = await _job(service, raw, body)
    watch.mark_validated()
    output = await service.finish(job)
    renderer = TgiRenderer(
        output, body=body, tokenizer=service.tokenizer, full_text=_full_text(body, full_text), in_list=in_list
    )
    headers = {**_compute_headers(service, body), **timing_headers(watch, output, renderer.best), **degraded(output)}
    return JSONResponse(renderer.whole(), headers=headers)


async def _streamed(service: ServedModel, raw: bytes, body: TgiGenerateBody, *, full_text: bool) -> Response:
    """A stream. What is wrong with the parameters is an event in it, as TGI's clients expect."""
    headers = _compute_headers(service, body)
    try:
        job = await _job(service, raw, body, stream=True)
        make = partial(TgiRenderer, body=body, tokenizer=service.tokenizer, full_text=_full_text(body, full_text))
        return await service.respond(job, make, headers)
    except InvalidRequest as error:
        told = event(stream_error(failure_of(error)))
        return StreamingResponse(iter([told]), media_type=sse.MEDIA_TYPE, headers={**headers, **sse.HEADERS})


async def _vertex(service: ServedModel, raw: bytes, body: TgiVertexBody) -> Response:
    if len(body.instances) > MAX_CHOICES:
        raise InvalidRequest(f"`instances` holds more than {MAX_CHOICES}", "instances")
    asked = [await _instance(service, raw, each) for each in body.instances]
    outputs = await asyncio.gather(*(service.finish(job) for job, _ in asked))
    texts = [make(output) for (_, make), output in zip(asked, outputs, strict=True)]
    return JSONResponse({"predictions": texts})


async def _instance(
    service: ServedModel, raw: bytes, instance: dict[str, Any]
) -> tuple[GenerationJob, Callable[[JobOutput], str]]:
    """The job of one instance, and what makes its text."""
    own = sse.dumps(instance).encode()
    if "messages" in instance:
        chat = parse_chat(own)
        if chat.stream or chat.n != 1:
            raise InvalidRequest("`instances`: neither `stream` nor `n` is supported", "instances")
        job_id = "tgi-" + uuid.uuid4().hex
        job = await service.parse(len(raw), lambda limits: chat_job(chat, service.tokenizer, limits, job_id))
        return job, lambda output: "".join(output.choices[0].text)
    body = read(TgiGenerateBody, own)
    full_text = _full_text(body, False)

    def text(output: JobOutput) -> str:
        renderer = TgiRenderer(output, body=body, tokenizer=service.tokenizer, full_text=full_text)
        whole: str = renderer.whole()["generated_text"]
        return whole

    return await _job(service, raw, body), text


async def _chat_tokenize(service: ServedModel, raw: bytes) -> Response:
    body = parse_chat(raw)
    if (body.model_extra or {}).get("tools"):
        raise InvalidRequest("`tools` is not supported on /chat_tokenize", "tools")
    chat = chat_input(body.messages)

    def make(_: ModelLimits) -> tuple[str, list[TokenSpan]]:
        text = service.tokenizer.render_chat(
            chat.messages,
            body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
        )
        return text, service.tokenizer.spans(text, add_special_tokens=body.add_special_tokens)

    text, spans = await service.parse(len(raw), make)
    return JSONResponse({"tokenize_response": _tokens(spans), "templated_text": text})


async def _info(service: ServedModel) -> TgiInfo:
    limits = service.options.tgi
    most = (await service.parse(0, lambda found: found)).max_model_len
    return TgiInfo(
        model_id=limits.model_id or service.served_name,
        model_sha=limits.model_sha,
        model_pipeline_tag=PIPELINE,
        max_concurrent_requests=limits.max_concurrent_requests,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_input_tokens=max(most - 1, 0) if limits.max_input_tokens is None else limits.max_input_tokens,
        max_total_tokens=most,
        validation_workers=1,
        max_client_batch_size=MAX_CHOICES,
        router="moe_ray",
        version=__version__,
        sha=None,
        docker_label=None,
    )


def _compute_headers(service: ServedModel, body: TgiGenerateBody) -> dict[str, str]:
    return {"x-compute-type": service.options.tgi.compute_type, "x-compute-characters": str(len(body.inputs))}


def _tokens(spans: Sequence[TokenSpan]) -> list[dict[str, Any]]:
    return [{"id": each.token_id, "text": each.text, "start": each.start, "stop": each.stop} for each in spans]
