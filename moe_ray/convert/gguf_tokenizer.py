"""tokenizer.json and tokenizer_config.json of the vocabulary in a GGUF file.

llama.cpp's own rules are followed (llama-vocab.cpp): which texts a space is put before, where a text is cut before
merging, which tokens are whole. transformers' converter ignores some of `tokenizer.ggml.pre`, so that runs of spaces
before digits come out in other tokens than SmolLM was trained on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from moe_ray.convert.gguf_metadata import GgufMetadata
from moe_ray.errors import CheckpointError

log = logging.getLogger(__name__)

_KEY: Final = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE: Final = "▁"
_ROLES: Final = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}

_LLAMA_3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2: Final = _LLAMA_3.replace("{1,3}", "")
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a byte-level vocabulary's text is cut before merging."""

    pattern: str | None = None
    """None: GPT-2's."""
    digits_alone: bool = False
    whole_words: bool = False
    """Whether a piece that is a token is that token, whatever its merges make."""
    bos: bool = False
    """Whether a text begins with BOS where the file does not say."""


_CUTS: Final = {
    **dict.fromkeys(("gpt-2", "default"), _Cut()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _Cut(digits_alone=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Cut(_LLAMA_3, whole_words=True, bos=True)),
    "qwen2": _Cut(_QWEN_2),
    "tekken": _Cut(_TEKKEN, whole_words=True, bos=True),
}
"""By `tokenizer.ggml.pre`."""


def has_tokenizer(metadata: GgufMetadata) -> bool:
    """Whether the file holds a vocabulary at all."""
    return metadata.text(_KEY + "model", "none") not in ("none", "no_vocab")


def tokenizer_of(metadata: GgufMetadata) -> Tokenizer:
    """The tokenizer. Raises `CheckpointError` naming the key of a kind that is not known."""
    kind = metadata.text(_KEY + "model")
    makers = {"llama": _sentencepiece, "gpt2": _byte_level}
    if kind not in makers:
        raise CheckpointError(
            f"{metadata.source}: metadata `{_KEY}model` is {kind!r}, supported: {', '.join(map(repr, makers))}"
        )
    tokens = metadata.texts(_KEY + "tokens")
    kinds = [int(number) for number in metadata.numbers(_KEY + "token_type")] or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{metadata.source}: {len(tokens)} tokens, but {len(kinds)} in `{_KEY}token_type`")
    tokenizer, bos = makers[kind](metadata, tokens, kinds)
    for special, wanted in ((True, (_UNKNOWN, _CONTROL)), (False, (_USER_DEFINED,))):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind_of_token in zip(tokens, kinds, strict=True)
            if kind_of_token in wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    _frame(tokenizer, metadata, tokens, bos)
    return tokenizer


def tokenizer_config_of(metadata: GgufMetadata) -> dict[str, Any]:
    """What tokenizer_config.json would say: special tokens by their text, and the chat template."""
    tokens = metadata.texts(_KEY + "tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.integer("llama.context_length"),
    }
    for role, key in _ROLES.items():
        token_id = metadata.integer(_KEY + key, -1)
        if 0 <= token_id < len(tokens):
            config[f"{role}_token"] = tokens[token_id]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    return config


def _sentencepiece(metadata: GgufMetadata, tokens: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    """Sentencepiece's BPE: of all neighbours, those are joined first whose whole has the highest score."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores = metadata.numbers(_KEY + "scores") or [-float(i) for i in range(len(tokens))]
    unknown = tokens[metadata.integer(_KEY + "unknown_token_id", 0)]
    merges = _merges(tokens, kinds, scores)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback="<0x00>" in vocabulary,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = metadata.flag(_KEY + "add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces] if prefix else [spaces])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens whose whole is a token, the best score of the whole first."""
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] == _NORMAL}
    found: list[tuple[float, int, int]] = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], left, right))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


def _byte_level(metadata: GgufMetadata, tokens: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    pre = metadata.text(_KEY + "pre", "default")
    if pre not in _CUTS:
        raise CheckpointError(f"{metadata.source}: metadata `{_KEY}pre` is {pre!r}, supported: {', '.join(_CUTS)}")
    if pre == "default":
        log.warning("%s: `%spre` does not say how text is cut into words: as GPT-2 does", metadata.source, _KEY)
    cut = _CUTS[pre]
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in metadata.texts(_KEY + "merges"))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.whole_words))
    bytes_of = pre_tokenizers.ByteLevel(
        add_prefix_space=metadata.flag(_KEY + "add_space_prefix", False), use_regex=cut.pattern is None
    )
    steps: list[Any] = [bytes_of]
    if cut.pattern is not None:
        steps = [pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated"), bytes_of]
    if cut.digits_alone:
        steps = [pre_tokenizers.Digits(individual_digits=True), bytes_of]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.bos


def _frame(tokenizer: Tokenizer, metadata: GgufMetadata, tokens: list[str], bos: bool) -> None:
    """Put BOS before and EOS behind every text where the file, or else its kind of vocabulary, says so."""
    wanted = {"bos": metadata.flag(_KEY + "add_bos_token", bos), "eos": metadata.flag(_KEY + "add_eos_token", False)}
    framing = {role: metadata.integer(_KEY + _ROLES[role], -1) for role, add in wanted.items() if add}
    ids = {role: token_id for role, token_id in framing.items() if 0 <= token_id < len(tokens)}
    if not ids:
        return
    before, behind = ([tokens[ids[role]]] if role in ids else [] for role in ("bos", "eos"))
    second = [*(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in behind)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *second],
        special_tokens=[(tokens[token_id], token_id) for token_id in ids.values()],
    )
