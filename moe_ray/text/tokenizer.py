"""Text ↔ token ids for one checkpoint. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from moe_ray.errors import CheckpointError
from moe_ray.model.end_tokens import end_token_ids, tokenizer_file
from moe_ray.model.json_files import read_json_object
from moe_ray.text.answers.tools import Tool
from moe_ray.text.chat_template import ChatTemplate
from moe_ray.text.loading import load_tokenizer
from moe_ray.text.messages import Message
from moe_ray.text.sampling_defaults import sampling_defaults

# Vocabularies that are not read, and what to do with them.
_OTHER_FILES = {
    "tokenizer.model.*": "copy it to tokenizer.model",
    "tekken_*.json": "copy it to tekken.json",
    "vocab.json": "load it in transformers and save it again, which writes tokenizer.json",
}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token of a text, and what of the text it is."""

    token_id: int
    text: str
    start: int
    """In bytes of UTF-8; equal to `stop` of a token that the text does not spell out, such as a BOS."""
    stop: int


class Tokenizer:
    """The tokenizer of a checkpoint directory; raises `CheckpointError` naming what is missing. Thread-safe."""

    def __init__(self, checkpoint: Path | str, tool_call_parser: str = "auto") -> None:
        """`tool_call_parser`: see `ChatTemplate`."""
        directory = Path(checkpoint)
        self.directory = directory
        """Of the checkpoint."""
        vocabulary = tokenizer_file(directory)
        if vocabulary is None:
            raise CheckpointError(_nothing_found(directory))
        self._hf = load_tokenizer(vocabulary)
        self._backend = self._hf.backend_tokenizer
        # Rust raises "Already borrowed" if one thread changes these while another encodes: set once, here.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._decoder = self._backend.decoder.__getstate__().decode() if self._backend.decoder is not None else ""
        self._added = {i: token.content for i, token in self._hf.added_tokens_decoder.items()}
        self.special_ids = frozenset(i for i, token in self._hf.added_tokens_decoder.items() if token.special)
        self.special_tokens: Mapping[str, int] = {self._added[i]: i for i in self.special_ids}
        self.vocab_size: int = read_json_object(directory / "config.json").get("vocab_size") or len(self._hf)
        """Ids the model has embeddings for: config.json's count, else the tokenizer's."""
        self.bos_token_id: int | None = self._hf.bos_token_id
        self.eos_token_ids: frozenset[int] = end_token_ids(directory, self.vocab_size)
        self.sampling_defaults: dict[str, float] = sampling_defaults(directory)
        """What generation_config.json recommends where a request says nothing: temperature, top_k, top_p, …"""
        self.token_bytes: Callable[[int], bytes] = lru_cache(maxsize=None)(self._token_bytes)
        """UTF-8 bytes that a token stands for; part of a character for byte-level and byte-fallback tokens."""
        self.chat_template = ChatTemplate(self._hf, vocabulary, tool_call_parser)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A BOS that the text spells out already is not added a second time."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        doubled = add_special_tokens and len(ids) > 1 and ids[0] == ids[1] == self.bos_token_id
        return ids[1:] if doubled and text.startswith(self._hf.bos_token) else ids

    def spans(self, text: str, add_special_tokens: bool = True) -> list[TokenSpan]:
        """The tokens that `encode` makes, each with its place in `text`."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        starts = [0]
        for character in text:
            starts.append(starts[-1] + len(character.encode("utf-8", "replace")))
        found = [
            TokenSpan(token_id, text[first:last], starts[first], starts[last])
            for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        return found[len(found) - len(self.encode(text, add_special_tokens)) :]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids outside the vocabulary give nothing."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Tool] = (),
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; raises `InvalidRequest` as `ChatTemplate.render` does."""
        text = self.render_chat(
            messages,
            add_generation_prompt,
            tools=tools,
            documents=documents,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode(text, add_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Tool] = (),
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of a conversation; see `ChatTemplate.render`."""
        return self.chat_template.render(
            messages,
            add_generation_prompt,
            tools=tools,
            documents=documents,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def token_to_str(self, token_id: int) -> str:
        """Text of one token by itself, its leading space kept; U+FFFD where it is part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

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

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Byte-level BPE's printable stand-in for each byte (Radford et al. 2019, `bytes_to_unicode`)."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in printable]
        return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _nothing_found(directory: Path) -> str:
    message = f"no tokenizer in {directory}: tokenizer.json (or tokenizer.model) is missing"
    for pattern, advice in _OTHER_FILES.items():
        if found := next(directory.glob(pattern), None):
            return f"{message}, nor is there a tekken.json; {found.name} is there: {advice}"
    return message
