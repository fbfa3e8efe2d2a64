"""Adapters added and removed while the server runs, by vLLM's paths."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field, StrictStr
from starlette.responses import PlainTextResponse, Response

from moe_ray.api.documented import Documented
from moe_ray.api.openai.answers import OpenAIError
from moe_ray.api.openai.parse import validated
from moe_ray.api.openapi import json_body
from moe_ray.api.route_answers import ANYWHERE, failures
from moe_ray.api.service import ServedModel
from moe_ray.errors import Forbidden

_TEXT: Final = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "What was done"}
_JSON: Final = "application/json"


class LoadAdapterRequest(Documented):
    """Body of POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    """By which requests ask for it, as `model`."""
    lora_path: Annotated[StrictStr, Field(min_length=1, max_length=4096)]
    """Its directory on the server's machines, or its repository on the Hugging Face Hub."""
    load_inplace: bool = False
    """Take the place of the adapter that has the name."""


class UnloadAdapterRequest(Documented):
    """Body of POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    lora_int_id: int | None = None
    """Of no effect."""


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they change what `service` serves. Where that is not permitted, they only say so."""
    told = service.open_adapter is not None

    @app.post(
        "/v1/load_lora_adapter",
        include_in_schema=told,
        openapi_extra=json_body(LoadAdapterRequest),
        response_class=Response,  # which has no media type of its own
        responses={200: _TEXT, **failures(OpenAIError, *ANYWHERE, 400, 403, 500)},
    )
    async def load(request: Request) -> Response:
        """Serve a LoRA adapter under a name, from now on."""
        _check(service, request)
        body = validated(LoadAdapterRequest, await request.body())
        assert service.open_adapter is not None
        adapter = await asyncio.to_thread(service.open_adapter, body.lora_path)
        if body.load_inplace and service.adapter(body.lora_name) is not None:
            service.remove_adapter(body.lora_name)
        service.add_adapter(body.lora_name, adapter)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post(
        "/v1/unload_lora_adapter",
        include_in_schema=told,
        openapi_extra=json_body(UnloadAdapterRequest),
        response_class=Response,
        responses={200: _TEXT, **failures(OpenAIError, *ANYWHERE, 400, 403, 404, 500)},
    )
    async def unload(request: Request) -> Response:
        """Serve a LoRA adapter no longer. Requests that have it go on."""
        _check(service, request)
        body = validated(UnloadAdapterRequest, await request.body())
        service.remove_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _check(service: ServedModel, request: Request) -> None:
    """Raise `Forbidden` where clients may not change which adapters are served, or a web page may have sent this."""
    if service.open_adapter is None:
        raise Forbidden("adapters are not loaded by requests here: the server needs adapters.runtime_loading")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise Forbidden(f"the content type must be {_JSON}")
