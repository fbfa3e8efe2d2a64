"""The formats in which models write calls of tools, and which of them a checkpoint's chat template speaks of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from moe_ray.text.answers import hermes, llama3_json, mistral, plain_json
from moe_ray.text.answers.reader import CallReader
from moe_ray.text.answers.structure import CallShape, Structure
from moe_ray.text.answers.syntax import CallSyntax


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way to write calls."""

    syntax: CallSyntax
    """What is read as a call."""
    written: Callable[[str, str], str]
    """(name, JSON text of the arguments) → the call as text."""
    calls: Callable[[CallShape], Structure]
    """Answers that are calls and nothing else."""
    text_with_calls: Callable[[CallShape], Structure]
    """Answers of text and calls."""
    exact: CallSyntax | None = None
    """What is read as a call where `text_with_calls` holds, for formats whose calls have no marker; None: `syntax`."""
    markers: Collection[str] = ()
    """What the reader must see even where it is a special token."""

    @property
    def has_marker(self) -> bool:
        """Calls begin with what is no part of other texts."""
        return self.exact is None

    def reader(
        self, names: Collection[str], tokens: Mapping[str, int], parallel: bool = True, exact: bool = False
    ) -> CallReader:
        """What takes an answer apart; `tokens` are the vocabulary's special ones."""
        shown = frozenset(tokens[each] for each in self.markers if each in tokens)
        return CallReader(self.exact if exact and self.exact else self.syntax, names, parallel, shown)


FORMATS: Final[dict[str, CallFormat]] = {
    "hermes": CallFormat(hermes.SYNTAX, hermes.written, hermes.calls, hermes.text_with_calls, markers=hermes.MARKERS),
    "mistral": CallFormat(
        mistral.SYNTAX, mistral.written, mistral.calls, mistral.text_with_calls, markers=mistral.MARKERS
    ),
    "llama3_json": CallFormat(
        llama3_json.SYNTAX,
        llama3_json.written,
        llama3_json.calls,
        llama3_json.text_with_calls,
        llama3_json.EXACT,
        llama3_json.MARKERS,
    ),
    "json": CallFormat(
        plain_json.SYNTAX, plain_json.written, plain_json.calls, plain_json.text_with_calls, plain_json.EXACT
    ),
}
"""By the names that `gateway.tool_call_parser` takes."""

_SIGNS: Final = (
    ("mistral", ("[TOOL_CALLS]",), ()),
    ("hermes", ("<tool_call>",), ("<function=", "<arg_key>")),  # without the XML that others put between these tags
    ("llama3_json", ('"parameters":', "ipython"), ()),
)
"""(format, what a template that teaches it holds, what it does not hold); the first that fits counts."""


def format_taught_by(template: str) -> str | None:
    """The name of the format that a chat template which tells the model of tools asks for; None: none known here.

    >>> format_taught_by("... return <tool_call> and </tool_call> around JSON")
    'hermes'
    """
    for name, held, not_held in _SIGNS:
        if all(each in template for each in held) and not any(each in template for each in not_held):
            return name
    return None
