"""How a format writes calls of tools, as data for the reader."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Final, Literal

_SHORT_ID: Final = 9
"""Characters that Mistral's templates demand of a call's id."""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls are written."""

    markers: tuple[tuple[str, str], ...]
    """(what opens calls, what closes them; "": nothing does). One that begins with a brace, and "[", are part of the
    first call itself."""
    where: Literal["anywhere", "line", "start"] = "anywhere"
    """Calls are only looked for there: at the start of a line; at that of the answer, or behind another call."""
    array: bool = False
    """Calls may be in a JSON array."""
    named: bool = False
    """`name[ARGS]{…}` is a call, too."""
    separators: str = ""
    """Characters that may stand between two calls that nothing closes."""
    short_ids: bool = False
    """A call's id has nine letters and digits."""

    def call_id(self) -> str:
        """A new id for a call."""
        if self.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_SHORT_ID))
        return f"call_{secrets.token_hex(12)}"
