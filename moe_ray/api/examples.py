"""Requests that /openapi.json shows: every one is answered as it stands, once the served model's name is in it."""

from __future__ import annotations

from typing import Any, Final

_ASK: Final = [{"role": "user", "content": "What is the capital of France?"}]
_WEATHER: Final[dict[str, Any]] = {
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_TOOL: Final[dict[str, Any]] = {"type": "function", "function": _WEATHER}
_CITY: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
_TGI: Final[dict[str, dict[str, Any]]] = {
    "text": {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 16}},
    "details": {
        "inputs": "The capital of France is",
        "parameters": {"max_new_tokens": 16, "do_sample": True, "seed": 7, "details": True, "top_n_tokens": 2},
    },
}

EXAMPLES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "/v1/chat/completions": {
        "question": {"messages": _ASK, "max_tokens": 32},
        "streamed": {"messages": _ASK, "max_tokens": 32, "stream": True, "stream_options": {"include_usage": True}},
        "log-probabilities": {"messages": _ASK, "max_tokens": 8, "logprobs": True, "top_logprobs": 2},
        "tool": {"messages": _ASK, "max_tokens": 64, "tools": [_TOOL], "tool_choice": "auto"},
        "JSON": {
            "messages": _ASK,
            "max_tokens": 64,
            "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": _CITY}},
        },
    },
    "/v1/chat/completions/batch": {"two conversations": {"messages": [_ASK, _ASK], "max_tokens": 16}},
    "/v1/completions": {
        "text": {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
        "streamed": {"prompt": "The capital of France is", "max_tokens": 16, "stream": True, "logprobs": 1},
        "several prompts": {"prompt": ["One, two,", "Un, deux,"], "max_tokens": 8, "n": 2},
    },
    "/v1/responses": {
        "text": {"input": "What is the capital of France?", "max_output_tokens": 32},
        "streamed": {"input": "What is the capital of France?", "max_output_tokens": 32, "stream": True},
        "tool": {
            "input": "How is the weather in Paris?",
            "max_output_tokens": 64,
            "tools": [{"type": "function", **_WEATHER}],
        },
    },
    "/v1/messages": {
        "question": {"messages": _ASK, "max_tokens": 32},
        "streamed": {"messages": _ASK, "max_tokens": 32, "system": "Be brief.", "stream": True},
        "tool": {
            "messages": _ASK,
            "max_tokens": 64,
            "tools": [{"name": "weather", "input_schema": _WEATHER["parameters"]}],
        },
    },
    "/v1/messages/count_tokens": {"question": {"messages": _ASK}},
    "/api/generate": {
        "lines": {"prompt": "What is the capital of France?", "options": {"num_predict": 32}},
        "whole": {"prompt": "What is the capital of France?", "options": {"num_predict": 32}, "stream": False},
    },
    "/api/chat": {
        "lines": {"messages": _ASK, "options": {"num_predict": 32}},
        "whole": {"messages": _ASK, "options": {"num_predict": 32}, "stream": False, "tools": [_TOOL]},
    },
    "/api/show": {"model": {}},
    "/api/pull": {"model": {"stream": False}},
    "/": {**_TGI, "streamed": {**_TGI["text"], "stream": True}},
    "/generate": _TGI,
    "/generate_stream": _TGI,
    "/vertex": {"two instances": {"instances": [_TGI["text"], {"messages": _ASK, "max_tokens": 16}]}},
    "/chat_tokenize": {"question": {"messages": _ASK}},
    "/tokenize": {
        "TGI": {"inputs": "The capital of France"},
        "vLLM": {"prompt": "The capital of France", "return_token_strs": True},
        "conversation": {"messages": _ASK},
    },
    "/detokenize": {"three tokens": {"tokens": [1, 415, 5565]}},
    "/invocations": {
        "TGI": _TGI["text"],
        "chat": {"messages": _ASK, "max_tokens": 16},
        "text": {"prompt": "The capital of France is", "max_tokens": 16},
    },
    "/v1/load_lora_adapter": {"a directory": {"lora_name": "poet", "lora_path": "/models/poet"}},
    "/v1/unload_lora_adapter": {"by its name": {"lora_name": "poet"}},
    "/house/scale": {
        "two replicas": {"expert": 3, "replicas": 2},
        "as many as the policy says": {"expert": 3, "replicas": None},
    },
    "/house/kill": {"a replica": {"replica_id": "moe-ray#Expert3#a1b2c3d4"}},
}
"""Path → what the request shows → its body."""
_NAMED: Final = ("/v1/", "/api/")
"""Bodies on paths that begin so name a model, but for those of adapters."""


def examples_of(path: str, model: str) -> dict[str, dict[str, Any]]:
    """The examples of a path, of the served model."""
    names = {"model": model} if path.startswith(_NAMED) and not path.endswith("_lora_adapter") else {}
    return {shown: {**names, **body} for shown, body in EXAMPLES[path].items()}
