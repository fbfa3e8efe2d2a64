"""From the messages, tools and formats of a chat request to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_ray.api.chat import ChatInput, chat_prompt
from moe_ray.api.job import Prompt
from moe_ray.api.openai.schemas import BatchChatRequest, ChatBody, ChatMessage
from moe_ray.api.openai.tools import choice_of, conversation, tools_of
from moe_ray.errors import InvalidRequest
from moe_ray.text.tokenizer import Tokenizer


def chat_prompts(body: ChatBody, tokenizer: Tokenizer) -> list[Prompt]:
    """One prompt for each conversation. Raises `InvalidRequest` as `chat_prompt` does."""
    prompts: list[Prompt] = []
    for number, messages in enumerate(body.conversations):
        try:
            prompts.append(chat_prompt(_chat_input_of(body, messages), tokenizer))
        except InvalidRequest as error:
            if not isinstance(body, BatchChatRequest) or not (error.param or "").startswith("messages"):
                raise
            named = f"messages[{number}]"
            told = str(error).replace("`messages", f"`{named}")
            raise InvalidRequest(told, named + str(error.param).removeprefix("messages")) from None
    return prompts


def chat_input(messages: Sequence[ChatMessage], **options: Any) -> ChatInput:
    """The conversation of a body in the form of chat templates; `options` are further fields of `ChatInput`."""
    return ChatInput(conversation([message.model_dump(exclude_unset=True) for message in messages]), **options)


def _chat_input_of(body: ChatBody, messages: Sequence[ChatMessage]) -> ChatInput:
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return chat_input(
        messages,
        tools=tools_of(body.tools, body.functions),
        tool_choice=choice_of(body.tool_choice, body.function_call, body.parallel_tool_calls, bool(body.functions)),
        grammar=body.text_grammar(),
        add_generation_prompt=body.add_generation_prompt,
        add_special_tokens=body.add_special_tokens,
        continue_final_message=body.continue_final_message,
        documents=body.documents,
        template_kwargs={**effort, **body.chat_template_kwargs},
    )
