"""What `LLM` is given: prompts and sampling parameters in each form that they may have."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from moe_ray.api.job import sampling_seed
from moe_ray.core import SamplingParams
from moe_ray.errors import InvalidRequest

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or one of them in vLLM's dictionaries: {"prompt": …}, {"prompt_token_ids": …}."""
_PROMPT_KEYS: Final = ("prompt_token_ids", "prompt")
"""Of a prompt's dictionary; the first that is there counts, as for vLLM."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    """The prompts as texts or token ids. Raises `InvalidRequest` for anything that is neither."""
    if isinstance(prompts, str | Mapping) or _is_ids(prompts):
        return [_as_prompt(prompts)]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence | np.ndarray):
        raise _no_prompt(prompts)
    return [_as_prompt(prompt) for prompt in prompts]


def _as_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        given = {key: value for key, value in prompt.items() if value is not None}
        if unknown := sorted(map(str, given.keys() - set(_PROMPT_KEYS))):
            raise InvalidRequest(f"a prompt's `{unknown[0]}` is not supported", unknown[0])
        for key in _PROMPT_KEYS:
            if key in given and isinstance(given[key], str) == (key == "prompt"):
                return _as_prompt(given[key])
        raise _no_prompt(prompt)
    if not _is_ids(prompt):
        raise _no_prompt(prompt)
    return [operator.index(token_id) for token_id in prompt]


def _is_ids(prompt: Any) -> bool:
    """A list, tuple or array of whole numbers, not empty."""
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, str | bytes) or len(prompt) == 0:
        return False
    return all(type(each) is int or _is_scalar(each) for each in prompt)


def _is_scalar(value: Any) -> bool:
    """A whole number of numpy or torch; arrays are not, though they may have the method, too."""
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def _no_prompt(given: object) -> InvalidRequest:
    shown = repr(given)[:80]
    return InvalidRequest(
        f'a prompt is a text, a list of token ids, {{"prompt": …}} or {{"prompt_token_ids": …}}, got {shown}', "prompt"
    )


def as_params(given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One for each prompt, all with a seed of their own. Raises `InvalidRequest` where they do not fit the prompts."""
    if given is None or isinstance(given, SamplingParams):
        params = [given or SamplingParams()] * count
    else:
        params = list(given)
    if not all(isinstance(each, SamplingParams) for each in params):
        raise InvalidRequest("`sampling_params` must be a SamplingParams or a list of them", "sampling_params")
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} sampling parameters for {count} prompts", "sampling_params")
    return [replace(each, seed=sampling_seed(each)) for each in params]
