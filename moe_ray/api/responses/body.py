"""The response object: what it repeats of its request, and what becomes of it where no answer comes."""

from __future__ import annotations

import json
from typing import Any, Final

from moe_ray.api.failure import Failure
from moe_ray.api.responses.schemas import JsonSchemaFormat, ResponsesRequest
from moe_ray.api.sse import dumps
from moe_ray.core import SamplingParams

GATEWAY_GONE: Final = "The gateway that computed this response is gone. Ask again."
_CODES: Final = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


def request_echo(body: ResponsesRequest, sampling: SamplingParams) -> dict[str, Any]:
    """The fields of a response that say how it was asked for, defaults filled in; all but `model` and `store`."""
    return {
        "background": body.background,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": sampling.temperature,
        "text": {"format": _format(body), "verbosity": body.text.verbosity},
        "tool_choice": _tool_choice(body),
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": bool(tool.strict),
            }
            for tool in body.tools
        ],
        "top_logprobs": body.top_logprobs,
        "top_p": sampling.top_p,
        "truncation": body.truncation,
        "user": body.user,
    }


def error_of(failure: Failure) -> dict[str, str]:
    """The `error` of a response that failed."""
    return {"code": _CODES.get(failure.status, "server_error"), "message": failure.message}


def with_status(response: str, status: str) -> str:
    """A response's JSON with another status."""
    return dumps({**json.loads(response), "status": status})


def abandoned(response: str) -> str:
    """A response's JSON, once the process that computed it is gone."""
    error = {"code": "server_error", "message": GATEWAY_GONE}
    return dumps({**json.loads(response), "status": "failed", "error": error})


def _format(body: ResponsesRequest) -> dict[str, Any]:
    given = body.text.format
    if not isinstance(given, JsonSchemaFormat):
        return {"type": given.type}
    said = {"name": given.name, "description": given.description, "strict": bool(given.strict)}
    return {"type": given.type, **said, "schema": given.schema_}


def _tool_choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    return choice if isinstance(choice, str) else choice.model_dump(include={"type", "name", "mode", "tools"})
