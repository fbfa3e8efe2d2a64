"""The sampling settings of a conversation: which there are, and how a typed value is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from moe_ray.errors import ConfigError, InvalidRequest
from moe_ray.sampling import SamplingParams

NOT_SHOWN: Final = frozenset(
    {
        *("logprobs", "prompt_logprobs", "return_routed_experts", "grammar"),
        *("include_stop_str_in_output", "bad_words_ids"),
    }
)
"""Fields that ask for something beside the answer's text, or that a chat API takes in another form."""
SETTINGS: Final = tuple(each.name for each in fields(SamplingParams) if each.name not in NOT_SHOWN)
MAX_TOKENS: Final = 512
TEMPERATURE: Final = 0.7
"""Where neither the user nor the model says one."""
DEFAULT: Final = "default"
"""The word that takes a setting back."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """What the user has set, above what the model recommends.

    >>> SamplingSettings().having("top_p", "0.9").body
    {'max_tokens': 512, 'temperature': 0.7, 'top_p': 0.9}
    """

    chosen: Mapping[str, Any] = field(default_factory=dict)
    recommended: Mapping[str, Any] = field(default_factory=dict)
    """By the model; the server applies it where a request says nothing."""

    @property
    def body(self) -> dict[str, Any]:
        """The fields of a request that these settings make."""
        ours = {"max_tokens": MAX_TOKENS, "temperature": TEMPERATURE}
        return {**{name: value for name, value in ours.items() if name not in self.recommended}, **self.chosen}

    def having(self, name: str, text: str) -> SamplingSettings:
        """These settings with one more, typed as `text`. Raises `ConfigError` naming it and what is allowed."""
        chosen = {key: value for key, value in self.chosen.items() if key != name}
        if name not in SETTINGS:
            raise ConfigError(f"no setting {name!r}; there are {', '.join(SETTINGS)}")
        if text == DEFAULT:
            return SamplingSettings(chosen, self.recommended)
        return self.with_values({**chosen, name: _value(text)})

    def with_values(self, chosen: Mapping[str, Any]) -> SamplingSettings:
        """Settings with exactly these values chosen. Raises `ConfigError` naming one that is not allowed."""
        if unknown := sorted(set(chosen) - set(SETTINGS)):
            raise ConfigError(f"no setting {unknown[0]!r}; there are {', '.join(SETTINGS)}")
        try:
            read = SamplingParams(**{"max_tokens": MAX_TOKENS, **chosen})
        except InvalidRequest as error:
            raise ConfigError(str(error)) from None
        return SamplingSettings({name: getattr(read, name) for name in chosen}, self.recommended)

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, where it is from) of each setting, in the order of `SamplingParams`."""
        defaults, body = SamplingParams(), self.body
        found = []
        for name in SETTINGS:
            value, source = body.get(name, getattr(defaults, name)), "set" if name in self.chosen else ""
            if not source and name in self.recommended:
                value, source = self.recommended[name], "the model recommends it"
            found.append((name, json.dumps(value), source))
        return found


def parse_assignment(text: str, settings: SamplingSettings) -> SamplingSettings:
    """`settings` with what `NAME=VALUE` or `NAME VALUE` says. Raises `ConfigError`."""
    name, _, value = text.replace("=", " ", 1).strip().partition(" ")
    if not value.strip():
        raise ConfigError(f"expected a name and a value, as in `temperature 0.7`, got {text!r}")
    return settings.having(name, value.strip())


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text itself: `0.7`, `["a", "b"]`, `###`."""
    try:
        return json.loads(text)
    except ValueError:
        return text
