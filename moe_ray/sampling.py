"""How the tokens of one sequence are chosen: every parameter with its default, and the rule for its values beside it.

A new parameter is a field here with a row in `_RULES`, a field of the same name in protos/moe_ray.proto (unless it
concerns text only), and the code that reads it. The APIs and the wire take their fields from here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final, Literal, get_args

from moe_ray.errors import InvalidRequest

MAX_LOGPROBS: Final = 20
MAX_STOP_STRINGS: Final = 16
MAX_BAD_WORDS: Final = 64
MIN_SEED: Final = -(2**63)
MAX_SEED: Final = 2**63 - 1
DRAW_SEED: Final = -1
"""This seed asks for one to be drawn, as for vLLM and llama.cpp."""
MAX_GRAMMAR_CHARACTERS: Final = 2**18
GrammarKind = Literal["json_object", "json_schema", "regex", "ebnf", "structural_tag"]
_MOST_INT: Final = 2**31 - 1
_SHOWN: Final = 120
"""Characters of a wrong value that its error shows."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of an output must match. Raises `InvalidRequest` for a kind that does not exist.

    >>> Grammar("regex", "yes|no").kind
    'regex'
    """

    kind: GrammarKind
    source: str = ""
    """The JSON schema or the structural tag as JSON text, the regular expression, the EBNF; "" for "json_object"."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise _refusal("grammar", f"of a kind among {', '.join(get_args(GrammarKind))}", self.kind)
        if len(self.source) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequest(f"`grammar` has more than {MAX_GRAMMAR_CHARACTERS} characters", "grammar")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one sequence are chosen. Names and defaults are the field's (OpenAI, vLLM, transformers).

    Values are taken as vLLM takes them: None for "not set", a string for a list of one stop string, lists for tuples.
    Raises `InvalidRequest` naming the field on a value of another type or outside its range.

    >>> SamplingParams(stop="\\n", temperature=None) == SamplingParams(stop=("\\n",), temperature=1.0)
    True
    """

    __pydantic_config__: ClassVar = {"use_attribute_docstrings": True}
    """For /openapi.json, which describes the fields by their docstrings."""

    max_tokens: int | None = 16
    """Most tokens to generate; None: up to the model's context length; 0: none."""
    min_tokens: int = 0
    """End-of-sequence and stop token ids are masked until this many tokens exist."""
    temperature: float = 1.0
    """0 is greedy decoding."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p; 0: the most likely one."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    typical_p: float = 1.0
    """Keep the smallest set of tokens, those of the least surprising information first, whose probability reaches p.

    Locally typical sampling (Meister et al. 2022, arXiv:2202.00666)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence from the logit of each token in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id → value added to its logit."""
    allowed_token_ids: tuple[int, ...] = ()
    """No other token is chosen; none given: every one may be."""
    bad_words: tuple[str, ...] = ()
    """Texts that the output must not hold; `text.bad_words` makes `bad_words_ids` of them."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the output must not hold: the last token of one is masked behind the others."""
    seed: int | None = None
    """Same seed, prompt and parameters: same tokens. None or -1: drawn once when the request is accepted."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings (cut out of the text)."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends behind the first of these tokens."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none; k: log-probability of the chosen token and of the k most likely."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first. The whole prompt is computed then, whatever is cached."""
    priority: int = 0
    """Requests of a lower number are computed first; those of the same, in the order of their arrival."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_routed_experts: bool = False
    """Tell which experts each computed token went to. The whole prompt is computed then, whatever is cached."""
    grammar: Grammar | None = None
    """What the text of the output must match; its end, and no token before it, ends the sequence."""

    def __post_init__(self) -> None:
        for name, (read, rule) in _RULES.items():
            given = getattr(self, name)
            try:
                value = _DEFAULTS[name] if given is None else read(given)
            except (TypeError, ValueError, OverflowError):
                raise _refusal(name, rule, given) from None
            object.__setattr__(self, name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refusal("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)

    @property
    def empty(self) -> bool:
        """Whether nothing at all is asked of the engine: no token, and nothing of the prompt."""
        return self.max_tokens == 0 and self.prompt_logprobs is None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


def _refusal(name: str, rule: str, given: object) -> InvalidRequest:
    shown = repr(given)
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
    return InvalidRequest(f"`{name}` must be {rule}, got {shown}", name)


# Each reader returns the value in the field's type, or raises ValueError or TypeError.


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str):
        if not re.fullmatch(r"-?[0-9]{1,20}", value):
            raise ValueError
        return int(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        return int(value)
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:
    if value not in (True, False):  # 0 and 1 equal them
        raise ValueError
    return bool(value)


def _token_id(value: Any) -> int:
    if isinstance(value, bool | str | float):
        raise TypeError
    token_id = operator.index(value)
    if not 0 <= token_id <= _MOST_INT:
        raise ValueError
    return token_id


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, str | bytes | Mapping):
        raise TypeError
    return tuple(map(_token_id, value))


def _token_sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_BAD_WORDS * 2:
        raise TypeError
    sequences = tuple(map(_token_ids, value))
    if not all(sequences):
        raise ValueError
    return sequences


def _strings(most: int) -> Callable[[Any], tuple[str, ...]]:
    def read(value: Any) -> tuple[str, ...]:
        strings = (value,) if isinstance(value, str) else value
        if not isinstance(strings, list | tuple) or len(strings) > most:
            raise TypeError
        if not all(isinstance(string, str) and string for string in strings):
            raise TypeError
        return tuple(strings)

    return read


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError
    bias = _Between(_number, -100.0, 100.0)
    return {_token_id(_integer(token_id)): bias(each) for token_id, each in value.items()}


def _grammar(value: Any) -> Grammar:
    if not isinstance(value, Grammar):
        raise TypeError
    return value


@dataclass(frozen=True, slots=True)
class _Between:
    """Reads a number of a range, its ends included."""

    read: Callable[[Any], Any]
    low: float
    high: float

    def __call__(self, value: Any) -> Any:
        converted = self.read(value)
        if not self.low <= converted <= self.high:  # NaN is in no range
            raise ValueError
        return converted


# field → (its reader, what a value must be)
_RULES: Final[dict[str, tuple[Callable[[Any], Any], str]]] = {
    "max_tokens": (_Between(_integer, 0, _MOST_INT), "an integer, at least 0"),
    "min_tokens": (_Between(_integer, 0, _MOST_INT), "an integer, at least 0"),
    "temperature": (_Between(_number, 0.0, 2.0), "between 0 and 2"),
    "top_k": (_Between(_integer, -1, _MOST_INT), "-1 or 0 (off) or at least 1"),
    "top_p": (_Between(_number, 0.0, 1.0), "between 0 and 1"),
    "min_p": (_Between(_number, 0.0, 1.0), "between 0 and 1"),
    "typical_p": (_Between(_number, math.ulp(0.0), 1.0), "above 0 and at most 1"),
    "repetition_penalty": (_Between(_number, math.ulp(0.0), 1e4), "above 0 and at most 10000"),
    "presence_penalty": (_Between(_number, -2.0, 2.0), "between -2 and 2"),
    "frequency_penalty": (_Between(_number, -2.0, 2.0), "between -2 and 2"),
    "logit_bias": (_biases, "a mapping of token ids to values in -100..100"),
    "allowed_token_ids": (_token_ids, "a list of token ids"),
    "bad_words": (
        _strings(MAX_BAD_WORDS),
        f"a string or a list of at most {MAX_BAD_WORDS} strings, none of them empty",
    ),
    "bad_words_ids": (
        _token_sequences,
        f"a list of at most {2 * MAX_BAD_WORDS} lists of token ids, none of them empty",
    ),
    "seed": (_Between(_integer, MIN_SEED, MAX_SEED), "an integer between -2**63 and 2**63 - 1"),
    "stop": (
        _strings(MAX_STOP_STRINGS),
        f"a string or a list of at most {MAX_STOP_STRINGS} strings, none of them empty",
    ),
    "stop_token_ids": (_token_ids, "a list of token ids"),
    "ignore_eos": (_flag, "true or false"),
    "logprobs": (_Between(_integer, 0, MAX_LOGPROBS), f"between 0 and {MAX_LOGPROBS}"),
    "prompt_logprobs": (_Between(_integer, 0, MAX_LOGPROBS), f"between 0 and {MAX_LOGPROBS}"),
    "priority": (_Between(_integer, -_MOST_INT - 1, _MOST_INT), "an integer of 32 bits"),
    "include_stop_str_in_output": (_flag, "true or false"),
    "skip_special_tokens": (_flag, "true or false"),
    "return_routed_experts": (_flag, "true or false"),
    "grammar": (_grammar, "a Grammar"),
}
# A field that is None has this value; of those whose default is None, and of max_tokens, None is a value itself.
_DEFAULTS: Final[dict[str, Any]] = {
    each.name: {} if each.name == "logit_bias" else None if each.name == "max_tokens" else each.default
    for each in fields(SamplingParams)
}


def rule_of(name: str) -> str:
    """What a value of a parameter must be.

    >>> rule_of("temperature")
    'between 0 and 2'
    """
    return _RULES[name][1]


def range_of(name: str) -> tuple[float, float] | None:
    """The least and the greatest value of a parameter; None of one that is no number.

    >>> range_of("temperature")
    (0.0, 2.0)
    """
    read = _RULES[name][0]
    return (read.low, read.high) if isinstance(read, _Between) else None
