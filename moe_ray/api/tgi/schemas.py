"""The bodies of TGI's routes: what clients send, and what they get.

Requests hold the types alone: TGI's rules for the values, with TGI's own messages, are in `parse.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, RootModel

from moe_ray.api.documented import Documented
from moe_ray.api.openapi import schema_of


class TgiGrammar(Documented):
    """What the generated text must match."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["json", "json_object", "regex", "json_schema"]
    value: Any
    """A JSON schema, as an object or as its text; a regular expression; {"name", "schema"} for json_schema."""


class TgiParameters(Documented):
    """How to generate. null is as good as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="forbid")

    best_of: int | None = Field(default=None, ge=0)
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    """Default: false; true where the request has no `parameters` at all."""
    max_new_tokens: int | None = Field(default=None, ge=0)
    """Default: as many as fit behind the input."""
    return_full_text: bool | None = None
    """Default: false; true on `/` and `/invocations`."""
    stop: list[str] | None = None
    truncate: int | None = Field(default=None, ge=0)
    """Keep the last so many tokens of the input."""
    watermark: bool | None = None
    """Not supported: only false."""
    details: bool | None = None
    decoder_input_details: bool | None = None
    """Tell the input's tokens and their log-probabilities; implies `details`. Not in streams."""
    seed: int | None = Field(default=None, ge=0, le=2**64 - 1)
    top_n_tokens: int | None = Field(default=None, ge=0)
    grammar: TgiGrammar | None = None
    adapter_id: str | None = None
    """Not supported yet."""


class TgiGenerateBody(Documented):
    """Body of POST /tokenize, and an instance of POST /vertex."""

    model_config = ConfigDict(strict=True, extra="forbid")

    inputs: str
    parameters: TgiParameters | None = None
    options: dict[str, Any] | None = None
    """`use_cache` and the like, which clients of Hugging Face's hosted API send: of no meaning here."""


class TgiCompatBody(TgiGenerateBody):
    """Body of POST /, /generate and /generate_stream, and one of those of POST /invocations."""

    stream: bool | None = None
    """Of /generate only false, of /generate_stream only true."""


def _one_of_two(schema: dict[str, Any]) -> None:
    chat = {"type": "object", "required": ["messages"], "properties": {"messages": {"type": "array"}}}
    schema["properties"]["instances"]["items"] = {"anyOf": [schema_of(TgiGenerateBody), chat]}


class TgiVertexBody(Documented):
    """Body of POST /vertex."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=_one_of_two)

    instances: list[dict[str, Any]] = Field(min_length=1)
    """Each a body of /generate, or one of chat completions."""


class TgiPredictions(Documented):
    """Response of POST /vertex."""

    predictions: list[str]


FinishedBy = Literal["length", "eos_token", "stop_sequence"]


class TgiPrefillToken(Documented):
    """A token of the input."""

    id: int
    text: str
    logprob: float | None
    """null of the first one."""


class TgiToken(Documented):
    """A generated token."""

    id: int
    text: str
    logprob: float
    special: bool


class TgiSequence(Documented):
    """How one sequence was generated."""

    finish_reason: FinishedBy
    generated_tokens: int
    seed: int | None
    """null of a greedy one."""
    prefill: list[TgiPrefillToken]
    tokens: list[TgiToken]
    top_tokens: list[list[TgiToken]] | None = None
    """Left out unless `top_n_tokens` asks for them."""


class TgiBestOfSequence(TgiSequence):
    """One that was not the best."""

    generated_text: str


class TgiDetails(TgiSequence):
    """`details` of a response."""

    best_of_sequences: list[TgiBestOfSequence] | None = None
    """The others, where `best_of` is above 1; else left out."""


class TgiGenerated(Documented):
    """Response of POST /generate; of POST / in a list."""

    generated_text: str
    details: TgiDetails | None = None
    """Left out unless asked for."""


class TgiGeneratedList(RootModel[list[TgiGenerated]]):
    """Response of POST /: a list of one."""


class TgiStreamDetails(Documented):
    """`details` of the last event."""

    finish_reason: FinishedBy
    generated_tokens: int
    seed: int | None
    input_length: int


class TgiStreamEvent(Documented):
    """One event of a stream: one token."""

    index: int
    token: TgiToken
    top_tokens: list[TgiToken] | None = None
    generated_text: str | None
    """Of the last event: the whole text."""
    details: TgiStreamDetails | None


class TgiErrorBody(Documented):
    """Body of an error response, or an event of a stream that failed."""

    error: str
    error_type: str


class TgiInfo(Documented):
    """Response of GET /info."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class TgiSimpleToken(Documented):
    """A token of a text."""

    id: int
    text: str
    start: int
    """In bytes of the text's UTF-8."""
    stop: int


class TgiTokens(RootModel[list[TgiSimpleToken]]):
    """Response of POST /tokenize to a body with `inputs`."""


class TgiChatTokens(Documented):
    """Response of POST /chat_tokenize."""

    tokenize_response: list[TgiSimpleToken]
    templated_text: str
