"""Text of one sequence as its tokens arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_ray.core import SamplingParams
from moe_ray.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"
_HELD_TOKENS = 32  # a character is at most 4 bytes, so longer runs that do not decode never will: emit them as they are
_SEED_TOKENS = 8


class IncrementalDetokenizer:
    """Text of one sequence as its tokens arrive: whole characters only, and cut at the first stop string.

    The deltas joined, with `finish()`, are `tokenizer.decode` of all tokens (for byte-fallback tokenizers: where the
    bytes form valid UTF-8). Text that may be the beginning of a stop string is held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`shown_ids` are special tokens that are part of the text even where others are left out."""
        self.stopped_on: str | None = None
        """The stop string that was met; no text comes after it."""
        self._decode = tokenizer.decode
        self._skip = tokenizer.special_ids - shown_ids if sampling.skip_special_tokens else frozenset[int]()
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
