"""Text to token ids and back, as vLLM's `/tokenize` and `/detokenize` answer it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, StrictInt

from moe_ray.api.chat import chat_prompt
from moe_ray.api.documented import Documented
from moe_ray.api.job import ModelLimits, check_ids
from moe_ray.api.openai.conversations import chat_input
from moe_ray.api.openai.parse import validated
from moe_ray.api.openai.schemas import ChatMessage
from moe_ray.api.openai.tools import ToolBody, tools_of
from moe_ray.errors import InvalidRequest
from moe_ray.text.tokenizer import Tokenizer


class TokenizeRequest(Documented):
    """Body of POST /tokenize: a `prompt`, or the `messages` of a conversation."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Default: of a prompt true, of a conversation false: templates write them."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False
    tools: Annotated[list[ToolBody], Field(default_factory=list)]


class TokenizeResponse(Documented):
    """Token ids of a text or a conversation."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Documented):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[StrictInt]


class DetokenizeResponse(Documented):
    """The text of token ids."""

    prompt: str


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Validate a body; raises `InvalidRequest` with the field in `param`."""
    request = validated(TokenizeRequest, body)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("either `prompt` or `messages` is required, and not both", "prompt")
    return request


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Validate a body; raises `InvalidRequest` with the field in `param`."""
    return validated(DetokenizeRequest, body)


def tokenize(request: TokenizeRequest, tokenizer: Tokenizer, limits: ModelLimits) -> TokenizeResponse:
    """The tokens that a completion or chat request of this text would have as its prompt. Raises `InvalidRequest`."""
    if request.messages is None:
        special = request.add_special_tokens is not False
        ids = tokenizer.encode(request.prompt or "", special)
    else:
        chat = chat_input(
            request.messages,
            tools=tools_of(request.tools, ()),
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=bool(request.add_special_tokens),
            template_kwargs=request.chat_template_kwargs,
        )
        ids = list(chat_prompt(chat, tokenizer).token_ids)
    strings = [tokenizer.token_to_str(token_id) for token_id in ids] if request.return_token_strs else None
    return TokenizeResponse(count=len(ids), max_model_len=limits.max_model_len, tokens=ids, token_strs=strings)


def detokenize(request: DetokenizeRequest, tokenizer: Tokenizer, limits: ModelLimits) -> DetokenizeResponse:
    """The text of token ids, special tokens too. Raises `InvalidRequest` for an id outside of the vocabulary."""
    check_ids(request.tokens, "tokens", limits.vocab_size)
    return DetokenizeResponse(prompt=tokenizer.decode(request.tokens, skip_special_tokens=False))
