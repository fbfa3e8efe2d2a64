"""Text ↔ token ids for one checkpoint: encoding, chat templates, and decoding that streams. Never imports torch."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from moe_ray.core import SamplingParams
from moe_ray.errors import CheckpointError, InvalidRequest

Message = Mapping[str, Any]  # {"role": str, "content": str | [{"type": "text", "text": str}]}

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_INCOMPLETE = "\ufffd"
_HELD_TOKENS = 32  # a character is at most 4 bytes, so longer runs that do not decode never will: emit them as they are
_SEED_TOKENS = 8

# Mixtral's format. mistral-common v1 tokenizes "[INST]" as text and needs the spaces to give the same ids; from v2 on
# the brackets are control tokens that stand alone.
_INST_TEMPLATE = (
    "{{{{ bos_token }}}}{{% for m in messages %}}"
    "{{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}}"
    "{{{{ raise_exception('After the optional system message, conversation roles must alternate"
    " user/assistant/user/assistant/...') }}}}{{% endif %}}"
    "{{% if m['role'] == 'user' %}}{{{{ '{open}' + m['content'] + '{close}' }}}}"
    "{{% elif m['role'] == 'assistant' %}}{{{{ ' ' + m['content'] + eos_token }}}}"
    "{{% else %}}{{{{ raise_exception('Only user and assistant roles are supported') }}}}{{% endif %}}"
    "{{% endfor %}}"
)
_INST_AS_TEXT = _INST_TEMPLATE.format(open=" [INST] ", close=" [/INST]")
_INST_AS_CONTROL = _INST_TEMPLATE.format(open="[INST] ", close="[/INST]")

_SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

_RESERVED_TEMPLATE_KWARGS = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {
    "messages"
}


class Tokenizer:
    """The tokenizer of a checkpoint directory; raises `CheckpointError` naming what is missing. Thread-safe."""

    def __init__(self, checkpoint: Path | str) -> None:
        self._dir = Path(checkpoint)
        self._hf = _load(self._dir)
        self._backend = self._hf.backend_tokenizer
        # Rust raises "Already borrowed" if one thread changes these while another encodes: set once, here.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._decoder = self._backend.decoder.__getstate__().decode() if self._backend.decoder is not None else ""
        self._added = {i: token.content for i, token in self._hf.added_tokens_decoder.items()}
        self.special_ids = frozenset(i for i, token in self._hf.added_tokens_decoder.items() if token.special)
        config = _read_json(self._dir / "config.json")
        self.vocab_size: int = config.get("vocab_size") or len(self._hf)
        """Ids the model has embeddings for: config.json's count, else the tokenizer's."""
        self.bos_token_id: int | None = self._hf.bos_token_id
        self.eos_token_ids: frozenset[int] = _eos_token_ids(self._dir, config, self._hf.eos_token_id)
        self.sampling_defaults: dict[str, float] = _sampling_defaults(self._dir)
        """What generation_config.json recommends where a request says nothing: temperature, top_k, top_p, …"""
        self.token_bytes: Callable[[int], bytes] = lru_cache(maxsize=None)(self._token_bytes)
        """UTF-8 bytes that a token stands for; part of a character for byte-level and byte-fallback tokens."""
        self.chat_template: Any = self._hf.chat_template or self._inst_template()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A BOS that the text spells out already is not added a second time."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        doubled = add_special_tokens and len(ids) > 1 and ids[0] == ids[1] == self.bos_token_id
        return ids[1:] if doubled and text.startswith(self._hf.bos_token) else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids outside the vocabulary give nothing."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; raises `InvalidRequest` with the template's own message. See `render_chat`."""
        text = self.render_chat(
            messages,
            add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode(text, add_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of a conversation; `template_kwargs` are variables for the template.

        A template that refuses the system role gets the system text in front of the first user turn, as Mistral's own
        code does. Raises `InvalidRequest` with the template's message.
        """
        if self.chat_template is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", "messages")
        variables = dict(template_kwargs or {})
        if reserved := sorted(_RESERVED_TEMPLATE_KWARGS & variables.keys()):
            raise InvalidRequest(f"`chat_template_kwargs` may not set {', '.join(reserved)}", "chat_template_kwargs")
        chat = [{**message, "content": _text_of(message)} for message in messages]

        def render(chat: list[dict[str, Any]]) -> str:
            text: str = self._hf.apply_chat_template(
                chat,
                chat_template=self.chat_template if isinstance(self.chat_template, str) else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
            return text

        try:
            try:
                return render(chat)
            except TemplateError:
                merged = _merge_system(chat)
                if merged is None:
                    raise
                return render(merged)
        except (TemplateError, ValueError, TypeError, LookupError) as exc:
            raise InvalidRequest(f"The chat template refused the messages: {exc}", "messages") from exc

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if "ByteLevel" in self._decoder:
            return bytes(self._byte_of[c] for c in token if c in self._byte_of)
        if "ByteFallback" in self._decoder and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode() if "▁" in self._decoder else token.encode()

    def token_to_str(self, token_id: int) -> str:
        """Text of one token by itself, its leading space kept; U+FFFD where it is part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Byte-level BPE's printable stand-in for each byte (Radford et al. 2019, `bytes_to_unicode`)."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in printable]
        return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def _inst_template(self) -> str | None:
        vocab = self._hf.get_vocab()
        if "[INST]" in vocab:
            return _INST_AS_CONTROL
        # "INST" is one piece in the sentencepiece models that were trained on this format; byte-level ones have it too
        return _INST_AS_TEXT if "INST" in vocab and self._hf.bos_token == "<s>" else None


class IncrementalDetokenizer:
    """Text of one sequence as its tokens arrive: whole characters only, and cut at the first stop string.

    The deltas joined, with `finish()`, are `tokenizer.decode` of all tokens (for byte-fallback tokenizers: where the
    bytes form valid UTF-8). Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        self.stopped_on: str | None = None
        """The stop string that was met; no text comes after it."""
        self._decode = tokenizer.decode
        self._skip = tokenizer.special_ids if sampling.skip_special_tokens else frozenset[int]()
        self._stop = sampling.stop
        self._include_stop = sampling.include_stop_str_in_output
        self._unchecked = sampling.min_tokens if self._stop else 0  # tokens whose text is not searched
        self._held = ""
        # Decoding is not local (a leading space, a character over several tokens), so each token is decoded behind
        # the tokens of the last delta, as TGI and tokenizers.DecodeStream do: delta = decode(_ids)[len(_prefix):]
        self._ids = self._seed(prompt_token_ids)
        self._num_prefix = len(self._ids)
        self._prefix = self._decode(self._ids, False).rstrip(_INCOMPLETE)

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that is now certain. "" once a stop string was met."""
        delta = ""
        for token_id in token_ids:
            if self.stopped_on is not None:
                return delta
            text = "" if token_id in self._skip else self._next_text(token_id)
            if not self._stop:
                delta += text
            elif self._unchecked:
                self._unchecked -= 1
                delta += text
            elif text:
                delta += self._until_stop(text)
        return delta

    def finish(self) -> str:
        """Return what was held back: the beginning of a stop string that did not come, U+FFFD for half a character."""
        if self.stopped_on is not None:
            return ""
        tail = self._flush() if len(self._ids) > self._num_prefix else ""
        if self._stop and not self._unchecked:
            tail = self._until_stop(tail)
        tail += self._held
        self._held = ""
        return tail

    def _seed(self, prompt_token_ids: Sequence[int]) -> list[int]:
        tail = [i for i in prompt_token_ids[-2 * _SEED_TOKENS :] if i not in self._skip][-_SEED_TOKENS:]
        for n in range(1, len(tail) + 1):
            text = self._decode(tail[-n:], False)
            if text and _INCOMPLETE not in text:
                return tail[-n:]
        return tail

    def _next_text(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids, False)
        held = len(self._ids) - self._num_prefix
        if (text.endswith(_INCOMPLETE) or len(text) <= len(self._prefix)) and held < _HELD_TOKENS:
            return ""
        return self._flush(text)

    def _flush(self, text: str | None = None) -> str:
        text = self._decode(self._ids, False) if text is None else text
        new_ids = self._ids[self._num_prefix :]
        alone = self._decode(new_ids, False)
        # Byte fallback turns a whole run of bytes into U+FFFD when its end is invalid: what was sent stays sent.
        delta = text[len(self._prefix) :] if text.startswith(self._prefix) else alone
        self._ids, self._num_prefix, self._prefix = new_ids, len(new_ids), alone
        return delta

    def _until_stop(self, text: str) -> str:
        """Add `text` to what is held; return what cannot belong to a stop string, or all before the first one.

        First is the one that is complete first, so that the cut does not depend on how the text was split in tokens.
        """
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            end, start, self.stopped_on = min(ends)
            self._held = ""
            return text[:end] if self._include_stop else text[:start]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _load(checkpoint: Path) -> Any:
    """Load through the Rust tokenizer classes themselves: `AutoTokenizer` imports torch and takes 2.4 s, this 0.8 s.

    tokenizer.json is used as it stands; a lone tokenizer.model (sentencepiece) is converted as Llama's.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if (checkpoint / "tokenizer.json").is_file():
        kind: Any = PreTrainedTokenizerFast
    elif (checkpoint / "tokenizer.model").is_file():
        from transformers import LlamaTokenizer  # 0.2 s that most checkpoints do not need

        kind = LlamaTokenizer
        if "add_bos_token" not in _read_json(checkpoint / "tokenizer_config.json"):
            options["add_bos_token"] = True
    else:
        raise CheckpointError(f"no tokenizer in {checkpoint}: tokenizer.json (or tokenizer.model) is missing")
    try:
        return kind.from_pretrained(checkpoint, **options)
    except Exception as exc:  # tokenizers raises bare Exception
        raise CheckpointError(f"the tokenizer in {checkpoint} cannot be read: {exc}") from exc


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as exc:
        raise CheckpointError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _sampling_defaults(checkpoint: Path) -> dict[str, float]:
    recommended = _read_json(checkpoint / "generation_config.json")
    return {name: recommended[name] for name in _SAMPLING_DEFAULTS if recommended.get(name) is not None}


def _eos_token_ids(checkpoint: Path, config: dict[str, Any], own: int | None) -> frozenset[int]:
    declared = [_read_json(checkpoint / "generation_config.json").get("eos_token_id"), config.get("eos_token_id"), own]
    flat = [i for ids in declared for i in (ids if isinstance(ids, list) else [ids])]
    return frozenset(i for i in flat if isinstance(i, int))


def _text_of(message: Message) -> str:
    """Content of a message as one string; text parts are joined by newlines, as vLLM does."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") if part.get("type") == "text" else None for part in content]
    if any(not isinstance(text, str) for text in texts):
        kinds = sorted({str(part.get("type")) for part in content} - {"text"})
        raise InvalidRequest(
            f"`messages` content may only hold text parts, got {', '.join(kinds) or 'none'}", "messages"
        )
    return "\n".join(text for text in texts if text is not None)


def _merge_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The conversation with its system texts in front of the first user turn; None where there is nothing to merge."""
    system = [m["content"] for m in chat if m["role"] == "system"]
    turns = [m for m in chat if m["role"] != "system"]
    first = next((i for i, m in enumerate(turns) if m["role"] == "user"), None)
    if not system or first is None:
        return None
    turns[first] = {**turns[first], "content": "\n\n".join([*system, turns[first]["content"]])}
    return turns
