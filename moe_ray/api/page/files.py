"""The files of the page, read once, and the headers that they go out with. Nothing is loaded from anywhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Final

KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
"""Ending → media type. What ends otherwise is no file of the page."""
INDEX: Final = "index.html"
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text ever becomes markup, not even by our own mistake
        "trusted-types 'none'",
    )
)
HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",  # asked for anew each time, and sent only where it has changed
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file, as it is sent."""

    content: bytes
    media_type: str
    etag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """Name → file, of every file in the folder `static` beside this one."""
    found = {}
    for entry in files(__package__).joinpath("static").iterdir():
        kind = KINDS.get(entry.name.rpartition(".")[2])
        if kind is not None:
            found[entry.name] = as_file(entry.read_bytes(), kind)
    return found


def as_file(content: bytes, media_type: str) -> PageFile:
    """A file of this content."""
    return PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


@cache
def index(root: str) -> PageFile:
    """The page of an application that is served under the path `root`, "" for none: its links begin there.

    Without a prefix the page's links are relative to itself, so it works behind proxies that take one away, too.
    """
    page = page_files()[INDEX]
    base = f'<base href="{escape(root, quote=True)}/">' if root else ""
    return as_file(page.content.replace(b"<!--base-->", base.encode()), page.media_type)
