"""OpenAI's responses, whole or as server-sent events, from the token events of one HTTP request."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from moe_ray.api.openai.choice import Choice
from moe_ray.api.openai.errors import error_body
from moe_ray.api.openai.protocol import Body, ChatRequest
from moe_ray.core import Request, TokenEvent, TokenLogprobs
from moe_ray.errors import EngineError, MoeRayError
from moe_ray.text.detokenizer import IncrementalDetokenizer
from moe_ray.text.tokenizer import Tokenizer

Events = AsyncIterator[tuple[int, TokenEvent]]

DONE = "data: [DONE]\n\n"
_MIN_LOGPROB = -9999.0  # JSON has no -inf; the value OpenAI uses
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_log = logging.getLogger(__name__)


class Responder:
    """Builds the response to one HTTP request. Use one of `stream` and `full`, once.

    `on_stop(choice index)` is called for every choice whose engine request is not over when the response needs no more
    of it: its text met a stop string, another choice failed, or the response was closed. The caller closes `events`.
    """

    def __init__(
        self,
        body: Body,
        requests: Sequence[tuple[int, Request]],
        tokenizer: Tokenizer,
        *,
        response_id: str,
        model: str,
        on_stop: Callable[[int], None],
        created: int | None = None,
    ) -> None:
        self._chat = isinstance(body, ChatRequest)
        self._n = body.n
        self._tokenizer = tokenizer
        self._on_stop = on_stop
        options = body.stream_options
        self._include_usage = options is not None and options.include_usage
        self._continuous_usage = options is not None and options.continuous_usage_stats
        self._meta = {
            "id": response_id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()) if created is None else created,
            "model": model,
        }
        # A chunk is written for each token of each stream: all that never changes is serialised here, once.
        chunk = {**self._meta, "object": "chat.completion.chunk"} if self._chat else self._meta
        self._head = "data: " + _dumps(chunk)[:-1] + ',"choices":['
        self._choices = {
            index: Choice(
                index,
                request,
                IncrementalDetokenizer(tokenizer, request.prompt_token_ids, request.sampling),
                head=f'{self._head}{{"index":{index},',
                echo=self._echo(body, index, request),
            )
            for index, request in requests
        }

    @property
    def degraded(self) -> int:
        """Tokens so far that were computed without one of their experts."""
        return sum(len(choice.degraded) for choice in self._choices.values())

    async def stream(self, events: Events) -> AsyncIterator[str]:
        """Yield SSE text, ending in `data: [DONE]`; several `data:` events may come in one string.

        A failure before the first chunk is raised, so that it can still become an HTTP status; a later one is an error
        event before `[DONE]`.
        """
        unfinished = len(self._choices)
        started = False
        try:
            async for index, event in events:
                choice = self._choices[index]
                if choice.finish_reason is not None:
                    continue
                text, logprobs = self._take(choice, event)
                chunk = self._chunk(choice, text, logprobs)
                if chunk:
                    yield chunk
                    started = True
                unfinished -= choice.finish_reason is not None
                if not unfinished:
                    break
            if unfinished:
                raise EngineError(f"the events of {self._meta['id']} ended without a finish reason")
        except Exception as exc:
            if not started:
                raise
            if not isinstance(exc, MoeRayError):
                _log.exception("stream %s failed", self._meta["id"])
            yield f"data: {_dumps(error_body(exc)[1])}\n\n"
        else:
            if self._include_usage:
                yield f'{self._head}],"usage":{_dumps(self._usage())}}}\n\n'
        finally:
            self._stop_unended()
        yield DONE

    async def full(self, events: Events) -> dict[str, Any]:
        """Return the response object when all choices are finished; raises the error of the first that fails."""
        texts: dict[int, list[str]] = {index: [] for index in self._choices}
        logprobs: dict[int, list[TokenLogprobs]] = {index: [] for index in self._choices}
        unfinished = len(self._choices)
        try:
            async for index, event in events:
                choice = self._choices[index]
                if choice.finish_reason is not None:
                    continue
                text, step_logprobs = self._take(choice, event)
                choice.started = True
                texts[index].append(text)
                logprobs[index].extend(step_logprobs)
                unfinished -= choice.finish_reason is not None
                if not unfinished:
                    break
            if unfinished:
                raise EngineError(f"the events of {self._meta['id']} ended without a finish reason")
        finally:
            self._stop_unended()
        choices = []
        for index, choice in sorted(self._choices.items()):
            text = "".join(texts[index])
            says = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            choices.append(
                {
                    "index": index,
                    **says,
                    "logprobs": self._logprobs(choice, logprobs[index]),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                    **({"degraded_positions": choice.degraded} if choice.degraded else {}),
                    **choice.routed(),
                }
            )
        return {**self._meta, "choices": choices, "usage": self._usage()}

    def _take(self, choice: Choice, event: TokenEvent) -> tuple[str, Sequence[TokenLogprobs]]:
        if event.error is not None:
            choice.ended = True
            raise event.error
        taken = choice.take(event)
        if choice.finish_reason is not None and not choice.ended:
            choice.ended = True
            self._on_stop(choice.index)
        return taken

    def _stop_unended(self) -> None:
        for choice in self._choices.values():
            if not choice.ended:
                choice.ended = True
                self._on_stop(choice.index)

    def _chunk(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs]) -> str:
        """One engine step as SSE text; "" where there is nothing to say yet (held-back text, half a character)."""
        usage = ""
        if self._continuous_usage:
            usage = f',"usage":{_dumps(self._usage())}'
        elif self._include_usage:
            usage = ',"usage":null'
        first = ""
        if not choice.started:
            choice.started = True
            if self._chat:
                delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
                first = f"{choice.head}{delta}{usage}}}\n\n"
        with_logprobs = bool(logprobs) and choice.request.sampling.logprobs is not None
        if not text and not with_logprobs and choice.finish_reason is None:
            return first
        if not self._chat:
            says = f'"text":{_dumps(text)}'
        else:
            says = f'"delta":{{"content":{_dumps(text)}}}' if text else '"delta":{}'
        likely = _dumps(self._logprobs(choice, logprobs)) if with_logprobs else "null"
        reason = "null"
        if choice.finish_reason is not None:
            reason = f'"{choice.finish_reason}","stop_reason":{_dumps(choice.stop_reason)}'
            if choice.degraded:
                reason += f',"degraded_positions":{_dumps(choice.degraded)}'
        routed = choice.routed(since_last=True)
        more = f",{_dumps(routed)[1:-1]}" if routed else ""
        return f'{first}{choice.head}{says},"logprobs":{likely},"finish_reason":{reason}{more}}}]{usage}}}\n\n'

    def _usage(self) -> dict[str, Any]:
        prompts = [choice for index, choice in self._choices.items() if index % self._n == 0]  # n choices share one
        prompt = sum(len(choice.request.prompt_token_ids) for choice in prompts)
        completion = sum(choice.num_tokens for choice in self._choices.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached for choice in prompts)},
        }

    def _echo(self, body: Body, index: int, request: Request) -> str:
        if isinstance(body, ChatRequest) or not body.echo:
            return ""
        if isinstance(body.prompt, str):
            return body.prompt
        given = body.prompt[index // body.n]
        return given if isinstance(given, str) else self._tokenizer.decode(request.prompt_token_ids)

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if choice.request.sampling.logprobs is None:
            return None
        if self._chat:
            content = [
                {**self._entry(at.token_id, at.logprob), "top_logprobs": [self._entry(*top) for top in at.top]}
                for at in logprobs
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for at in logprobs:
            offsets.append(choice.offset)
            choice.offset += len(choice.characters.decode(self._tokenizer.token_bytes(at.token_id)))
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(at.logprob) for at in logprobs],
            "tokens": [self._name(at.token_id) for at in logprobs],
            "top_logprobs": [
                {self._name(i): _finite(logprob) for i, logprob in (*at.top, (at.token_id, at.logprob))}
                for at in logprobs
            ],
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.token_bytes(token_id)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(spelled)}

    def _name(self, token_id: int) -> str:
        """A token as the completions format writes it: parts of characters as `bytes:\\xe4`, so that none collide."""
        spelled = self._tokenizer.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float) -> float:
    return logprob if logprob > _MIN_LOGPROB else _MIN_LOGPROB
