"""Takes secrets out of text: those that are known by value, and what looks like one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

GONE: Final = "[redacted]"
LEAST: Final = 4
"""Characters of a known secret that is looked for: a shorter one would take words apart."""
SECRET_NAME: Final = re.compile(r"(token|keys?|password|passwd|secret|credentials?)$", re.IGNORECASE)
"""Of a variable or a key whose value is a secret."""
_NAMED: Final = r"[\w.-]*(?:api[_-]?keys?|token|password|passwd|secret|credentials?|authorization)"
PATTERNS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), GONE),
    (re.compile(r"(\w+://)[^/\s:@'\"]*:[^/\s'\"]*@"), rf"\1{GONE}@"),  # user and password of a URL
    (re.compile(r"(\w+://)[^/\s:@'\"]{8,}@"), rf"\1{GONE}@"),  # a token in the place of the user
    (re.compile(r"\b(Bearer|Basic)\s+[^\s\"',;]+", re.I), rf"\1 {GONE}"),
    (re.compile(r"\b(hf|sk|gh[pousr]|xox[abps]|glpat)[_-][\w-]{8,}"), GONE),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"), GONE),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), GONE),  # a JSON web token
    (re.compile(rf"\b({_NAMED})([\"']?\s*[=:]\s*)[\[(][^\])]*[\])]", re.I), rf"\1\2{GONE}"),  # a list of them
    (
        re.compile(
            rf"\b({_NAMED})([\"']?\s*[=:]\s*[\"']?)(?![\d.]+\b|null|None|true|True|false|False)(?!\[)[^\s\"',;}})]{{4,}}",
            re.I,
        ),
        rf"\1\2{GONE}",
    ),
)
"""What looks like a secret → what is left of it. A number behind a name is a count: `max_tokens: 2048`."""


class Redactor:
    """Takes these secrets, and what looks like one, out of any text."""

    def __init__(self, secrets: Iterable[str]) -> None:
        longest_first = sorted({each for each in secrets if len(each) >= LEAST}, key=len, reverse=True)
        forms = [form for secret in longest_first for form in dict.fromkeys((secret, json.dumps(secret)[1:-1]))]
        self._known = re.compile("|".join(map(re.escape, forms))) if forms else None

    def __call__(self, text: str) -> str:
        """`text` without secrets."""
        if self._known is not None:
            text = self._known.sub(GONE, text)
        for pattern, left in PATTERNS:
            text = pattern.sub(left, text)
        return text

    def in_tree(self, tree: Any) -> Any:
        """The same tree of JSON, with no secrets in its texts and names."""
        if isinstance(tree, dict):
            return {self(key): self.in_tree(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self.in_tree(value) for value in tree]
        return self(tree) if isinstance(tree, str) else tree


def secrets_in(tree: Any, name: str = "") -> Iterator[str]:
    """The texts below keys that name secrets, of configuration or variables; a text of JSON is looked into as well.

    >>> list(secrets_in({"gateway": {"api_keys": ["k1", "k2"]}, "port": "8000"}))
    ['k1', 'k2']
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from secrets_in(value, name if SECRET_NAME.search(name) else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from secrets_in(value, name)
    elif isinstance(tree, str) and SECRET_NAME.search(name):
        yield tree
        if tree.lstrip()[:1] in ("[", "{"):
            try:
                inner = json.loads(tree)
            except ValueError:
                return
            yield from secrets_in(inner, name)


def without_secrets(tree: Any, name: str = "") -> Any:
    """The same tree with `GONE` in the place of each text that `secrets_in` finds."""
    if isinstance(tree, Mapping):
        inner = name if SECRET_NAME.search(name) else ""
        return {key: without_secrets(value, inner or str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_secrets(value, name) for value in tree]
    return GONE if isinstance(tree, str) and SECRET_NAME.search(name) else tree
